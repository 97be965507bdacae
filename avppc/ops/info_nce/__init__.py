"""The bilinear InfoNCE: the op, its definition, and its backends for CPU, Triton and several processes."""
