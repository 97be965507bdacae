"""Which words are confused, by how far apart they look, with words as strings of visemes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avppc.evaluate.lipreading.results_confusion import confusion_rates

FARTHEST = 4
"""All distances from this one on are one group."""


def viseme_strings(words: Sequence[str]) -> list[tuple[str, ...]]:
    """The viseme classes of each word as espeak-ng says it in American English; each is named by its first phoneme.

    Raises:
        ImportError: the extra "synth" is not installed.
    """
    try:
        from avppc.synth.visemes import viseme_class
        from avppc.synth.voice_espeak import Espeak
    except ImportError as error:
        raise ImportError(f"viseme_strings needs espeak-ng: pip install 'avppc[synth]' ({error})") from error
    espeak = Espeak()
    strings = []
    for word in words:
        speech = espeak.say(word.lower(), "en-us", rate_wpm=160, pitch=50, pitch_range=50)
        strings.append(tuple(viseme_class(p.name) for p in speech.phonemes if not p.is_pause))
    return strings


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """The fewest visemes to insert, delete or replace to turn one string into the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def confusions_by_visemes(counts: Sequence[Sequence[int]], strings: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """Errors by the distance between the word spoken and the word read.

    Args:
        counts: [words spoken, words chosen].
        strings: the visemes of each word.

    Returns:
        "by_distance": for each distance (FARTHEST: that or more) the share of all errors, the share of the pairs of
        words (which errors at random would have) and their ratio; "groups": the words that look alike.
    """
    rates = confusion_rates(counts)
    words = len(strings)
    if rates.shape != (words, words):
        raise ValueError(f"counts must be a table of {words} words, got shape {rates.shape}")
    distance = np.array([[min(FARTHEST, edit_distance(a, b)) for b in strings] for a in strings])
    off = ~np.eye(words, dtype=bool)
    errors: NDArray[np.float64] = np.asarray(counts, np.float64) * off
    total, pairs = errors.sum(), off.sum()
    found = {}
    for value in range(FARTHEST + 1):
        at = off & (distance == value)
        share, expected = float(errors[at].sum() / max(total, 1.0)), float(at.sum() / max(pairs, 1))
        ratio = share / expected if expected else None
        found[str(value)] = {"share_of_errors": share, "share_of_pairs": expected, "ratio": ratio}
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, string in enumerate(strings):
        alike.setdefault(string, []).append(number)
    return {"by_distance": found, "groups": [members for members in alike.values() if len(members) > 1]}
