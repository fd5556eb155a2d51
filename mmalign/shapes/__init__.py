"""The shapes world: a procedural domain small enough for a CPU and exact enough to measure truth."""
