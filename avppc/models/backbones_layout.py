"""Memory layout of convolutions."""

from __future__ import annotations

import torch
from torch import nn


def use_channels_last(module: nn.Module) -> None:
    """Lays the filters of 2D convolutions out channels last, which both oneDNN and cuDNN prefer in bfloat16."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
