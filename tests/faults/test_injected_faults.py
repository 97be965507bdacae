"""Kills, full disks and broken disks in the middle of each command: no traceback, nothing half written, and the same
command afterwards gives what it always gives.

Every operation that changes files goes wrong once, and of each command a sample of those that read; `make faults` has
all, more kinds of fault, and counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import CASES, Case
from preload import Fault
from snapshot import differences, snapshot
from trials import SideBySide, sample

FAULTS = [(Fault.KILL, False), (Fault.FULL, True), (Fault.BROKEN, False), (Fault.UNREADABLE, False)]
MOST_READS = 100

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the library wraps the functions of Linux's libc")


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SideBySide]:
    with SideBySide(tmp_path_factory.mktemp("faults")) as running:
        yield running


@pytest.mark.timeout(1800)  # some are two hundred trials; a command that hangs is ended by itself
@pytest.mark.parametrize(("fault", "lasting"), FAULTS, ids=[fault.name.lower() for fault, _ in FAULTS])
@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_fault(case: Case, fault: Fault, lasting: bool, trials: SideBySide) -> None:
    operations = trials.first.count(case, fault)
    assert operations > 0
    most = MOST_READS if fault is Fault.UNREADABLE else None
    found = list(trials.trials(case, fault, lasting, sample(operations, most, f"{case.name} {fault.name}")))
    assert [trial for trial in found if trial.problems] == []
    assert any(trial.what for trial in found)  # not each: processes side by side may do less another time


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_full_disk_behind_standard_error(case: Case, trials: SideBySide) -> None:
    """What a command only says must not end its work."""
    expected = trials.first.expected(case)
    trials.first.clear(case)
    code, text = trials.first.run(case, stderr=Path("/dev/full"))
    assert code in case.codes, text
    assert differences(expected, snapshot(trials.first.work)) == []
