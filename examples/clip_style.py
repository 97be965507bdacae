"""Replacing a CLIP-style loss: the same numbers and gradients, without large logits in memory.

python examples/clip_style.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avppc import bilinear_info_nce


def loss_before(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """What CLIP-like projects compute."""
    labels = torch.arange(len(image))
    logits = logit_scale * image @ text.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def loss_after(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """The same by one call; without weights the scores are plain dot products."""
    return bilinear_info_nce(image, text, scale=logit_scale, symmetric=True)


def main(batch: int = 1024, dim: int = 256) -> float:
    """Checks that both agree, and returns how far their gradients are apart, relative to their size."""
    torch.manual_seed(0)
    image_features, text_features = torch.randn(batch, dim), torch.randn(batch, dim)
    projections = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim)])
    log_scale = nn.Parameter(torch.tensor(14.3).log())
    parameters = [*projections.parameters(), log_scale]

    def gradients(loss_fn: object) -> list[Tensor]:
        image, text = F.normalize(projections[0](image_features)), F.normalize(projections[1](text_features))
        loss = loss_fn(image, text, log_scale.exp())
        print(f"{loss_fn.__name__}: {loss.item():.6f}")
        return torch.autograd.grad(loss, parameters)

    before, after = gradients(loss_before), gradients(loss_after)
    deviation = max(((a - b).norm() / b.norm()).item() for a, b in zip(after, before, strict=True))
    print(f"gradients agree to {deviation:.1e}")
    return deviation


if __name__ == "__main__":
    main()
