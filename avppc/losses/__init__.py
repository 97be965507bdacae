"""Losses as modules: the bilinear InfoNCE, and that of the 42 sub-tasks."""
