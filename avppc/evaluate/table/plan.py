"""The parts of a table: entries (rows), runs to pretrain, and cells to measure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from avppc.evaluate.config import HeadName, RowName, TableConfig
from avppc.settings import config_from_dict, config_to_dict, current_name
from avppc.tasks.registry import TASKS
from avppc.train.config import PretrainConfig

BASELINES: tuple[RowName, ...] = ("random", "supervised")


@dataclass(frozen=True)
class Entry:
    """A row of the table: a proxy task, with the settings that are given for it alone."""

    text: str
    """As given: "TASK" or "TASK:NAME=VALUE;..."."""

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.text.partition(":")[0]

    @property
    def title(self) -> str:
        """The task as tables call it, with its settings in brackets."""
        _, _, settings = self.text.partition(":")
        return TASKS[self.task].title + (f" ({settings.replace(';', ', ')})" if settings else "")

    @property
    def folder(self) -> str:
        """A name for files; a long one ends with a checksum of what was cut off."""
        name = re.sub(r"[^A-Za-z0-9.=-]+", "_", self.text)
        return name if len(name) <= 80 else f"{name[:70]}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    def settings(self) -> Iterator[tuple[list[str], Any]]:
        """(names from the outermost in, value) of each setting; ValueError if the text is not a setting."""
        _, _, text = self.text.partition(":")
        for part in filter(None, text.split(";")):
            name, equals, value = part.partition("=")
            if not equals:
                raise ValueError(f"tasks: {part!r} of {self.text!r} must be NAME=VALUE")
            try:
                yield name.strip().split("."), json.loads(value)
            except json.JSONDecodeError:
                yield name.strip().split("."), value

    def pretraining(self, table: TableConfig, seed: int) -> PretrainConfig:
        """The settings of its pretraining with a seed; ValueError for a setting that pretraining does not have."""
        config = PretrainConfig.from_preset(table.preset, table.data, table.out / "runs" / f"{self.folder}-seed{seed}")
        config = replace(config, device=table.device, threads=table.threads, steps=table.steps or config.steps)
        values = {**config_to_dict(config), "task": self.task, "seed": seed}
        for (first, *others), value in self.settings():
            names, place = [current_name(PretrainConfig, first), *others], values
            for name in names[:-1]:
                place = place.get(name)  # type: ignore[assignment]  # checked next
                if not isinstance(place, dict):
                    raise ValueError(f"tasks: {self.text!r}: pretraining has no setting {'.'.join(names)!r}")
            place[names[-1]] = value
        return config_from_dict(PretrainConfig, values, f"tasks: {self.text!r}")


@dataclass(frozen=True)
class Cell:
    """One measurement: which encoder, how it is used, under which head, and with how many labels."""

    row: RowName
    entry: Entry | None
    """None: a baseline, which does not depend on pretraining."""
    seed: int
    head: HeadName
    labels_per_word: int

    def directory(self, table: TableConfig) -> Path:
        """The directory whose folder evaluation/ holds the result."""
        name = "baselines" if self.entry is None else f"{self.entry.folder}-seed{self.seed}"
        return table.out / "cells" / name / self.head

    @property
    def group(self) -> tuple[bool, int]:
        """Equal for cells that differ only in entry, seed and head; the pages are rewritten after such a group."""
        return self.row in ("random", "frozen"), self.labels_per_word

    def __str__(self) -> str:
        name = self.row if self.entry is None else f"{self.entry.text} seed {self.seed} {self.row}"
        return f"{name}, {self.head}, {self.labels_per_word or 'all'} labels a word"


def entries_of(table: TableConfig) -> list[Entry]:
    """The rows of the table, in the order given."""
    return [Entry(text) for text in table.tasks]


def cells_of(table: TableConfig) -> list[Cell]:
    """All cells in the order in which they are measured: first those with a frozen encoder, which are quick."""
    entries = entries_of(table)
    cells = []
    for trains in (False, True) if table.finetune else (False,):
        baseline: RowName = "supervised" if trains else "random"
        row: RowName = "finetuned" if trains else "frozen"
        for labels in table.label_counts:
            for head in table.heads:
                cells.append(Cell(baseline, None, 0, head, labels))
                for seed in range(table.seeds):
                    cells += [Cell(row, entry, seed, head, labels) for entry in entries]
    return cells
