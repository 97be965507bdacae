"""The optimiser and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from avppc.train.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW that decays only matrices and filters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        fused=True,
    )


def learning_rate_at(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of a step: linear warm-up, then half a cosine down to final_fraction of the highest rate."""
    warmup = config.warmup_fraction * steps
    if step + 1 < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = min(1.0, max(0.0, step - warmup) / max(1.0, steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * share))
    return config.learning_rate * (config.final_fraction + (1.0 - config.final_fraction) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def step_unless(skip: Tensor, optimizer: torch.optim.AdamW) -> None:
    """A step of the fused AdamW; where skip (float32 []) is 1, parameters and state stay as they are."""
    # As torch.amp.GradScaler does it: the kernel that would make the change reads the flag on the device.
    optimizer.found_inf = skip  # type: ignore[attr-defined]  # step() reads it where it is set
    optimizer.step()
