"""What is said about videos, "kind: details" or "kind VALUE: details": many texts of a kind made into one line."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)")


def kind_of(text: str) -> str:
    """What a note or a reason is about, without its details and values."""
    return re.sub(r" [\d.]+(-[\d.]+)?$", "", text.split(":")[0].split("(")[0].strip())


class Notes:
    """The notes on the clips of one video, one a kind."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}

    def add(self, notes: Iterable[str]) -> None:
        """Adds the notes on a clip."""
        for note in notes:
            found = self._kinds.setdefault(kind_of(note), [])
            if note not in found:
                found.append(note)

    def lines(self) -> list[str]:
        """One a kind: a value that differs as a range, else the first note and how many others there are."""
        return [_merged(found) for found in self._kinds.values()]


def _merged(notes: list[str]) -> str:
    if len(notes) == 1:
        return notes[0]
    pieces = [_NUMBER.split(note) for note in notes]  # text, number, text, ...
    first = pieces[0]
    if all(other[::2] == first[::2] for other in pieces):
        differing = [
            place for place in range(1, len(first), 2) if any(other[place] != first[place] for other in pieces)
        ]
        if len(differing) == 1:
            values = sorted((other[differing[0]] for other in pieces), key=float)
            first[differing[0]] = f"{values[0]}-{values[-1]}"
            return "".join(first)
    return f"{notes[0]}; otherwise in other clips, {len(notes) - 1} times"
