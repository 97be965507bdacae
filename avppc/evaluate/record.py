"""What a pretraining run left behind, as numbers: its settings, its curves, and its lip-reading rows.

And what writes them down: templates and shell commands, as the report, the table and the model card have them.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from avppc.clip import CLIP_FRAMES
from avppc.evaluate.lipreading.results import RowResult, read_rows
from avppc.losses.subtasks import SUBTASKS, SubTask, modality_group
from avppc.settings import config_to_dict, read_checked_json
from avppc.tasks.registry import make_task
from avppc.tasks.visual import VisualMomentTask
from avppc.train.config import PretrainConfig
from avppc.train.log import METRICS_FILE, read_metrics
from avppc.train.run_folder import ENVIRONMENT_FILE, TASK_FILE, read_run_config

FINAL_ENTRIES = 5
"""So many of the last entries of the log are averaged for "the end of training"."""

PALETTE = {
    "ink": ("#1d2126", "#e4e7ea"),
    "soft": ("#5f6872", "#98a2ad"),
    "line": ("#dce0e5", "#333a42"),
    "page": ("#fefefe", "#14171b"),
    "panel": ("#f5f6f8", "#1c2026"),
    "accent": ("#2560a8", "#6fabf0"),
    "second": ("#bf6516", "#e8a15e"),
    "third": ("#2a8a6c", "#56c09c"),
    "fourth": ("#8356a5", "#bb99da"),
    "on-accent": ("#fffffe", "#0e1216"),
}
"""Colours by name, for a light and a dark page; the page defines them as CSS variables."""

_LINE_LENGTH = 100

Array = NDArray[np.float64]
_BY_NAME = {subtask.name: subtask for subtask in SUBTASKS}
_MODALITY_TITLES = {"between": "between modalities", "within": "within one modality", "mixed": "mixed"}


def mean_of_finite(values: Array, axis: int) -> Array:
    """The mean along an axis without the NaNs; NaN if there is nothing else."""
    finite = np.isfinite(values)
    counts = finite.sum(axis)
    sums = np.where(finite, values, 0.0).sum(axis)
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0)


@dataclass(frozen=True)
class Metrics:
    """The log of a training, metrics.jsonl, as arrays over its entries; what is missing or was not finite is NaN."""

    path: Path
    entries: Sequence[Mapping[str, Any]]
    """One for each step that was logged, a line of the file."""
    names: Mapping[str, Sequence[str]]
    """For each metric that is a list, such as the losses of the sub-tasks, the names of its values; from task.json."""

    @property
    def steps(self) -> Array:
        """[R] steps done when each entry was written."""
        return np.array([entry["step"] for entry in self.entries], np.float64)

    def column(self, name: str) -> Array:
        """[R] values of a metric that is one number an entry."""
        return np.array([_number(entry.get(name)) for entry in self.entries], np.float64)

    def table(self, name: str) -> Array:
        """[R, K] values of a metric that is a list; ValueError, naming the file, if an entry has another length."""
        names = self.names.get(name, ())
        table = np.full((len(self.entries), len(names)), np.nan)
        for values, entry in zip(table, self.entries, strict=True):
            given = entry.get(name)
            if given is None:
                continue
            if not isinstance(given, list) or len(given) != len(names):
                raise ValueError(
                    f"{self.path}: {name} of step {entry['step']} must hold {len(names)} values, as {TASK_FILE} says"
                )
            values[:] = [_number(value) for value in given]
        return table


def _number(value: Any) -> float:
    if isinstance(value, int) and abs(value) > 1 << 53:  # a float may not hold it
        return float("nan")
    return float(value) if isinstance(value, (int, float)) else float("nan")


@dataclass(frozen=True)
class RunRecord:
    """What the files of a run say of it; `rows` are those of the lip-reading table."""

    run: Path
    config: PretrainConfig
    environment: dict[str, Any] | None
    metrics: Metrics
    rows: list[RowResult]

    @property
    def steps_done(self) -> int:
        """The last logged step, 0 before the first."""
        return int(self.metrics.steps[-1]) if self.metrics.entries else 0

    @property
    def finished(self) -> bool:
        """Whether the last step was logged."""
        return self.steps_done >= self.config.steps

    @property
    def candidates(self) -> int:
        """N, the targets among which each context must find its own; fewer in several processes with `gather none`.

        Of pictures alone by moments, those of a clip; moments with sound have their clip's own beside the N.
        """
        if self.config.task == "visual-permutative" and self.config.objective.moments != "none":
            task = make_task(self.config.task, self.config)
            if isinstance(task, VisualMomentTask):
                return task.count_moments(CLIP_FRAMES - self.config.augment.time_jitter_frames)
        parts = self.config.accumulate if self.config.scale.cached_negatives else 1
        times = 2 if self.config.objective.negatives == "same-clip" else 1  # each target's other time counts, too
        return self.config.batch_size * parts * times

    @property
    def training_seconds(self) -> float:
        """Seconds that the logged steps took, from their clips and their clips a second."""
        steps = np.diff(self.metrics.steps, prepend=0.0)
        clips = steps * self.config.batch_size * self.config.accumulate
        speeds = self.metrics.column("clips_per_second")
        return float(np.divide(clips, speeds, out=np.zeros_like(clips), where=speeds > 0).sum())

    @property
    def groups(self) -> list[list[RowResult]]:
        """The rows of the lip-reading table in groups of one number of labels; all labels come last."""
        return [list(rows) for _, rows in itertools.groupby(self.rows, lambda row: row.labels_per_word)]

    @cached_property
    def subtasks(self) -> list[SubTask]:
        """The permutative sub-tasks in the order of the log; empty if the run's task has none."""
        names = self.metrics.names.get("task_accuracy", ())
        return [_BY_NAME[name] for name in names] if all(name in _BY_NAME for name in names) else []

    @cached_property
    def task_loss(self) -> Array:
        """[R, K] losses of the sub-tasks."""
        return self.metrics.table("task_loss")

    @cached_property
    def task_accuracy(self) -> Array:
        """[R, K] accuracies of the sub-tasks, 0 to 1."""
        return self.metrics.table("task_accuracy")

    def final(self, table: Array) -> Array:
        """[K] means of an [R, K] table over its last entries."""
        return mean_of_finite(table[-FINAL_ENTRIES:], 0)

    @property
    def final_steps(self) -> tuple[int, int]:
        """First and last step that `final` averages over."""
        steps = [0, *self.metrics.steps.astype(int).tolist()]
        return steps[max(len(steps) - FINAL_ENTRIES - 1, 0)] + 1, steps[-1]


def read_record(run: Path) -> RunRecord:
    """What there is of a run in its directory.

    Raises:
        FileNotFoundError: the directory is not there or holds no run.
        ValueError: a file of the run is damaged; the text names it.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not a directory: run must be the directory of a pretraining run")
    config = read_run_config(run)
    return RunRecord(
        run=run,
        config=config,
        environment=_read_object(run / ENVIRONMENT_FILE),
        metrics=Metrics(run / METRICS_FILE, read_metrics(run), _read_names(run / TASK_FILE)),
        rows=read_rows(run),
    )


def _read_names(path: Path) -> dict[str, list[str]]:
    names = _read_object(path) or {}
    for metric, entries in names.items():
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"{path}: {metric} must hold names, got {entries!r}")
    return names


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    value = read_checked_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def group_by_size(subtasks: Sequence[SubTask]) -> dict[str, list[int]]:
    """The sub-tasks by how many elements predict how many: {"1 → 2": their numbers}."""
    return _group([f"{len(subtask.inputs)} → {len(subtask.targets)}" for subtask in subtasks])


def group_by_modality(subtasks: Sequence[SubTask]) -> dict[str, list[int]]:
    """The sub-tasks by whether they predict one modality from the other, from itself or from both: {group: numbers}."""
    return _group([_MODALITY_TITLES[modality_group(subtask)] for subtask in subtasks])


def _group(labels: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        groups.setdefault(label, []).append(number)
    return groups


def page_environment(folder: Path = Path(__file__).parent, *, html: bool = True) -> jinja2.Environment:
    """jinja2's environment for the templates in a folder; a value that a template names but is not given is an error.

    Templates of other folders may include the style of every page.

    Args:
        html: escapes the values for HTML; other texts, such as Markdown, get them as they are.
    """
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def changed_settings(config: Any, default: Any) -> dict[str, Any]:
    """The settings of `config` that differ from those of `default`: {dotted name: value of `config`}."""
    ours, theirs = _flat(config_to_dict(config)), _flat(config_to_dict(default))
    return {name: value for name, value in ours.items() if value != theirs[name]}


def command_line(command: str, settings: Mapping[str, Any]) -> str:
    """The shell command that runs `avppc COMMAND` with these settings; a long one goes over several lines.

    Args:
        settings: {dotted name: value}, a flag each.
    """
    lines = [f"avppc {command}"]
    for name, value in settings.items():
        flag = shlex.join(_flag(name.replace("_", "-"), value))
        if len(lines[-1]) + len(flag) > _LINE_LENGTH:
            lines.append("   ")
        lines[-1] += f" {flag}"
    return " \\\n".join(lines)


def _flag(name: str, value: Any) -> list[str]:
    """One flag as words of a command line: --name and its values, or --name / --no-name for a boolean."""
    parent, dot, leaf = name.rpartition(".")
    if isinstance(value, bool):
        return [f"--{parent}{dot}{'' if value else 'no-'}{leaf}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
