"""One trial: a command meets a fault, then the same command runs undisturbed and has to give what it always gives."""

from __future__ import annotations

import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import Case, clear_work, write_inputs
from preload import Fault, Plan, build
from snapshot import differences, snapshot, state

_HERE = Path(__file__).parent
_CAUSES = {
    Fault.FULL: "No space left on device",
    Fault.BROKEN: "Input/output error",
    Fault.UNREADABLE: "Input/output error",
}
PLACES = min(4, os.cpu_count() or 1)
"""Where trials go on side by side: more would take more memory than a small machine has."""
_HIDDEN = re.compile(r"/\.[^/\s]+")
_TRACES = ("Traceback", "terminate called", "Fatal Python error", "Exception ignored", "Exception in thread")


@dataclass(frozen=True)
class Trial:
    """What became of a command at which a fault was aimed."""

    at: int
    """Number of the operation, from 1."""
    what: str
    """The first operation that went wrong, such as "write /folder/file"; "": the command had none of that number."""
    problems: list[str]


class Trials:
    """Runs commands in forks of one process that has imported everything; used as a context manager."""

    def __init__(self, folder: Path, afterwards: dict[tuple[str, Sequence[str], str], list[str]]) -> None:
        """
        Args:
            folder: a new one for all files.
            afterwards: filled with what is wrong after a command's second run, by what the first one left; shared
                between places, so that nothing is tried twice.
        """
        self._afterwards = afterwards
        self.inputs, self.work = folder / "root" / "inputs", folder / "root" / "work"
        self._output, self._scratch = folder / "output", folder / "root" / "scratch"
        for new in (self.inputs, self.work, self._scratch):
            new.mkdir(parents=True)
        self.plan = Plan(folder / "plan", folder / "root")
        environment = os.environ | {
            "LD_PRELOAD": str(build(folder)),
            "FAULTS_PLAN": str(self.plan.path),
            "TMPDIR": str(self._scratch),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "COLUMNS": "300",
        }
        self._warm = subprocess.Popen(
            [sys.executable, str(_HERE / "warm.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expected: dict[str, dict[str, Any]] = {}
        self._counts: dict[str, dict[Fault, int]] = {}
        assert self._warm.stdout is not None
        assert self._warm.stdout.readline() == "ready\n"
        write_inputs(self.inputs, lambda arguments: self.command(arguments)[0])

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *error: object) -> None:
        self._warm.communicate(timeout=60)

    def command(
        self, arguments: list[str], stderr: Path | None = None, *, stay: bool = False
    ) -> tuple[int | None, str]:
        """Runs a command of avppc; exit code (None: its processes did not end) and what it printed.

        With stay it runs in the process that later ones are forks of, and what it prints is lost.
        """
        assert self._warm.stdin is not None
        assert self._warm.stdout is not None
        self._output.write_bytes(b"")
        stderr = stderr or self._output
        order = {"arguments": arguments, "output": str(self._output), "stderr": str(stderr), "stay": stay}
        self._warm.stdin.write(json.dumps(order) + "\n")
        self._warm.stdin.flush()
        code = json.loads(self._warm.stdout.readline())
        self.plan.stop()
        return code, self._output.read_text(errors="replace")

    def run(self, case: Case, stderr: Path | None = None) -> tuple[int | None, str]:
        """Runs a case's command on what is there."""
        return self.command(list(case.arguments(self.inputs, self.work)), stderr)

    def clear(self, case: Case) -> None:
        """Makes the folders as they are before the command."""
        clear_work(case, self.inputs, self.work)
        shutil.rmtree(self._scratch)
        self._scratch.mkdir()

    def expected(self, case: Case) -> dict[str, Any]:
        """What is there after an undisturbed command."""
        if case.name not in self._expected:
            self.clear(case)
            self.command(list(case.arguments(self.inputs, self.work)), stay=True)
            self.clear(case)
            self.plan.set(Fault.COUNT)
            code, text = self.run(case)
            assert code in case.codes, text
            self._expected[case.name], self._counts[case.name] = snapshot(self.work), self.plan.counts()
        return self._expected[case.name]

    def count(self, case: Case, fault: Fault) -> int:
        """How many operations of the command a fault of this kind can meet."""
        self.expected(case)
        return self._counts[case.name][fault]

    def trial(self, case: Case, fault: Fault, at: int, lasting: bool) -> Trial:
        """Finds what is wrong with how the command takes the fault at operation `at`, and with what comes after."""
        expected = self.expected(case)
        self.clear(case)
        self.plan.set(fault, at, lasting=lasting)
        code, text = self.run(case)
        what = self.plan.what
        problems = [*self._manners(case, fault, code, text)]
        if fault is Fault.FULL and code not in case.codes:
            problems += [f"left {path.relative_to(self.work)}" for path in self.work.rglob(".*")]
        lost = case.may_lose if fault is not Fault.KILL and code in case.codes else ()
        now = case.name, lost, state((self.work, self._scratch), self.work.parent)
        if now not in self._afterwards:
            self._afterwards[now] = [*self._again(case, lost, expected)]
        problems += self._afterwards[now]
        return Trial(at, what, problems)

    def _again(self, case: Case, lost: Collection[str], expected: dict[str, Any]) -> Iterator[str]:
        """What is wrong after the same command, undisturbed."""
        code, text = self.run(case)
        yield from (f"the same command again prints {mark!r}" for mark in _TRACES if mark in text)
        if code in case.codes:
            yield from differences(expected, snapshot(self.work), lost)
        else:
            yield f"the same command again: exit code {code}: {_end(text)}"

    def _manners(self, case: Case, fault: Fault, code: int | None, text: str) -> Iterator[str]:
        """How a command that failed says so."""
        for mark in _TRACES:
            if mark in text:
                yield f"prints {mark!r}: {_end(text)}"
                break
        if code is None:
            yield "its processes do not end"
        elif (
            code in case.codes
            or (fault is Fault.KILL and code == -9)
            or (code == case.refuses and fault is Fault.UNREADABLE)
        ):
            return
        elif code not in (1, 2):
            yield f"exit code {code}"
        elif fault is not Fault.KILL:
            message = text[text.rfind("avppc:") :]
            if _CAUSES[fault] not in message:
                yield f"does not say why: {_end(text)}"
            if str(self.work.parent) not in message:
                yield f"names no file: {_end(text)}"
            if _HIDDEN.search(message.replace(str(self._scratch / ".avppc-features"), "")):  # not the user's
                yield f"names a hidden file: {_end(text)}"


class SideBySide:
    """Trials of one command at a time, in several places; used as a context manager."""

    def __init__(self, folder: Path, places: int = PLACES) -> None:
        self._threads = ThreadPoolExecutor(places)
        afterwards: dict[tuple[str, Sequence[str], str], list[str]] = {}
        self._all = list(self._threads.map(lambda number: Trials(folder / str(number), afterwards), range(places)))
        self._idle: queue.SimpleQueue[Trials] = queue.SimpleQueue()
        for trials in self._all:
            self._idle.put(trials)
        self.first = self._all[0]

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for trials in self._all:
            trials.__exit__(*error)

    def trials(self, case: Case, fault: Fault, lasting: bool, numbers: Iterable[int]) -> Iterator[Trial]:
        """One trial for each operation."""

        def trial(at: int) -> Trial:
            trials = self._idle.get()
            try:
                return trials.trial(case, fault, at, lasting)
            finally:
                self._idle.put(trials)

        return self._threads.map(trial, numbers)


def _end(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-2:])[-400:]


def sample(operations: int, most: int | None, seed: str) -> list[int]:
    """Numbers of operations, from 1: all of them, or one from each of `most` equal parts, the same for a seed."""
    generator = random.Random(seed)
    if most is None or operations <= most:
        return list(range(1, operations + 1))
    return [1 + int((part + generator.random()) * operations / most) for part in range(most)]
