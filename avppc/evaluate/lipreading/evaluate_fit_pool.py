"""Where fits run: side by side in processes of one thread or more each, or in this process on a GPU.

The classifiers are small: two processes with a core each train nearly twice as many of them as one with two threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from avppc.evaluate.config import EvaluateConfig, RowName
from avppc.evaluate.lipreading.fits import TRAINED_ROWS, Bench, Fit, FitResult
from avppc.evaluate.lipreading.inputs import FeatureSource
from avppc.files import temporary_place
from avppc.processes import ctrl_c_waits, follow_parent
from avppc.train.hardware import keep_memory


class FitPool:
    """Runs the fits of a bench; used as a context manager."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        config = bench.config
        self.workers = config.worker_processes if bench.device.type == "cpu" else 1
        threads = config.threads or torch.get_num_threads()
        self._held = contextlib.ExitStack()
        # Gigabytes, perhaps: of an evaluation that was killed, the next one removes them.
        self._folder = self._held.enter_context(temporary_place(Path(tempfile.gettempdir()) / "avppc-features"))
        self._folder.mkdir(mode=0o700)
        self._files: dict[RowName, Path | None] = dict.fromkeys(TRAINED_ROWS)
        self._last: tuple[RowName, FeatureSource | None] | None = None
        self._executor: ProcessPoolExecutor | None = None
        if self.workers > 1:
            self._executor = ProcessPoolExecutor(
                self.workers,
                multiprocessing.get_context("spawn"),
                _start_worker,
                (config, max(1, threads // self.workers)),
            )

    def submit(self, fit: Fit) -> Future[FitResult]:
        """Starts a fit; if there is only one process, runs it here and now."""
        if self._executor is not None:
            file = self._file_of(fit.row)
            with ctrl_c_waits():  # it may start a process
                return self._executor.submit(_run_fit, fit, file)
        future: Future[FitResult] = Future()
        future.set_result(self.bench.run(fit, self._features_of(fit.row)))
        return future

    def _file_of(self, row: RowName) -> Path | None:
        """The file of a row's features, which all processes map, so that they are in memory once. None: no features."""
        if row not in self._files:
            self._files[row] = None
            if (features := self.bench.features(row)) is not None:
                path = self._folder / f"{row}.safetensors"
                features.save(path)
                self._files[row] = path
        return self._files[row]

    def _features_of(self, row: RowName) -> FeatureSource | None:
        """A row's features; None: no features. Fits that run one by one come row by row: no other row's are kept."""
        if self._last is None or self._last[0] != row:
            self._last = None  # frees memory first
            self._last = row, None if row in TRAINED_ROWS else self.bench.features(row)
        return self._last[1]

    def __enter__(self) -> FitPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            if error is not None:  # nobody waits for unfinished fits
                for process in list(self._executor._processes.values()):
                    process.kill()
            self._executor.shutdown(cancel_futures=True)
        self._held.close()


# What a process keeps between fits.
_config: EvaluateConfig | None = None
_bench: Bench | None = None
_features: tuple[Path, FeatureSource] | None = None


def _start_worker(config: EvaluateConfig, threads: int) -> None:
    global _config
    follow_parent()
    torch.set_num_threads(threads)
    keep_memory()
    _config = config


def _run_fit(fit: Fit, path: Path | None) -> FitResult:
    global _bench, _features
    assert _config is not None, "_start_worker comes first"
    if _bench is None:  # made here: an error of a process's start would reach nobody
        _bench = Bench(_config, verify=False)  # as the parent has done
    if path is None:
        return _bench.run(fit)
    if _features is None or _features[0] != path:
        _features = path, FeatureSource.load(path)
    return _bench.run(fit, _features[1])
