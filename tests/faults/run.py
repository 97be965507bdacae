"""Every operation of every command goes wrong once: `python tests/faults/run.py`, `make faults`.

Prints what is wrong, and at the end a table of how many operations were tried; exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from cases import CASES
from preload import Fault
from trials import Trials, sample

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
    parser.add_argument("--most", type=int, default=1 << 30, help="operations of each command and fault")
    options = parser.parse_args()
    table, bad = [], 0
    with tempfile.TemporaryDirectory() as folder, Trials(Path(folder)) as trials:
        for case in (case for case in CASES if case.name in options.commands):
            row = f"{case.name:<14}"
            for mode in options.faults:
                fault, lasting = MODES[mode]
                tried = wrong = 0
                for at in sample(trials.count(case, fault), options.most, f"{case.name} {mode}"):
                    problems = trials.trial(case, fault, at, lasting)
                    tried, wrong = tried + 1, wrong + bool(problems)
                    for problem in problems:
                        print(f"{case.name}, {mode} at {at}: {problem}", flush=True)
                row += f"  {mode} {tried} ({wrong} bad)"
                bad += wrong
            table.append(row)
    print("\n".join(table))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
