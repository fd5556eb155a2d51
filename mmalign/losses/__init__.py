"""Objectives: pure functions on tensors, `(loss, metrics)` out, float32 inside. One file per family."""
