"""Log-mel features: the op, its settings and its definition."""
