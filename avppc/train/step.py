"""One optimiser step: the task on its device, the optimiser and its learning rate, the gradients of the step's batches.

Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from avppc.clip import SAMPLES_PER_FRAME, ClipBatch
from avppc.draws import ClipGenerator
from avppc.models.backbones import checkpoint_blocks
from avppc.models.batch_norm import frozen_statistics, synchronise_batch_norm
from avppc.tasks.base import ProxyTask, Representations, TaskOutput
from avppc.train.config import OptimizerConfig, ScaleConfig
from avppc.train.distributed import GradientAverager, Processes

Draws = Callable[[int], ClipGenerator]
"""The draws for part `number` of a step; the same number gives the same draws again."""


@dataclass(frozen=True)
class StepResult:
    """The result of a step's losses."""

    outputs: list[dict[str, Tensor]]
    """Loss and metrics of each loss."""
    clip_ids: Tensor
    """[n] of all clips of this process."""


@dataclass(frozen=True)
class GradientComputer:
    """Computes the gradients of a step into the task's parameters, averaged over processes."""

    task: ProxyTask
    averager: GradientAverager
    autocast: Callable[[], contextlib.AbstractContextManager[object]]

    def separate(self, batches: Iterator[ClipBatch], parts: int, draws: Draws) -> StepResult:
        """The mean of `parts` losses, each of one batch."""
        outputs, ids = [], []
        for part in range(parts):
            batch = next(batches)
            with self.autocast():
                output = self.task(batch, draws(part))
            if part == parts - 1:
                self.averager.arm()
            _backward(output.loss, parts)
            outputs.append(_figures(output))
            ids.append(batch.clip_ids)
        self.averager.finish()
        return StepResult(outputs, torch.cat(ids))

    def cached(self, batches: Iterator[ClipBatch], parts: int, draws: Draws) -> StepResult:
        """One loss over the clips of `parts` batches, with the activations of one batch at a time.

        First the representations of all clips are computed, and nothing else is kept; then the loss from them and its
        gradients with respect to them. Then each batch passes through the encoders again, with the same draws, and
        its share of these gradients is passed back.

        Reference: Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
        2021.
        """
        held = [next(batches) for _ in range(parts)]
        with torch.no_grad(), frozen_statistics(self.task):
            pieces = [self._represent(batch, draws(part)) for part, batch in enumerate(held)]
        whole = [_join(column) for column in zip(*pieces, strict=True)]
        with self.autocast():
            output = self.task.score(whole, _numbers_of(held))
        _backward(output.loss, 1)
        start = 0
        for part, batch in enumerate(held):
            rows = slice(start, start + len(batch))
            start = rows.stop
            again = self._represent(batch, draws(part))
            pairs = [
                (piece, joined.grad[rows])
                for piece, joined in zip(again, whole, strict=True)
                if piece is not None and joined is not None and joined.grad is not None
            ]
            torch.autograd.backward([piece for piece, _ in pairs], [gradient for _, gradient in pairs])
        self.averager.finish()
        return StepResult([_figures(output)], torch.cat([batch.clip_ids for batch in held]))

    def _represent(self, batch: ClipBatch, generator: ClipGenerator) -> Representations:
        with self.autocast():
            return self.task.represent(batch, generator)


def _backward(loss: Tensor, parts: int) -> None:
    """Adds the gradients of loss / parts; if it is not finite they are all NaN, on every process."""
    share = torch.full_like(loss, 1.0 / parts)
    loss.backward(torch.where(loss.isfinite(), share, torch.nan))


def _figures(output: TaskOutput) -> dict[str, Tensor]:
    return {"loss": output.loss.detach(), **output.metrics}


def _join(column: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [piece for piece in column if piece is not None]
    return torch.cat(present).requires_grad_() if present else None


def _numbers_of(batches: list[ClipBatch]) -> ClipBatch:
    """All clips as one batch, with one pixel and one frame each: a loss from representations needs no more."""
    return ClipBatch(
        video=torch.cat([batch.video[:, :1, :1, :1] for batch in batches]),
        audio=torch.cat([batch.audio[:, :SAMPLES_PER_FRAME] for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        clip_ids=torch.cat([batch.clip_ids for batch in batches]),
        speakers=torch.cat([batch.speakers for batch in batches]),
    )


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


def prepare_model(task: ProxyTask, config: ScaleConfig, processes: Processes) -> ProxyTask:
    """The task on the processes' device, changed as the settings say; its state_dict stays the same."""
    task.to(processes.device)
    if processes.size > 1 and config.sync_batch_norm:
        task = cast("ProxyTask", synchronise_batch_norm(task))
    if config.activation_checkpointing:
        checkpoint_blocks(task)
    if config.compile:
        for name in ("video_encoder", "audio_encoder"):
            encoder = getattr(task, name, None)
            if isinstance(encoder, nn.Module):
                encoder.compile()
    return task
