"""Rows of the lip-reading table, as JSON beside the run and printed; and which words are mistaken for which.

The intervals of the rates cover both the choice of labelled clips and the choice of test clips.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from avppc.checks import check_choice, check_integer, check_number, check_types
from avppc.printing import Console
from avppc.settings import config_from_dict, read_checked_json, write_checked_json

TITLES = {
    "random": "random encoder, frozen",
    "supervised": "supervised from scratch",
    "frozen": "{task}, frozen",
    "finetuned": "{task}, fine-tuned",
    "ceiling": "true mouth trajectories (ceiling)",
}
SHORT_TASKS = {"av-permutative": "AV-PPC", "visual-permutative": "visual PPC"}
"""Names of proxy tasks in titles, where they differ from those in the settings."""

# Student's t, two-sided 95%, by degrees of freedom 1 to 10
_STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class RowResult:
    """One row of the lip-reading table: how many words an encoder reads right, with so many labels."""

    row: str
    """"random", "supervised", "frozen", "finetuned" or "ceiling"."""
    labels_per_word: int
    """Labelled clips a word; 0: all."""
    wcr: float
    """Word classification rate on the test clips, mean over the draws, 0 to 1."""
    interval95: float
    """Half-width of its 95% interval."""
    chance: float
    """Rate of right words by guessing, 0 to 1."""
    chosen: dict[str, Any]
    """Head and learning rates with the best validation rate."""
    trials: list[dict[str, Any]]
    """Each head with each choice of learning rates; its validation rate, the mean of the draws that choose."""
    draws: list[dict[str, Any]]
    """Seed, validation and test rate of each draw of the labels, and "right", which test clips were read right, as
    `pack_answers` writes them; earlier results lack the last."""
    words: list[str]
    """The vocabulary, in the order of the labels."""
    tested: int
    """Number of test clips."""
    confusion: list[list[int]]
    """[words spoken, words predicted]: counts over all draws."""
    seconds: float
    """The time of all the row's fits added up, which is more than the clock's if they ran side by side."""
    settings: dict[str, Any]
    """The settings of the evaluation, the run's task and the checksums of its encoder and of the data's index."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("row", self.row, TITLES)
        check_number("wcr", self.wcr, 0, 1)
        for name in ("labels_per_word", "tested"):
            check_integer(name, getattr(self, name), 0)
        for name in ("interval95", "chance", "seconds"):
            check_number(name, getattr(self, name), 0)
        for name, kind in (("chosen", dict), ("settings", dict), ("trials", list), ("draws", list), ("words", list)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        for name in ("task", "encoder_sha256"):
            if not isinstance(self.settings.get(name), str):
                raise ValueError(f"settings must name the {name} of the encoder, got {self.settings.get(name)!r}")
        self._check_fits()
        self._check_confusion()

    def _check_fits(self) -> None:
        for name, entries, rates in (
            ("chosen", [self.chosen], ()),
            ("trials", self.trials, ("val_wcr",)),
            ("draws", self.draws, ("val_wcr", "test_wcr")),
        ):
            for entry in entries:
                if not isinstance(entry, dict):
                    raise TypeError(f"{name} must hold objects, got {entry!r}")
                if name == "draws":
                    check_integer("draws: seed", entry.get("seed"), 0)
                elif not isinstance(entry.get("head"), str):
                    raise TypeError(f"{name} must name a head, got {entry!r}")
                if "right" in entry and len(unpack_answers(entry["right"], self.tested)) != self.tested:
                    raise ValueError(f"draws: right must hold {self.tested} answers, got {entry['right']!r}")
                for rate in rates:
                    check_number(f"{name}: {rate}", entry.get(rate), 0, 1)
        if not self.draws:
            raise ValueError("draws must hold at least one")

    def _check_confusion(self) -> None:
        words = len(self.words)
        if not words or not all(isinstance(word, str) for word in self.words):
            raise ValueError(f"words must hold texts, one at least; got {self.words!r}")
        lines = self.confusion if isinstance(self.confusion, list) else []
        if len(lines) != words or not all(isinstance(line, list) and len(line) == words for line in lines):
            raise ValueError(f"confusion must be a table of {words} words")
        for count in itertools.chain.from_iterable(lines):
            check_integer("confusion", count, 0, 1 << 53)


def pack_answers(right: Sequence[bool]) -> str:
    """Answers, right or wrong, as hexadecimal digits: 8 in two digits, the first in the highest bit."""
    return np.packbits(np.asarray(right, dtype=bool)).tobytes().hex()


def unpack_answers(text: object, count: int) -> NDArray[np.bool_]:
    """The first `count` answers that `pack_answers` wrote; fewer if the text has fewer or is none."""
    try:
        packed = np.frombuffer(bytes.fromhex(text if isinstance(text, str) else ""), np.uint8)
    except ValueError:
        packed = np.empty(0, np.uint8)
    return np.unpackbits(packed, count=min(count, 8 * len(packed))).astype(bool)


def task_of(result: RowResult) -> str:
    """The proxy task that pretrained the encoder, as titles name it, such as "AV-PPC"."""
    task = result.settings["task"]
    return SHORT_TASKS.get(task, task)


def title_of(result: RowResult) -> str:
    """For example "AV-PPC, frozen"."""
    return TITLES[result.row].format(task=task_of(result))


def _path(run: Path, row: str, labels_per_word: int) -> Path:
    return run / "evaluation" / f"{row}-{labels_per_word or 'all'}.json"


def write_row(run: Path, result: RowResult) -> None:
    """Writes a row to run/evaluation/ROW-LABELS.json."""
    write_checked_json(_path(run, result.row, result.labels_per_word), asdict(result))


def read_row(run: Path, row: str, labels_per_word: int, settings: dict[str, Any]) -> RowResult | None:
    """A row that was evaluated before with the same settings, or None."""
    path = _path(run, row, labels_per_word)
    if not path.exists():
        return None
    result = config_from_dict(RowResult, read_checked_json(path), str(path))
    return result if decisive(result.settings) == decisive(settings) else None


def decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide a row's result: all, but not the folder of the data where its checksum is among them.

    Rows of early versions have no checksum of the data, only the folder, and so never equal new ones: pages show them,
    but `evaluate` measures them anew, since nothing tells whether the clips in the folder are still the same.
    """
    return {name: value for name, value in settings.items() if name != "data" or "data_sha256" not in settings}


def read_rows(run: Path) -> list[RowResult]:
    """All rows of a run, in the order of the table."""
    order = list(TITLES)
    files = (run / "evaluation").glob("*-*.json")
    rows = [config_from_dict(RowResult, read_checked_json(path), str(path)) for path in files]
    return sorted(rows, key=lambda result: (result.labels_per_word or 10**9, order.index(result.row)))


def print_table(results: Sequence[RowResult]) -> None:
    """Prints the rows to standard output."""
    first = results[0]
    labels = f"{first.labels_per_word} labels a word" if first.labels_per_word else "all labels"
    table = Table(title=f"Lip reading: {len(first.words)} words, {labels}, {first.tested} test clips")
    for column in ("encoder", "head", "words right", "draws"):
        table.add_column(column, justify="left" if column in ("encoder", "head") else "right")
    for result in results:
        rate = f"{100 * result.wcr:.1f} ± {100 * result.interval95:.1f} %"
        table.add_row(title_of(result), result.chosen["head"], rate, str(len(result.draws)))
    table.caption = f"Chance is {100 * first.chance:.1f} %. ±: 95% interval over label draws and test clips."
    Console(width=100).print(table)


@dataclass(frozen=True)
class ConfusedPair:
    """Two words, and how often each is mistaken for the other."""

    first: str
    second: str
    first_as_second: float
    """Share of the clips of `first` that were read as `second`, 0 to 1."""
    second_as_first: float


def confusion_rates(
    counts: Sequence[Sequence[int]],  # [words spoken, words predicted]
) -> NDArray[np.float64]:
    """[words, words]: each row has the shares of a spoken word's clips; zeros for a word without clips."""
    table = np.asarray(counts, np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise ValueError(f"confusion must be a square table, got shape {table.shape}")
    totals = table.sum(1, keepdims=True)
    return np.divide(table, totals, out=np.zeros_like(table), where=totals > 0)


def most_confused(rates: NDArray[np.float64], words: Sequence[str], count: int) -> list[ConfusedPair]:
    """The pairs most often mistaken for each other, both directions added; pairs never confused are left out."""
    mutual = np.triu(rates + rates.T, 1)
    ranked = np.argsort(-mutual, axis=None, kind="stable")[:count]
    pairs = (divmod(int(place), len(words)) for place in ranked if mutual.flat[place] > 0)
    return [ConfusedPair(words[a], words[b], float(rates[a, b]), float(rates[b, a])) for a, b in pairs]


def order_by_confusion(rates: NDArray[np.float64]) -> list[int]:
    """An order of the words in which those that are mistaken for each other stand side by side.

    Average-linkage clustering on the mutual rates; a merged group is laid out so that its two closest ends meet. Groups
    that are never confused keep the given order.
    """
    ends = rates + rates.T
    links = ends.copy()
    np.fill_diagonal(links, -1.0)
    groups: list[list[int]] = [[word] for word in range(len(rates))]
    for _ in range(len(groups) - 1):
        first, second = divmod(int(links.argmax()), len(links))
        if links[first, second] <= 0:
            break
        sizes = len(groups[first]), len(groups[second])
        merged = (sizes[0] * links[first] + sizes[1] * links[second]) / sum(sizes)
        merged[[first, second]] = -1.0
        links[first], links[:, first] = merged, merged
        links[second], links[:, second] = -1.0, -1.0  # below any rate: never the largest again
        groups[first] = _join(groups[first], groups[second], ends)
        groups[second] = []
    return [word for group in groups for word in group]


def _join(first: list[int], second: list[int], ends: NDArray[np.float64]) -> list[int]:
    """The two groups one after the other, each possibly reversed, so that the closest ends meet."""
    layouts = [(a, b) for a in (first, first[::-1]) for b in (second, second[::-1])]
    head, tail = max(layouts, key=lambda layout: ends[layout[0][-1], layout[1][0]])
    return head + tail


def mean_and_interval(rates: Sequence[float], tested: int) -> tuple[float, float]:
    """Mean of the draws' rates (0 to 1) and the half-width of its 95% interval.

    Two independent parts are added in quadrature: Student's interval over the draws of the labelled clips (none for one
    draw), and the binomial interval of the test clips, which all draws share.
    """
    if not rates or tested < 1:
        raise ValueError(f"rates must hold at least one draw and tested be positive, got {len(rates)} and {tested}")
    mean = sum(rates) / len(rates)
    # Agresti and Coull's: two right and two wrong answers are added, so that 100% does not count as certain
    centre = (mean * tested + 2.0) / (tested + 4.0)
    half = 1.96 * math.sqrt(centre * (1.0 - centre) / (tested + 4.0))
    return mean, limited(mean, math.hypot(half, student_interval(rates)) if len(rates) > 1 else half)


def limited(rate: float, half: float) -> float:
    """The half-width of a rate's interval, at most the way to the farther of 0 and 1: few draws may give far more."""
    return min(half, max(rate, 1.0 - rate))


def student_interval(rates: Sequence[float]) -> float:
    """Half-width of the 95% interval of the mean of two or more independent rates, by Student's distribution."""
    if len(rates) < 2:
        raise ValueError(f"rates must hold at least two, got {len(rates)}")
    mean, freedom = sum(rates) / len(rates), len(rates) - 1
    deviation = math.sqrt(sum((rate - mean) ** 2 for rate in rates) / freedom)
    student = _STUDENT_95[freedom - 1] if freedom <= len(_STUDENT_95) else 1.96 + 2.4 / freedom
    return student * deviation / math.sqrt(len(rates))
