"""Sampling towards rewards: one strategy per file, over a model that is asked along a trajectory (`denoising`)."""
