"""Processes of one run that were not started alike: all of them say so before the first step."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from launch import refusals
from tiny_runs import tiny_config, write_tiny_set


def test_processes_that_differ_are_refused(tiny_set: Path, tmp_path: Path) -> None:
    other = write_tiny_set(tmp_path / "other", seed=1)
    moved = shutil.copytree(tiny_set, tmp_path / "moved")
    first = tiny_config(tiny_set, tmp_path / "run", precision="fp32")
    changes = [{"batch_size": 6, "steps": 9}, {"precision": "bf16"}, {"data": other}, {"data": moved, "log_every": 1}]
    runs = [(first, dataclasses.replace(first, **change)) for change in changes]
    by_first, by_second = refusals(runs, tmp_path)
    assert by_first == ["another process has refused to begin, and says why"] * len(runs)
    start = "process 1 cannot train together with process 0: "
    assert by_second[0] == start + "batch_size is 8 there, 6 here; steps is 12 there, 9 here"
    assert by_second[1] == start + "precision is 'fp32' there, 'bf16' here"
    assert by_second[2].startswith(start + "checksum of the clips is ")
    assert by_second[3] == start + "log_every is 3 there, 1 here"  # the same clips at another path are no difference
    assert not first.out.exists()
