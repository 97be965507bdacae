"""One optimiser step, as `pretrain` takes it and `bench-train` times it: gradients, learning rate, optimiser.

Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from avppc.clip import SAMPLES_PER_FRAME, ClipBatch
from avppc.draws import ClipGenerator
from avppc.models.backbones import use_activation_checkpointing
from avppc.models.batch_norm import frozen_statistics, synchronise_batch_norm
from avppc.tasks.base import ProxyTask, Representations, TaskOutput
from avppc.train.config import OptimizerConfig, PretrainConfig, ScaleConfig
from avppc.train.distributed import GradientAverager, Processes
from avppc.train.hardware import autocast, use_bf16
from avppc.train.log import SkippedSteps

Draws = Callable[[int], ClipGenerator]
"""The random draws for batch number i of a step's batches; the same number gives the same draws again."""
Autocast = Callable[[], contextlib.AbstractContextManager[object]]
"""Makes the context in which encoders and loss compute."""
Lap = Callable[[str], None]
"""Is told the name of each part of a step as it ends: "data", "forward", "backward" or "optimiser"."""


def no_lap(name: str) -> None:
    """For a step that nobody times."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves to be logged; the tensors stay on their device."""

    outputs: list[dict[str, Tensor]]
    """Loss and metrics of each loss."""
    learning_rate: float
    gradient_norm: Tensor
    """float32 [], before clipping."""
    skip: Tensor
    """float32 []: 1.0 if loss or gradient were not finite, so that the step changed nothing; else 0.0."""


class TrainingStep:
    """Gradients of a step's batches, clipped to a norm, and AdamW's update; a step that is not finite changes nothing.

    Args:
        skipped_before: steps that the run has skipped so far.
    """

    def __init__(
        self,
        config: PretrainConfig,
        task: ProxyTask,
        optimizer: torch.optim.AdamW,
        processes: Processes,
        skipped_before: int = 0,
    ) -> None:
        self._config, self._task, self._optimizer, self._processes = config, task, optimizer, processes
        context = partial(autocast, processes.device, use_bf16(config.precision, processes.device))
        count = slices_of(config, task, processes)
        slices = None if count is None else BatchSlices(task, count, context)
        gradients = GradientComputer(task, GradientAverager(task.parameters(), processes), context, slices)
        self._compute = gradients.cached if config.scale.cached_negatives else gradients.separate
        clips = processes.share(config.batch_size) * config.accumulate
        self.skipped = SkippedSteps(task, clips, skipped_before, processes.device)
        """Counts the steps that were skipped, and knows their clips."""

    def take(self, number: int, batches: Iterator[ClipBatch], lap: Lap = no_lap) -> StepResult:
        """Takes step `number`, counted from 0, on the next config.accumulate batches."""
        rate = learning_rate_at(number, self._config.steps, self._config.optimizer)
        set_learning_rate(self._optimizer, rate)
        self.skipped.save_statistics()
        draws = partial(_draws, self._config, self._processes, number)
        outputs, clip_ids = self._compute(batches, self._config.accumulate, draws, lap)
        norm = torch.nn.utils.clip_grad_norm_(self._task.parameters(), self._config.optimizer.clip_norm)
        skip = self.skipped.check(norm, number + 1, clip_ids)
        step_unless(skip, self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)
        lap("optimiser")
        return StepResult(outputs, rate, norm, skip)


def _draws(config: PretrainConfig, processes: Processes, step: int, part: int) -> ClipGenerator:
    """The draws of one batch of one step; also seeds torch's own generator, for dropout."""
    sequence = np.random.SeedSequence([config.seed, step])
    state, dropout = (int(word >> np.uint64(1)) for word in sequence.generate_state(2, np.uint64))
    torch.manual_seed((dropout + part * processes.size + processes.rank) % (1 << 63))
    own = processes.share(config.batch_size)
    return ClipGenerator(state, part * config.batch_size + processes.rank * own, own)


Gradients = tuple[list[dict[str, Tensor]], Tensor]
"""Loss and metrics of each loss of a step, and the ids [n] of this process's clips."""


@dataclass(frozen=True)
class GradientComputer:
    """Computes the gradients of a step into the task's parameters, averaged over processes."""

    task: ProxyTask
    averager: GradientAverager
    autocast: Autocast
    slices: BatchSlices | None = None
    """How a batch passes through the encoders in slices; None: whole."""

    def separate(self, batches: Iterator[ClipBatch], parts: int, draws: Draws, lap: Lap = no_lap) -> Gradients:
        """The mean of `parts` losses, each of one batch."""
        outputs, ids = [], []
        for part in range(parts):
            batch = next(batches)
            lap("data")
            if part == parts - 1:
                self.averager.arm()
            if self.slices is None:
                output = self._whole(batch, draws(part), parts, lap)
            else:
                output = self.slices.backward(batch, draws(part), parts, lap)
            lap("backward")
            outputs.append(_loss_and_metrics(output))
            ids.append(batch.clip_ids)
        self.averager.finish()
        lap("backward")
        return outputs, torch.cat(ids)

    def _whole(self, batch: ClipBatch, generator: ClipGenerator, parts: int, lap: Lap) -> TaskOutput:
        with self.autocast():
            output = self.task(batch, generator)
        lap("forward")
        _backward(output.loss, parts)
        return output

    def cached(self, batches: Iterator[ClipBatch], parts: int, draws: Draws, lap: Lap = no_lap) -> Gradients:
        """One loss over the clips of `parts` batches, with the activations of one batch at a time.

        First the representations of all clips are computed, and nothing else is kept; then the loss from them and its
        gradients with respect to them. Then each batch passes through the encoders again, with the same draws, and
        its share of these gradients is passed back.

        Reference: Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
        2021.
        """
        held = [next(batches) for _ in range(parts)]
        lap("data")
        with torch.no_grad(), frozen_statistics(self.task):
            pieces = [self._represent(batch, draws(part)) for part, batch in enumerate(held)]
        whole = [_join(column) for column in zip(*pieces, strict=True)]
        with self.autocast():
            output = self.task.score(whole, _numbers_of(held))
        lap("forward")
        _backward(output.loss, 1)
        start = 0
        for part, batch in enumerate(held):
            rows = slice(start, start + len(batch))
            start = rows.stop
            again = self._represent(batch, draws(part))
            torch.autograd.backward(*_with_gradients(again, whole, rows))
        self.averager.finish()
        lap("backward")
        return [_loss_and_metrics(output)], torch.cat([batch.clip_ids for batch in held])

    def _represent(self, batch: ClipBatch, generator: ClipGenerator) -> Representations:
        with self.autocast():
            return self.task.represent(batch, generator)


class BatchSlices:
    """Passes a batch through the encoders in slices, side by side; the loss is that of the whole batch.

    Slices meet twice a step. Threads that share each operator meet at its end, some thousand times a step, and each
    time all wait for the one that another program holds up.

    A slice has a copy of the task that shares its parameters but not its running statistics: each batch norm normalises
    over the slice, and the statistics after the step are the mean of the copies'. Gradients are added up in the order
    of the slices: what comes out depends on their number, not on the threads' timing.

    Args:
        task: with `represent` and `score`.
        count: slices of a batch, at most its clips.

    Reference: Hoffer, Hubara, Soudry, "Train longer, generalize better", NeurIPS 2017 (ghost batch norm).
    """

    def __init__(self, task: ProxyTask, count: int, autocast: Autocast) -> None:
        self._task, self._autocast = task, autocast
        self._parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
        shared = {id(parameter): parameter for parameter in task.parameters()}
        self._copies = [copy.deepcopy(task, dict(shared)) for _ in range(count)]
        threads = torch.get_num_threads()
        own = (max(1, threads // count),)
        self._pool = ThreadPoolExecutor(min(count, threads), "slice", torch.set_num_threads, own)

    def backward(self, batch: ClipBatch, generator: ClipGenerator, parts: int, lap: Lap) -> TaskOutput:
        """The loss of a batch; adds the gradients of loss / parts to the parameters'."""
        bounds = [len(batch) * number // len(self._copies) for number in range(len(self._copies) + 1)]
        rows = [slice(first, end) for first, end in itertools.pairwise(bounds)]
        for each in self._copies:
            for module, original in zip(each.modules(), self._task.modules(), strict=True):
                module.training = original.training
            for own, kept in zip(each.buffers(), self._task.buffers(), strict=True):
                own.copy_(kept)
        pieces = list(self._pool.map(partial(self._represent, batch, generator), self._copies, rows))
        whole = [_join(column) for column in zip(*pieces, strict=True)]
        with self._autocast():
            output = self._task.score(whole, _numbers_of([batch]))
        lap("forward")
        _backward(output.loss, parts)
        gradients = list(self._pool.map(partial(self._gradients, whole), pieces, rows))
        for parameter, terms in zip(self._parameters, zip(*gradients, strict=True), strict=True):
            for term in terms:
                if term is not None:
                    parameter.grad = term if parameter.grad is None else parameter.grad.add_(term)
        self._take_statistics()
        return output

    def _represent(self, batch: ClipBatch, generator: ClipGenerator, task: ProxyTask, rows: slice) -> Representations:
        with self._autocast():
            return task.represent(batch[rows], generator.of(rows))

    def _gradients(
        self, whole: Sequence[Tensor | None], pieces: Representations, rows: slice
    ) -> tuple[Tensor | None, ...]:
        """Of each of the task's parameters, through the representations of a slice."""
        outputs, upstream = _with_gradients(pieces, whole, rows)
        return torch.autograd.grad(outputs, self._parameters, upstream, allow_unused=True)

    @torch.no_grad()
    def _take_statistics(self) -> None:
        for kept, *copies in zip(self._task.buffers(), *(each.buffers() for each in self._copies), strict=True):
            kept.copy_(torch.stack(copies).mean(0) if kept.is_floating_point() else copies[0])


def slices_of(config: PretrainConfig, task: ProxyTask, processes: Processes) -> int | None:
    """How many slices a batch is cut into; None where it passes whole: ScaleConfig.batch_slices says when."""
    scale = config.scale
    changed = scale.cached_negatives or scale.activation_checkpointing or scale.compile
    alone = processes.size == 1 and processes.device.type == "cpu"
    fits = alone and not changed and task.has_representations and 1 < scale.batch_slices <= config.batch_size
    return scale.batch_slices if fits else None


def _with_gradients(
    pieces: Representations, whole: Sequence[Tensor | None], rows: slice
) -> tuple[list[Tensor], list[Tensor]]:
    """The representations of these rows, and the gradients that the loss of the whole batch left for them."""
    pairs = [
        (piece, joined.grad[rows])
        for piece, joined in zip(pieces, whole, strict=True)
        if piece is not None and joined is not None and joined.grad is not None
    ]
    return [piece for piece, _ in pairs], [gradient for _, gradient in pairs]


def _backward(loss: Tensor, parts: int) -> None:
    """Adds the gradients of loss / parts; if it is not finite they are all NaN, on every process."""
    share = torch.full_like(loss, 1.0 / parts)
    loss.backward(torch.where(loss.isfinite(), share, torch.nan))


def _loss_and_metrics(output: TaskOutput) -> dict[str, Tensor]:
    return {"loss": output.loss.detach(), **output.metrics}


def _join(column: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [piece.detach() for piece in column if piece is not None]
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
        use_activation_checkpointing(task)
    if config.compile:
        for name in ("video_encoder", "audio_encoder"):
            encoder = getattr(task, name, None)
            if isinstance(encoder, nn.Module):
                encoder.compile()
    return task
