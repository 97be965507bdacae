"""Training a word classifier: the epoch that does best on the validation clips is kept. The caller tests it once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from avppc.evaluate.config import EvaluateConfig, RecipeConfig

HeldOutSplit = Literal["val", "test"]
HELD_OUT_SPLITS: tuple[str, ...] = get_args(HeldOutSplit)


class ClassifierData(Protocol):
    """What a classifier sees of the clips: frozen features, the true mouth movement, or pictures."""

    def training_inputs(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        """[N, T, ...] what it sees of the training clips with these indices, varied at random."""

    def split_inputs(self, split: HeldOutSplit) -> Iterator[Tensor]:
        """Batches [N, T, ...] of what it sees of a whole split, in order and not varied."""


def fit_classifier(
    model: nn.Module,
    groups: list[dict[str, object]],
    data: ClassifierData,
    train: tuple[Tensor, Tensor],  # [n] indices and [n] labels of the labelled clips
    val_labels: Tensor,  # [m]
    config: EvaluateConfig,
    epochs: int,
    seed: int,
) -> float:
    """Trains with AdamW and leaves the model with the weights of its best epoch by the validation clips.

    Args:
        groups: the optimizer's parameter groups; each one's "lr" is the peak of its schedule.
        config: batch_size, validate_every and recipe are used.
        seed: of the order and the variation of the clips.

    Returns:
        The best rate of right words on the validation clips, 0 to 1.
    """
    clips, labels = train
    device = labels.device
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    # A batch of one clip would have no batch statistics: batches are as even as possible, of at least two clips.
    batches = max(1, min(round(len(clips) / config.batch_size), len(clips) // 2))
    optimizer = torch.optim.AdamW(groups, weight_decay=config.recipe.weight_decay, fused=True)
    schedule = _make_schedule(optimizer, config.recipe, epochs * batches)
    best, best_state = -1.0, model.state_dict()
    for epoch in range(1, epochs + 1):
        model.train()
        for chosen in torch.randperm(len(clips), generator=generator).tensor_split(batches):
            inputs = data.training_inputs(clips[chosen], generator).to(device)
            loss = _loss(model, inputs, labels[chosen.to(device)], config.recipe, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.recipe.clip_norm)
            optimizer.step()
            schedule.step()
        last = epoch == epochs
        if last or (2 * epoch >= epochs and (epochs - epoch) % config.validate_every == 0):
            rate = (predict(model, data, "val") == val_labels.cpu()).float().mean().item()
            if rate >= best:
                best, best_state = rate, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    return best


def _make_schedule(
    optimizer: torch.optim.Optimizer, recipe: RecipeConfig, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rates = [group["lr"] for group in optimizer.param_groups]
    rise = 0.25 if steps == 5 else 0.2  # a rise of exactly one step would be a division by zero
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=rise, cycle_momentum=False
    )


def _loss(model: nn.Module, inputs: Tensor, labels: Tensor, recipe: RecipeConfig, generator: torch.Generator) -> Tensor:
    """Cross-entropy; with mixup each clip is blended with another, and both words count with the same shares."""
    if not recipe.mixup:
        return functional.cross_entropy(model(inputs).float(), labels, label_smoothing=recipe.label_smoothing)
    seed = int(torch.randint(0, 1 << 62, (), generator=generator))
    share = float(np.random.default_rng(seed).beta(recipe.mixup, recipe.mixup))
    partner = torch.randperm(len(labels), generator=generator).to(labels.device)
    logits = model(share * inputs + (1.0 - share) * inputs[partner]).float()
    first, second = (
        functional.cross_entropy(logits, words, label_smoothing=recipe.label_smoothing)
        for words in (labels, labels[partner])
    )
    return share * first + (1.0 - share) * second


@torch.inference_mode()
def predict(model: nn.Module, data: ClassifierData, split: HeldOutSplit) -> Tensor:
    """[clips] int64 on the CPU, the most probable word of each clip of a split; batch norms in eval mode."""
    model.eval()
    return torch.cat([model(inputs).argmax(1).cpu() for inputs in data.split_inputs(split)])
