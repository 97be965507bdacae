"""The gradients of one optimiser step, from its batches; nothing here waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from avppc.clip import SAMPLES_PER_FRAME, ClipBatch
from avppc.draws import ClipGenerator
from avppc.models.batch_norm import frozen_statistics
from avppc.tasks.base_protocol import ProxyTask, Representations, TaskOutput
from avppc.train.distributed_gradients import GradientAverager

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
