"""What a run reports of itself: progress bar, train.log, metrics.jsonl; skipped steps and their clips."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avppc.data.packed.dataset import Clips
from avppc.draws import ClipGenerator
from avppc.files import LineFile, read_bytes, read_json_objects, write_atomically, write_json_lines
from avppc.printing import Console, ProgressBar, as_line, one_line
from avppc.settings import config_to_dict
from avppc.tasks.base import ProxyTask
from avppc.train.config import PretrainConfig
from avppc.train.distributed import Processes
from avppc.train.events import EVENTS_FOLDER, EventLog, wandb_sync

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
LOG_FILE = "train.log"
SKIPPED_FILE = "skipped_clips.jsonl"
_TOLD = 8  # skipped steps whose clips are remembered until they are read
_SLOTS = _TOLD + 1  # one more for a good step, which is written, too, and overwritten by the next bad one
_COUNT = "count"


class Meter:
    """Running means of tensors that stay on their device: adding one costs no synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], skipped: Tensor | None = None) -> None:
        """Adds values, unless `skipped` (0-d) is 1."""
        one = torch.ones((), device=next(iter(values.values())).device)
        weight = one if skipped is None else 1.0 - skipped
        for name, value in {**values, _COUNT: one}.items():
            # Not a product: skipped values may be NaN.
            value = torch.where(weight > 0, value.detach().float(), 0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self, add_up: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, Any]:
        """The means as numbers or lists; NaN if all values were skipped. The meter starts anew.

        Args:
            add_up: returns the sum over processes.
        """
        sums = {name: add_up(total) for name, total in self._sums.items()}
        self._sums = {}
        count = sums.pop(_COUNT)
        return {name: (total / count).tolist() for name, total in sums.items()}


class MetricsLog:
    """metrics.jsonl, one JSON object a logged step, and the same numbers as TensorBoard events."""

    def __init__(self, run: Path, first_step: int) -> None:
        """Lines of steps after first_step are dropped: they will be written again."""
        self.path = run / METRICS_FILE
        rows = [row for row in read_metrics(run) if row["step"] <= first_step]
        write_json_lines(self.path, rows)
        self._file = LineFile(self.path)
        self._events = EventLog(run / EVENTS_FOLDER, first_step)

    def write(self, row: Mapping[str, Any], groups: Mapping[str, float] | None = None) -> None:
        """Writes a row; values that JSON lacks (NaN, infinities) become null. The groups go to TensorBoard alone.

        What a full disk has no room for is written later, if there is room again; the log says so.
        """
        clean = {name: _finite_or_none(value) for name, value in row.items()}
        try:
            self._file.add(json.dumps(clean, allow_nan=False))
        except OSError as error:  # a full disk must not end the training
            logger.warning("the metrics of step %d could not be written to %s: %s", row["step"], self.path, error)
        self._events.write({**row, **{f"accuracy/{name}": share for name, share in (groups or {}).items()}})

    def close(self) -> None:
        """Writes what is still held back, and closes the files."""
        try:
            self._file.close()
        except OSError as error:
            logger.warning("the last metrics could not be written to %s: %s", self.path, error)
        self._events.close()


class TextLog:
    """train.log: what a run says of itself, a line each behind the time of day, for `tail -f` and for later.

    A run that is resumed goes on below what is there. Every line is whole: what a kill has cut short is taken away.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / LOG_FILE
        before = read_bytes(self.path) if self.path.exists() else b""
        if before and not before.endswith(b"\n"):
            write_atomically(self.path, before[: before.rfind(b"\n") + 1])
        self._file = LineFile(self.path)

    def write(self, text: str) -> None:
        """Writes one line; what a full disk has no room for is written later, as of the metrics."""
        try:
            self._file.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {as_line(text)}")
        except OSError as error:  # a full disk must not end the training
            logger.warning("a line could not be written to %s: %s", self.path, error)

    def close(self) -> None:
        """Writes what is still held back, and closes the file."""
        try:
            self._file.close()
        except OSError as error:
            logger.warning("the last lines could not be written to %s: %s", self.path, error)


class RunLog(contextlib.ExitStack):
    """All that the process says that logs, in files and with the progress bar; for the others it does nothing.

    A context manager: an error that ends the run is the last line of train.log.
    """

    def __init__(self, config: PretrainConfig, done: int, main: bool) -> None:
        super().__init__()
        self._main, self._steps = main, config.steps
        if not main:
            return
        with contextlib.ExitStack() as opened:  # closes what is open where the next cannot be opened
            if config.logger == "wandb":
                opened.enter_context(wandb_sync(config.out, config_to_dict(config)))
            self._metrics = opened.enter_context(contextlib.closing(MetricsLog(config.out, done)))
            self._text = opened.enter_context(contextlib.closing(TextLog(config.out)))
            self._console = Console(stderr=True, soft_wrap=True)
            self._bar = opened.enter_context(
                ProgressBar("pretrain", config.steps, "steps", done=done, console=self._console)
            )
            self.push(opened.pop_all())
            self.push(self._tell_of_end)  # before the files are closed

    def say(self, text: str) -> None:
        """A line in train.log, and above the progress bar."""
        if self._main:
            self._console.print(text)
            self._text.write(text)

    def write(self, row: Mapping[str, Any], groups: Mapping[str, float], text: str) -> None:
        """Writes a row of metrics; a text about it goes to train.log and is shown with the progress.

        Args:
            groups: means over groups of a metric that has many entries, for TensorBoard, which draws single numbers.
        """
        if self._main:
            self._metrics.write(row, groups)
            self._text.write(f"step {row['step']} of {self._steps}  {text}  rate {row['learning_rate']:.2e}")
            self._bar.show(text)

    def count_step(self) -> None:
        """Moves the bar by one step."""
        if self._main:
            self._bar.advance()

    def _tell_of_end(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._text.write(one_line(error))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a line that is not one (cut short by a kill, say) is left out."""
    rows = read_json_objects(run / METRICS_FILE)
    return [row for row in rows if isinstance(row.get("step"), int) and 0 <= row["step"] < 1 << 53]


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Stopwatch:
    """Seconds since it was last read."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """The seconds; counts anew from here."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds


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

    def __init__(self, run: Path, dataset: Clips, task: ProxyTask, processes: Processes) -> None:
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
