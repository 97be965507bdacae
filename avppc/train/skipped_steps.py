"""Steps whose loss or gradient is not finite: they are skipped and counted on the device, and their clips named."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avppc.data.packed.dataset import PackedDataset
from avppc.draws import ClipGenerator
from avppc.files import LineFile
from avppc.tasks.base import ProxyTask
from avppc.train.distributed import Processes

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped_clips.jsonl"
_TOLD = 8  # skipped steps whose clips are remembered until they are read
_SLOTS = _TOLD + 1  # one more for a good step, which is written, too, and overwritten by the next bad one


class SkippedSteps:
    """Finds the steps whose gradient has no finite norm, the same on all processes, and undoes what they changed.

    Flags, counts and clip ids stay on the device until `counts` or `new` reads them, so that no step waits for it.

    Args:
        clips: number of clips of a step on this process.
        total: steps that the run has skipped before.
    """

    def __init__(self, model: nn.Module, clips: int, total: int, device: torch.device) -> None:
        self._buffers = [value for value in model.buffers() if value.is_floating_point()]
        self._saved: Tensor | None = None
        self._total = torch.tensor(total, device=device)
        self._in_row = torch.zeros_like(self._total)
        self._clips = torch.zeros(_SLOTS, clips, dtype=torch.int64, device=device)
        self._steps = torch.zeros(_SLOTS, dtype=torch.int64, device=device)
        self._reported = total

    def save_statistics(self) -> None:
        """Call before the forward pass: keeps the running statistics, which a bad step would spoil."""
        if self._buffers:
            self._saved = torch.cat([value.flatten() for value in self._buffers])

    def check(self, norm: Tensor, step: int, clip_ids: Tensor) -> Tensor:
        """float32 []: 1.0 if the step is to be skipped, else 0.0; running statistics of a skipped one are put back."""
        bad = ~norm.isfinite()
        slot = (self._total % _SLOTS)[None]
        self._clips.index_copy_(0, slot, clip_ids[None])
        self._steps.index_fill_(0, slot, step)
        self._total += bad
        self._in_row = (self._in_row + 1) * bad
        if self._saved is not None:
            now = torch.cat([value.flatten() for value in self._buffers])
            parts = torch.where(bad, self._saved, now).split([value.numel() for value in self._buffers])
            for value, part in zip(self._buffers, parts, strict=True):
                value.copy_(part.view_as(value))
        return bad.float()

    def counts(self) -> tuple[int, int]:
        """Skipped steps: in all, and in a row up to now; waits for the device."""
        total, in_row = torch.stack([self._total, self._in_row]).tolist()
        return total, in_row

    def new(self, total: int) -> tuple[int, list[tuple[int, list[int]]]]:
        """How many were skipped since the last call, and (step, clip ids) of the last 8 of them, oldest first."""
        count = total - self._reported
        self._reported = total
        slots = [number % _SLOTS for number in range(total - min(count, _TOLD), total)]
        return count, [(int(self._steps[slot]), self._clips[slot].tolist()) for slot in slots]


class SkippedReport:
    """Names the clips of skipped steps in RUN/skipped_clips.jsonl."""

    def __init__(self, run: Path, dataset: PackedDataset, task: ProxyTask, processes: Processes) -> None:
        self.path = run / SKIPPED_FILE
        self._dataset, self._task, self._processes = dataset, task, processes
        self._rows: dict[int, int] | None = None

    def write(self, skipped: list[tuple[int, list[int]]]) -> str:
        """Adds a line a step, on all processes together; returns a sentence on which clips are to blame.

        A task that has no features of single clips, only of batches, has no suspects: null in the file.
        """
        suspects: list[str] = []
        looks, diverged = self._task.has_representations, False
        for step, ids in skipped:
            # On the CPU or the GPU, whichever the processes' group connects.
            every = self._processes.gather(torch.tensor(ids, device=self._processes.device)).flatten().tolist()
            line = {"step": step, "suspects": None, "clips": list(map(self._source, every))}
            if looks:
                wrong = self._processes.gather(self._spoiled(ids).byte()).flatten().tolist()
                named = [self._source(clip) for clip, is_wrong in zip(every, wrong, strict=True) if is_wrong]
                line["suspects"] = named
                diverged = diverged or len(named) == len(every)
                suspects += [name for name in named if name not in suspects]
            if self._processes.main:
                self._write_line(line)
        if not looks:
            return "which clip is to blame cannot be told for this task"
        if diverged:
            return "no clip gives finite features any more: the weights have diverged"
        if suspects:
            return f"by themselves these give features that are not finite: {', '.join(suspects[:5])}"
        return "each clip by itself gives finite features"

    def _write_line(self, line: dict[str, Any]) -> None:
        try:
            with contextlib.closing(LineFile(self.path)) as file:
                file.add(json.dumps(line))
        except OSError as error:  # a full disk must not end the training
            logger.warning("the clips of the skipped step %d could not be written: %s", line["step"], error)

    def _spoiled(self, ids: list[int]) -> Tensor:
        """[n] bool: clips whose features are not finite, in eval mode, where no clip touches another."""
        rows = torch.tensor([self._row(clip) for clip in ids])
        batch = self._dataset.batch(rows).to(self._processes.device)
        training = self._task.training
        self._task.eval()
        with torch.no_grad():
            pieces = self._task.represent(batch, ClipGenerator(0, 0, len(ids)))
        self._task.train(training)
        finite = [piece.isfinite().flatten(1).all(1) for piece in pieces if piece is not None]
        return ~torch.stack(finite).all(0)

    def _row(self, clip_id: int) -> int:
        if self._rows is None:
            self._rows = {number: row for row, number in enumerate(self._dataset.clip_ids.tolist())}
        return self._rows[clip_id]

    def _source(self, clip_id: int) -> str:
        return self._dataset.sources[self._row(clip_id)]
