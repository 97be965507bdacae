"""The work of worker processes, done in the process of the test."""

from __future__ import annotations

from avppc.data.prepare.pool import Progress


class Silent:
    """As Report, to nobody."""

    def video(self, path):
        pass

    video_done = clip = lambda self: None


def in_this_process(job, units, processes, timeout_seconds):
    """As handle_units."""
    for unit in units:
        yield Progress(videos=len(unit.videos), unit=unit, record=job.handle(unit, {}, Silent()))


class PoolHere:
    """As WorkerPool, in this process; the results come in another order than the units."""

    def __init__(self, job, processes, timeout_seconds):
        self.job = job

    def run(self, units):
        for unit in reversed(units):
            yield Progress(unit=unit, record=self.job.handle(unit, {}, Silent()))

    def close(self):
        pass
