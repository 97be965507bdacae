"""Kills, full disks and broken disks in the middle of each command: no traceback, nothing half written, and the same
command afterwards gives what it always gives.

A sample of the operations on files; `make faults` has all of them go wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import CASES, Case
from preload import Fault
from snapshot import differences, snapshot
from trials import Trials, sample

EXAMPLES = int(os.environ.get("AVPPC_EXAMPLES", "1"))
FAULTS = [(Fault.KILL, False), (Fault.FULL, True), (Fault.BROKEN, False), (Fault.UNREADABLE, False)]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the library wraps the functions of Linux's libc")


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    with Trials(tmp_path_factory.mktemp("faults")) as running:
        yield running


@pytest.mark.parametrize(("fault", "lasting"), FAULTS, ids=[fault.name.lower() for fault, _ in FAULTS])
@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_fault(case: Case, fault: Fault, lasting: bool, trials: Trials) -> None:
    operations = trials.count(case, fault)
    assert operations > 0
    problems, failed = [], []
    for at in sample(operations, case.tried * EXAMPLES, f"{case.name} {fault.name}"):
        problems += [f"at operation {at} of {operations}, {text}" for text in trials.trial(case, fault, at, lasting)]
        failed += [trials.plan.what] if trials.plan.what else []  # processes side by side may do less another time
    assert problems == []
    assert failed


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_full_disk_behind_standard_error(case: Case, trials: Trials) -> None:
    """What a command only says must not end its work."""
    expected = trials.expected(case)
    trials.clear(case)
    code, text = trials.run(case, stderr=Path("/dev/full"))
    assert code in case.codes, text
    assert differences(expected, snapshot(trials.work)) == []
