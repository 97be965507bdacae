"""What is fast: the ops, their backends and their definitions in plain torch."""
