"""Training a word classifier on few clips: best epoch by validation, tested by the caller once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

Split = Literal["val", "test"]


class ClassifierData(Protocol):
    """What a classifier sees: frozen features, mouth trajectories, or pictures."""

    def training_inputs(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Inputs of these training clips, varied at random."""

    def split_inputs(self, split: Split) -> Iterator[Tensor]:
        """Inputs of all clips of a split, in order, in batches."""


@dataclass(frozen=True)
class FitConfig:
    """How a classifier is trained."""

    epochs: int
    batch_size: int
    validate_every: int
    seed: int
    label_smoothing: float = 0.1
    clip_norm: float = 5.0


def fit_classifier(
    model: nn.Module,
    groups: list[dict[str, object]],
    data: ClassifierData,
    train: tuple[Tensor, Tensor],  # rows and labels of the labelled clips
    val_labels: Tensor,
    config: FitConfig,
) -> float:
    """Trains with AdamW and one cycle of the rates in `groups`; the model ends as it was at its best epoch.

    Returns:
        The best rate of right words on the validation clips, 0 to 1.
    """
    rows, labels = train
    device = labels.device
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    # A last batch of one clip would have no batch statistics: batches are as even as can be.
    batches = max(1, round(len(rows) / config.batch_size))
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=config.epochs * batches, pct_start=0.2, cycle_momentum=False
    )
    best, best_state = -1.0, model.state_dict()
    for epoch in range(1, config.epochs + 1):
        model.train()
        for chosen in torch.randperm(len(rows), generator=generator).tensor_split(batches):
            logits = model(data.training_inputs(rows[chosen], generator).to(device)).float()
            loss = functional.cross_entropy(logits, labels[chosen.to(device)], label_smoothing=config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            schedule.step()
        last = epoch == config.epochs
        if last or (2 * epoch >= config.epochs and (config.epochs - epoch) % config.validate_every == 0):
            rate = (predict(model, data, "val") == val_labels.cpu()).float().mean().item()
            if rate >= best:
                best, best_state = rate, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return best


@torch.inference_mode()
def predict(model: nn.Module, data: ClassifierData, split: Split) -> Tensor:
    """The word chosen for each clip of a split, int64 on the CPU; batch norms in eval mode."""
    model.eval()
    return torch.cat([model(inputs).argmax(1).cpu() for inputs in data.split_inputs(split)])
