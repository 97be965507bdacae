"""`avppc evaluate`: which word is spoken, from the picture alone, with few labels or all.

On a CPU the fits run in several processes, since the classifiers are small: two processes with a core each train nearly
twice as many of them as one with two threads. On a GPU they run in this process, one after the other.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from avppc.data.source import DataSource
from avppc.evaluate.config import EvaluateConfig, RowName
from avppc.evaluate.lipreading.classifier import FrozenFeatures
from avppc.evaluate.lipreading.fits import (
    Fit,
    FitInputs,
    FitResult,
    Trial,
    count_choosing_draws,
    count_draws,
    train_fit,
    trials_of,
)
from avppc.evaluate.lipreading.heads import READER_ROWS, ReaderInfo, load_reader, reader_path, save_reader
from avppc.evaluate.lipreading.results import (
    RowResult,
    decisive,
    mean_and_interval,
    pack_answers,
    print_table,
    read_row,
    write_row,
)
from avppc.files import sha256_of, temporary_place
from avppc.models.encoder_file import find_encoder
from avppc.printing import ProgressBar
from avppc.processes import ctrl_c_waits, follow_parent, process_pool
from avppc.settings import config_to_dict
from avppc.train.hardware import set_up_cpu
from avppc.train.run_folder import read_run_config, source_of


def execute(config: EvaluateConfig) -> int:
    """`avppc evaluate`: evaluates every row, writes its JSON, and prints the table; returns 0."""
    evaluate(config)
    return 0


def evaluate(config: EvaluateConfig, *, show: bool = True, keep_readers: bool = True) -> list[RowResult]:
    """Computes the rows asked for and writes each to its file; a row whose file has the same settings is only read.

    Head, learning rates and epoch of each row are chosen on the validation clips, with the first draws of labels; each
    draw is then tested once.

    Args:
        show: prints the table.
        keep_readers: of the rows with the run's encoder, writes the classifier of the draw that reads most validation
            clips, for load_reader.

    Returns:
        The rows in the order of the settings.
    """
    set_up_cpu(config.threads)
    rows = config.rows
    if config.trajectories is not None and "ceiling" not in rows:
        rows = (*rows, "ceiling")
    if "ceiling" in rows and config.trajectories is None:
        raise ValueError("the row 'ceiling' needs trajectories: the directory that `avppc synth` wrote")
    folder = config.results or config.run
    source = source_of(config.run, config.data, config.loader)
    settings = settings_of(config, source)
    known = {row: read_row(folder, row, config.labels_per_word, settings) for row in rows}
    work: list[RowWork] = []
    for row, result in known.items():
        keeps = keep_readers and row in READER_ROWS
        if result is None or (keeps and not _has_reader(folder, row, config.labels_per_word, settings)):
            work.append(RowWork(config, row, keeps, result))
    if work:
        inputs = FitInputs(replace(config, data=source.data), source)
        for done in _measure_rows(inputs, work):
            if done.keeps:
                done.save_reader(inputs, settings, folder)
            if known[done.row] is None:
                result = known[done.row] = done.result(inputs, settings)
                write_row(folder, result)
    results = [result for result in known.values() if result is not None]
    if show:
        print_table(results)
    return results


def _has_reader(folder: Path, row: RowName, labels_per_word: int, settings: dict[str, Any]) -> bool:
    """Whether the reader of a row that was evaluated with these settings is there, whole."""
    try:
        info = load_reader(reader_path(folder, row, labels_per_word)).info
    except (FileNotFoundError, ValueError):
        return False
    return decisive(info.settings) == decisive(settings)


@dataclass
class RowWork:
    """The fits of one row of the table: all trials on the first label draws, then the best of them on every draw."""

    config: EvaluateConfig
    row: RowName
    keeps: bool = False
    """Whether the classifier of the draw with the best validation rate is kept."""
    measured: RowResult | None = None
    """The row, where only its classifier is missing: then that draw is all that is fitted."""
    ready: deque[Fit] = field(default_factory=deque)
    """Fits that may start now."""
    trials: dict[Trial, dict[int, FitResult]] = field(default_factory=dict)
    """Outcomes so far, by trial and number of the label draw, of those that choose among them."""
    draws: dict[int, FitResult] = field(default_factory=dict)
    """Outcomes so far, by number of the label draw."""

    def __post_init__(self) -> None:
        self._numbers = list(range(count_draws(self.config, self.row)))
        self._choosing = range(count_choosing_draws(self.config, self.row))
        if self.measured is None:
            self.trials = {trial: {} for trial in trials_of(self.config, self.row)}
            self.ready.extend(Fit(self.row, trial, draw, True) for draw in self._choosing for trial in self.trials)
            return
        rates = [draw["val_wcr"] for draw in self.measured.draws]
        self._numbers = [rates.index(max(rates))]
        self._add_draws()

    def _add_draws(self) -> None:
        tried = self.trials.get(self.best, {})
        for draw in self._numbers:
            self.ready.append(Fit(self.row, self.best, draw, False, keeps=self.keeps, trained=tried.get(draw)))

    @property
    def fits(self) -> int:
        """How many fits the row takes."""
        return len(self.trials) * len(self._choosing) + len(self._numbers)

    @property
    def finished(self) -> bool:
        """Whether every draw is tested."""
        return len(self.draws) == len(self._numbers)

    @property
    def best(self) -> Trial:
        """The trial with the best validation rate, the mean of its draws; the first one of several."""
        return max(self.trials, key=self._val_rate) if self.measured is None else Trial(**self.measured.chosen)

    def _val_rate(self, trial: Trial) -> float:
        results = self.trials[trial]
        return sum(results[draw].val_rate for draw in sorted(results)) / len(results)

    def add(self, fit: Fit, result: FitResult) -> None:
        """Takes the outcome of a fit; after the last trial the draws are ready."""
        if not fit.selects:
            self.draws[fit.draw] = result
            best = self.best_draw
            for draw, other in self.draws.items():  # classifiers that are not to be kept make room
                self.draws[draw] = other if draw == best else replace(other, classifier=None)
            return
        self.trials[fit.trial][fit.draw] = result
        if all(len(results) == len(self._choosing) for results in self.trials.values()):
            self._add_draws()

    @property
    def best_draw(self) -> int:
        """The draw, of those that are tested, that reads most validation clips; the first one of several."""
        return min(self.draws, key=lambda draw: (-self.draws[draw].val_rate, draw))

    def save_reader(self, inputs: FitInputs, settings: dict[str, Any], folder: Path) -> None:
        """Writes the classifier of the best draw."""
        config, draw = self.config, self.best_draw
        kept = self.draws[draw]
        assert kept.classifier is not None
        info = ReaderInfo(
            encoder=inputs.encoder.config,
            words=tuple(inputs.words),
            frames=inputs.splits["train"].shape.frames,
            head=self.best.head,
            head_hidden=config.head_hidden,
            gru_layers=config.gru_layers,
            row=self.row,
            labels_per_word=config.labels_per_word,
            seed=config.seed + draw,
            val_wcr=kept.val_rate,
            test_wcr=(kept.predictions == inputs.labels("test")).float().mean().item(),
            crop=inputs.source.crop(),
            settings=settings,
        )
        weights = {**inputs.encoder.state_dict(prefix="encoder."), **load(kept.classifier)}
        save_reader(info, weights, reader_path(folder, self.row, config.labels_per_word))

    def result(self, inputs: FitInputs, settings: dict[str, Any]) -> RowResult:
        """The finished row as it is written."""
        labels = inputs.labels("test")
        drawn = [self.draws[draw] for draw in self._numbers]
        rates = [(result.predictions == labels).float().mean().item() for result in drawn]
        mean, half = mean_and_interval(rates, len(labels))
        return RowResult(
            row=self.row,
            labels_per_word=self.config.labels_per_word,
            wcr=mean,
            interval95=half,
            chance=1 / len(inputs.words),
            chosen=asdict(self.best),
            trials=[{**asdict(trial), "val_wcr": self._val_rate(trial)} for trial in self.trials],
            draws=[
                {
                    "seed": self.config.seed + draw,
                    "val_wcr": result.val_rate,
                    "test_wcr": rate,
                    "right": pack_answers((result.predictions == labels).tolist()),
                }
                for draw, (result, rate) in enumerate(zip(drawn, rates, strict=True))
            ],
            words=list(inputs.words),
            tested=len(labels),
            confusion=_confusion(labels, [result.predictions for result in drawn], len(inputs.words)),
            seconds=sum(fit.seconds for fits in [*map(dict.values, self.trials.values()), drawn] for fit in fits),
            settings=settings,
        )


def _measure_rows(inputs: FitInputs, rows: list[RowWork]) -> Iterator[RowWork]:
    """Trains all fits, those of the first rows first; yields each row when it is finished."""
    pending: dict[Future[FitResult], tuple[RowWork, Fit]] = {}
    total = sum(row.fits for row in rows)
    with ProgressBar("lip reading", total, "fits") as progress, FitPool(inputs) as pool:
        while pending or any(row.ready for row in rows):
            for row in rows:
                while row.ready and len(pending) < pool.workers:
                    fit = row.ready.popleft()
                    progress.show(str(fit))
                    pending[pool.submit(fit)] = row, fit
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                row, fit = pending.pop(future)
                row.add(fit, future.result())
                progress.advance()
                if row.finished:
                    yield row


def _confusion(labels: Tensor, predictions: list[Tensor], words: int) -> list[list[int]]:
    """[words spoken, words predicted] counts over all draws."""
    counts = torch.zeros(words, words, dtype=torch.int64)
    for draw in predictions:
        counts.index_put_((labels, draw), torch.ones_like(draw), accumulate=True)
    return counts.tolist()


def settings_of(config: EvaluateConfig, source: DataSource) -> dict[str, Any]:
    """The settings that decide the result of a row; a finished row with the same ones is not computed again.

    Raises:
        ImportError, ValueError, OSError: the index of the data cannot be read.
    """
    settings = config_to_dict(config)
    for name in ("rows", "run", "results", "threads", "workers", "trajectories", "verify_data", "loader"):
        del settings[name]
    settings["task"] = read_run_config(config.run).task
    settings["encoder_sha256"] = sha256_of(find_encoder(config.run))
    settings["data_sha256"] = source.sha256()
    return settings


class FitPool:
    """Runs fits in worker processes, or one by one in this process; used as a context manager."""

    def __init__(self, inputs: FitInputs) -> None:
        self.inputs = inputs
        config = inputs.config
        self.workers = config.worker_processes if inputs.device.type == "cpu" else 1
        threads = config.threads or torch.get_num_threads()
        self._held = contextlib.ExitStack()
        # Features may take gigabytes. What an evaluation leaves here that is killed, the next one removes.
        self._folder = self._held.enter_context(temporary_place(Path(tempfile.gettempdir()) / "avppc-features"))
        self._folder.mkdir(mode=0o700)
        self._files: dict[RowName, Path | None] = {}
        self._last: tuple[RowName, FrozenFeatures | None] | None = None
        self._executor: ProcessPoolExecutor | None = None
        if self.workers > 1:
            context = multiprocessing.get_context("spawn")
            self._executor = process_pool(self.workers, context, _start_worker, max(1, threads // self.workers))

    def submit(self, fit: Fit) -> Future[FitResult]:
        """Starts a fit; if there is only one process, runs it here and now."""
        if self._executor is not None:
            file = self._file_of(fit.row)
            with ctrl_c_waits():  # the first one starts the processes
                return self._executor.submit(_train_in_worker, self.inputs.config, fit, file)
        future: Future[FitResult] = Future()
        future.set_result(train_fit(self.inputs, fit, self._features_of(fit.row)))
        return future

    def _file_of(self, row: RowName) -> Path | None:
        """A file of the row's features, which all workers map into memory together; None where fits see pictures."""
        if row not in self._files:
            self._files[row] = None
            if (features := self.inputs.features(row)) is not None:
                path = self._folder / f"{row}.safetensors"
                features.save(path)
                self._files[row] = path
        return self._files[row]

    def _features_of(self, row: RowName) -> FrozenFeatures | None:
        """The row's features, kept until those of another row are asked for; None where fits see pictures."""
        if self._last is None or self._last[0] != row:
            self._last = None  # frees memory first
            self._last = row, self.inputs.features(row)
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


def _start_worker(threads: int) -> None:
    follow_parent()
    set_up_cpu(threads)


@lru_cache(maxsize=1)
def _inputs_in_worker(config: EvaluateConfig) -> FitInputs:
    """Made by the worker's first fit, not when it starts: an error would reach nobody then."""
    return FitInputs(config, verify=False, processes=1)  # the parent process has verified the shards


_features_in_worker = lru_cache(maxsize=1)(FrozenFeatures.load)


def _train_in_worker(config: EvaluateConfig, fit: Fit, features_file: Path | None) -> FitResult:
    features = None if features_file is None else _features_in_worker(features_file)
    return train_fit(_inputs_in_worker(config), fit, features)
