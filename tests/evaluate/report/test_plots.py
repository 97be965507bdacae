"""The report's figures."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from report_runs import make_row, write_run

from avppc.evaluate.record import read_record
from avppc.evaluate.report import plots
from avppc.losses.subtasks import SUBTASKS


def test_intervals_end_at_all_and_nothing(tmp_path: Path) -> None:
    rows = [
        make_row(tmp_path, row, wcr=rate, interval95=0.3)
        for row, rate in (("random", 0.0), ("supervised", 0.95), ("frozen", 1.0))
    ]
    svg = plots.plot_rates([rows])
    for text in ("0.0 ± 30.0 %", "95.0 ± 30.0 %", "100.0 ± 30.0 %"):
        assert f">{text}</text>" in svg
    ticks = {int(text): float(x) for x, text in re.findall(r'<text [^>]* x="([\d.]+)"[^>]*>(\d+)</text>', svg)}
    assert max(ticks) == 100
    lines = re.findall(r'<path d="M (\S+) \S+\nL (\S+) \S+\n"[^>]*stroke: var\(--ink\); stroke-width: 1.4', svg)
    expected = [(0, 0.3), (0.65, 1), (0.7, 1)]
    for (start, end), (low, high) in zip(lines, expected, strict=True):
        scale = ticks[100] - ticks[0]
        assert float(start) == pytest.approx(ticks[0] + low * scale, abs=0.05)
        assert float(end) == pytest.approx(ticks[0] + high * scale, abs=0.05)


def test_contexts_are_lines_and_targets_columns() -> None:
    subtasks = [subtask for subtask in SUBTASKS if subtask.name in ("Vp->Ap,Af", "Ap,Af->Vp")]
    svg = plots.plot_subtasks(subtasks, np.array([0.111, 0.222]), np.array([1.0, 2.0]), 2.77)
    places = {
        text: (float(x), float(y))
        for x, y, text in re.findall(r'<text [^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>([\d.]+)</text>', svg)
    }
    assert [subtask.name for subtask in subtasks] == ["Vp->Ap,Af", "Ap,Af->Vp"]
    for first, second in (("11.1", "22.2"), ("1.00", "2.00")):
        assert places[first][0] > places[second][0]  # target Ap,Af is the last column
        assert places[first][1] < places[second][1]  # context Ap,Af the last line


def test_long_logs_are_thinned_to_means(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tmp_path / "nowhere")
    record = read_record(tmp_path / "run")

    def longest_path(rows: int) -> int:
        """Points of the longest line where the gradient's norm jumps up and down from row to row."""
        log = [
            {"step": row + 1, "loss": 1.0, "learning_rate": 1.0, "grad_norm": 1.0 + 4 * (row % 2)}
            for row in range(rows)
        ]
        thinned = dataclasses.replace(record, metrics=dataclasses.replace(record.metrics, entries=log))
        return max(path.count("\nL ") for path in re.findall(r'<path d="([^"]*)"', plots.plot_training(thinned)))

    assert longest_path(400) > 300
    assert longest_path(800) < 10  # two rows a point: level
