"""The parts of a table (entries, runs to pretrain, cells to measure) and their measurements, over seeds and heads."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from avppc.evaluate.config import HeadName, RowName, TableConfig
from avppc.evaluate.lipreading.results import TITLES, RowResult, limited, student_interval, unpack_answers
from avppc.evaluate.record import read_record
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
        config = replace(config, batch_size=table.batch_size or config.batch_size)
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


BASELINE_TITLES = {"random": "random encoder", "supervised": TITLES["supervised"]}

NOTHING = "\u2013"
"""Shown where nothing was measured or published."""
SOURCE = (
    "Tellamekala, Valstar, Pound, Giesbrecht: Audio-Visual Predictive Coding for Self-Supervised Visual Representation "
    "Learning, ICPR 2020, slides: word classification rate on LRW (500 words, all labels), encoder frozen (fine-tuned)."
)
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "synchronization": {"tconv": (0.5070, 0.7417), "gru": (0.5526, 0.7692)},
    "time-arrow": {"tconv": (0.5242, 0.7580), "gru": (0.5988, 0.7826)},
    "correspondence": {"tconv": (0.5622, 0.7423), "gru": (0.6190, 0.7790)},
    "visual-permutative": {"tconv": (0.6077, 0.7795), "gru": (0.6762, 0.8176)},
    "av-permutative": {"tconv": (0.7647, 0.8044), "gru": (0.8030, 0.8316)},
}
"""{proxy task: {head: (rate with the encoder frozen, with it fine-tuned)}}, 0 to 1."""


@dataclass(frozen=True)
class CellResult:
    """A cell and its measurement."""

    cell: Cell
    result: RowResult

    @property
    def val_rate(self) -> float:
        """Mean validation rate over the draws."""
        return sum(draw["val_wcr"] for draw in self.result.draws) / len(self.result.draws)


@dataclass(frozen=True)
class RunCost:
    """The cost of a pretraining run."""

    clips: int
    """Clips seen, repeated ones counted."""
    seconds: float
    """Wall time of its steps."""


@dataclass(frozen=True)
class Rate:
    """One number of the table."""

    mean: float
    """Word classification rate, mean over seeds and draws, 0 to 1."""
    interval95: float
    """Half-width: over label draws and test clips, and over seeds where there are several."""
    heads: tuple[str, ...]
    """The head; where each seed takes its best one, all that were taken."""

    def text(self) -> str:
        """For example "46.2 ± 3.1", in percent."""
        return f"{100 * self.mean:.1f} ± {100 * self.interval95:.1f}"


@dataclass(frozen=True)
class Difference:
    """How much more words one row reads right than another, over the same test clips and label draws."""

    mean: float
    """Difference of the rates, from -1 to 1."""
    interval95: float
    """Half-width: over test clips, label draws and, where there are several, pretraining seeds."""

    def text(self) -> str:
        """For example "+4.0 ± 1.5", in percent."""
        return f"{100 * self.mean:+.1f} ± {100 * self.interval95:.1f}"


def paired_difference(first: Sequence[RowResult], second: Sequence[RowResult]) -> Difference | None:
    """By how much the first rate is above the second, each a measurement for each pretraining seed, or a single one.

    Answers to the same clip after the same draw of labels are compared, so that what is hard for both cancels. The
    interval joins three parts as independent: the normal one over test clips, of each one's mean over draws and seeds;
    Student's over draws, and over seeds. None: answers were not kept, or there is no draw or clip in common.
    """
    tables = []
    seeds = max(len(first), len(second))
    for one, other in zip(_repeated(first, seeds), _repeated(second, seeds), strict=False):
        answers = [{draw["seed"]: draw.get("right") for draw in result.draws} for result in (one, other)]
        draws = [seed for seed in answers[0] if answers[0][seed] and answers[1].get(seed)]
        if not draws or one.tested != other.tested:
            return None
        right = [[unpack_answers(of[seed], one.tested) for seed in draws] for of in answers]
        tables.append(np.asarray(right[0], float) - np.asarray(right[1], float))  # [draws, clips]
    if not tables or len({table.shape for table in tables}) > 1:
        return None
    differences = np.stack(tables)  # [seeds, draws, clips]
    clips = differences.mean((0, 1))
    parts = [1.96 * clips.std(ddof=1) / math.sqrt(len(clips)) if len(clips) > 1 else 1.0]
    for axes in ((0, 2), (1, 2)):  # by draw, by seed
        means = differences.mean(axes)
        if len(means) > 1:
            parts.append(student_interval(means.tolist()))
    return Difference(float(differences.mean()), min(1.0, math.hypot(*parts)))


def _repeated(results: Sequence[RowResult], seeds: int) -> Sequence[RowResult]:
    """The measurements; one that has no pretraining seed, such as random weights, for each seed."""
    return list(results) * seeds if len(results) == 1 else results


def read_cost(run: Path) -> RunCost:
    """The cost of a finished run, from its settings and its log."""
    record = read_record(run)
    config = record.config
    return RunCost(config.steps * config.batch_size * config.accumulate, record.training_seconds)


def combine(results: Iterable[CellResult]) -> Rate:
    """The mean rate of the cells of several pretraining seeds.

    The interval joins two parts as independent: Student's over the seeds, and the mean of the cells' own intervals,
    which come from the label draws and the test clips that all seeds share.
    """
    chosen = list(results)
    rates = [item.result.wcr for item in chosen]
    own = sum(item.result.interval95 for item in chosen) / len(chosen)
    between = student_interval(rates) if len(rates) > 1 else 0.0
    heads = tuple(dict.fromkeys(str(item.cell.head) for item in chosen))
    rate = sum(rates) / len(rates)
    return Rate(rate, limited(rate, math.hypot(own, between)), heads)


Pair = tuple[Rate | None, Rate | None]
"""The rates with the encoder frozen and with the encoder trained; None for one that was not measured."""


@dataclass(frozen=True)
class Table:
    """A table, as far as it is measured."""

    config: TableConfig
    entries: list[Entry]
    costs: dict[tuple[Entry, int], RunCost]
    """By entry and pretraining seed, for each finished run."""
    results: list[CellResult]

    @cached_property
    def _by_cell(self) -> dict[Cell, CellResult]:
        return {item.cell: item for item in self.results}

    def rate(self, row: RowName, entry: Entry | None, head: str, labels_per_word: int) -> Rate | None:
        """The rate of a row under a head; "best": each seed's head of the best validation rate. None: not measured."""
        found = self.measured(row, entry, head, labels_per_word)
        return combine(found) if found else None

    def measured(self, row: RowName, entry: Entry | None, head: str, labels_per_word: int) -> list[CellResult]:
        """What a rate is the mean of: a measurement for each seed."""
        found = []
        for seed in range(self.config.seeds if entry is not None else 1):
            heads = [name for name in self.config.heads if head in (name, "best")]
            cells = [Cell(row, entry, seed, name, labels_per_word) for name in heads]
            measured = [self._by_cell[cell] for cell in cells if cell in self._by_cell]
            if measured and len(measured) == len(cells):
                found.append(max(measured, key=lambda item: item.val_rate))
        return found

    def best_rival(self, labels_per_word: int) -> Entry | None:
        """The row other than permutative coding with sound that reads most of the validation clips, encoder frozen."""
        head, rates = self.columns[-1], {}
        for entry in self.entries:
            found = self.measured("frozen", entry, head, labels_per_word)
            if entry.task != "av-permutative" and found:
                rates[entry] = sum(item.val_rate for item in found) / len(found)
        return max(rates, key=rates.__getitem__) if rates else None

    def is_best(self, entry: Entry | None, head: str, labels_per_word: int) -> bool:
        """Whether no proxy task reads more than this one in a column, the encoder frozen."""
        rates = {other: self.rate("frozen", other, head, labels_per_word) for other in self.entries}
        means = {other: rate.mean for other, rate in rates.items() if rate is not None}
        return entry in means and means[entry] == max(means.values())

    @property
    def measured_on(self) -> str:
        """The words and test clips that the rates are of, and chance; empty where nothing is measured."""
        if not self.results:
            return ""
        result = self.results[0].result
        return f"{len(result.words)} words, {result.tested:,} test clips, chance {100 * result.chance:.1f} %"

    def ahead(self, entry: Entry | None, title: str, labels_per_word: int) -> str:
        """How far a row is ahead of the best rival under the last head, the encoder frozen, as a text."""
        rival, head = self.best_rival(labels_per_word), self.columns[-1]
        if rival is None:
            return NOTHING
        if entry == rival:
            return "best rival"
        row: RowName = "frozen"
        if entry is None:
            row = "random" if title == BASELINE_TITLES["random"] else "supervised"
        own, other = (
            [item.result for item in self.measured(*of, head, labels_per_word)]
            for of in ((row, entry), ("frozen", rival))
        )
        difference = paired_difference(own, other) if own and other else None
        return NOTHING if difference is None else difference.text()

    @property
    def columns(self) -> tuple[str, ...]:
        """The heads and, if there are several, "best"."""
        return (*self.config.heads, "best") if len(self.config.heads) > 1 else tuple(self.config.heads)

    def lines(self, labels_per_word: int) -> list[tuple[str, Entry | None, dict[str, Pair]]]:
        """(title, entry, by column: (frozen, with the encoder trained)) of each row, the baselines first."""
        baselines = BASELINES if self.config.finetune else BASELINES[:1]
        lines: list[tuple[str, Entry | None, dict[str, Pair]]] = []
        for row in baselines:
            pairs = {head: self._baseline_pair(row, head, labels_per_word) for head in self.columns}
            lines.append((BASELINE_TITLES[row], None, pairs))
        for entry in self.entries:
            pairs = {head: self._pair(entry, head, labels_per_word) for head in self.columns}
            lines.append((entry.title, entry, pairs))
        return lines

    @property
    def seed_counts(self) -> tuple[int, int]:
        """Fewest and most pretraining seeds of a cell; if nothing is measured, those of the settings."""
        cells = [item.cell for item in self.results if item.cell.entry is not None]
        seeds = Counter((cell.row, cell.entry, cell.head, cell.labels_per_word) for cell in cells)
        counts = seeds.values() or (self.config.seeds,)
        return min(counts), max(counts)

    def _baseline_pair(self, row: RowName, head: str, labels_per_word: int) -> Pair:
        rate = self.rate(row, None, head, labels_per_word)
        return (rate, None) if row == "random" else (None, rate)

    def _pair(self, entry: Entry, head: str, labels_per_word: int) -> Pair:
        frozen = self.rate("frozen", entry, head, labels_per_word)
        return frozen, self.rate("finetuned", entry, head, labels_per_word)

    def cost(self, entry: Entry | None) -> RunCost | None:
        """Clips and seconds of one run, the mean over the finished seeds; None for a baseline, or without any."""
        costs = [cost for (of, _), cost in self.costs.items() if of == entry]
        if not costs:
            return None
        return RunCost(costs[0].clips, sum(cost.seconds for cost in costs) / len(costs))

    def as_dict(self) -> dict[str, Any]:
        """All measurements as JSON values."""
        return {
            "cells": [
                {
                    "task": None if item.cell.entry is None else item.cell.entry.text,
                    "row": item.cell.row,
                    "seed": item.cell.seed,
                    "head": item.cell.head,
                    "labels_per_word": item.cell.labels_per_word,
                    "wcr": item.result.wcr,
                    "interval95": item.result.interval95,
                    "val_wcr": item.val_rate,
                    "chosen": item.result.chosen,
                    "draws": item.result.draws,
                    "seconds": item.result.seconds,
                }
                for item in self.results
            ],
            "runs": [
                {"task": entry.text, "seed": seed, "clips": cost.clips, "seconds": cost.seconds}
                for (entry, seed), cost in self.costs.items()
            ],
            "published": PUBLISHED,
        }
