"""Pretraining: the loop, the optimiser, checkpoints, logs."""
