"""Reward-guided sampling: one file per strategy, over a model that is asked along its trajectory."""
