"""Every operation of every command goes wrong once: `python tests/faults/run.py`, `make faults`.

Prints what is wrong, and at the end a table of how many operations there are, were tried and went badly; exit code 1 if
any did.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from cases import CASES, Case
from preload import Fault
from trials import PLACES, SideBySide, sample

MODES = {
    "kill": (Fault.KILL, False),
    "full": (Fault.FULL, True),
    "full-once": (Fault.FULL, False),
    "broken": (Fault.BROKEN, True),
    "broken-once": (Fault.BROKEN, False),
    "unreadable": (Fault.UNREADABLE, True),
    "unreadable-once": (Fault.UNREADABLE, False),
}


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("--commands", nargs="*", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--faults", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--most", type=int, help="operations of each command and fault")
    parser.add_argument("--jobs", type=int, default=PLACES, help="trials side by side")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, SideBySide(Path(folder), options.jobs) as trials:
        for case in (case for case in CASES if case.name in options.commands):
            for mode in options.faults:
                rows.append(_row(trials, case, mode, options.most))
                print(_line(rows[-1]), flush=True)
    total = ("all", "", *(sum(row[column] for row in rows) for column in (2, 3, 4, 5)))
    for line in (("command", "fault", "operations", "tried", "bad", "seconds"), *rows, total):
        print(_line(line))
    return 1 if total[4] else 0


def _row(trials: SideBySide, case: Case, mode: str, most: int | None) -> tuple[str, str, int, int, int, int]:
    """Tries a command with one fault: command, fault, operations, tried, bad, seconds."""
    begin, tried, bad = time.monotonic(), 0, 0
    fault, lasting = MODES[mode]
    operations = trials.first.count(case, fault)
    for trial in trials.trials(case, fault, lasting, sample(operations, most, f"{case.name} {mode}")):
        tried, bad = tried + 1, bad + bool(trial.problems)
        for problem in trial.problems:
            print(f"{case.name}, {mode} at {trial.at}, {trial.what or 'nothing failed'}: {problem}", flush=True)
    return case.name, mode, operations, tried, bad, round(time.monotonic() - begin)


def _line(row: tuple[object, ...]) -> str:
    command, fault, *numbers = row
    return f"{command:<14} {fault:<15}" + "".join(f" {number:>10}" for number in numbers)


if __name__ == "__main__":
    sys.exit(main())
