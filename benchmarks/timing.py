"""Times and memory of contestants that take turns, so that a noisy machine disturbs all alike."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Contestant = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of one contestant over the rounds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


def take_turns(
    contestants: dict[str, Contestant],
    *,
    prepare: dict[str, Contestant] | None = None,
    budget_seconds: float = 5.0,
    rounds: tuple[int, int] = (3, 50),
) -> dict[str, Times]:
    """Times of each contestant: as many rounds as the budget allows, within the given fewest and most.

    Each round has an order of its own, the same in every run: a contestant that comes after one that runs the same
    code finds it in the caches, which is worth some 10% of a step of a few hundred microseconds.
    What `prepare` holds under a contestant's name runs before each of its turns and is not timed.
    """
    prepare = prepare or {}

    def turn(name: str) -> float:
        prepare.get(name, lambda: None)()
        start = time.perf_counter()
        contestants[name]()
        return time.perf_counter() - start

    for name in contestants:  # warm-up
        turn(name)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    random_order = random.Random(0)
    start, done = time.perf_counter(), 0
    while done < rounds[0] or (done < rounds[1] and time.perf_counter() - start < budget_seconds):
        for name in random_order.sample(list(contestants), len(contestants)):
            seconds[name].append(turn(name))
        done += 1
    return {name: Times(values) for name, values in seconds.items()}


def peak_extra_mib(contestant: Contestant) -> float:
    """The most memory that torch's CPU allocator had given out at once during a call, above that at its start."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        before = torch.empty(1)  # the first event says what was there already
        contestant()
    del before
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    totals = [event["args"]["Total Allocated"] for event in sorted(events, key=lambda event: event["ts"])]
    return (max(totals) - totals[0]) / 2**20
