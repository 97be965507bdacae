"""The bilinear InfoNCE by Triton's kernels."""
