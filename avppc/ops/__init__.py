"""The fast operators, their backends, and their definitions in plain torch."""
