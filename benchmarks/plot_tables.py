"""Tables of the benchmarks' reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

TABLE_D = 256  # the width with every baseline and with memory


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns but the first are aligned right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
