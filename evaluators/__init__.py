"""One file per evaluation dimension; installed as ``mmalign.evaluators`` and found by name, never imported by name."""
