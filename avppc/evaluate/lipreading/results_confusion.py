"""Which words are mistaken for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ConfusedPair:
    """Two words, and how often each is mistaken for the other."""

    first: str
    second: str
    first_as_second: float
    """Share of the clips of `first` that were read as `second`, 0 to 1."""
    second_as_first: float


def confusion_rates(
    counts: Sequence[Sequence[int]],  # [words spoken, words chosen]
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
