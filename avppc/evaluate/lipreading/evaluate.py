"""Lip reading: which word is spoken, from the picture alone, with few labels or all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import Tensor

from avppc.data.packed.dataset import data_sha256
from avppc.evaluate.config import EvaluateConfig, RowName
from avppc.evaluate.lipreading.evaluate_fit_pool import FitPool
from avppc.evaluate.lipreading.fits import Bench, Fit, FitResult, Trial, draws_of, trials_of
from avppc.evaluate.lipreading.results import RowResult, print_table, read_row, write_row
from avppc.evaluate.lipreading.results_statistics import mean_and_interval
from avppc.files import sha256_of
from avppc.models.encoder_file import find_encoder
from avppc.printing import Console, TextColumn
from avppc.settings import config_to_dict
from avppc.train.hardware import keep_memory
from avppc.train.run_folder import data_of, read_run_config


def run(config: EvaluateConfig) -> int:
    """`avppc evaluate`: evaluates every row, writes its JSON, and prints the table; returns 0."""
    evaluate(config)
    return 0


def evaluate(config: EvaluateConfig, *, show: bool = True) -> list[RowResult]:
    """The rows asked for, in their order. A row that the same settings already gave is read, not computed again.

    Head, learning rates and epoch of each row are chosen on the validation clips, with the first draw of labels; each
    draw is then tested once.

    Args:
        show: prints the table.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_memory()
    rows = config.rows
    if config.trajectories is not None and "ceiling" not in rows:
        rows = (*rows, "ceiling")
    if "ceiling" in rows and config.trajectories is None:
        raise ValueError("the row 'ceiling' needs trajectories: the directory that `avppc synth` wrote")
    place = config.results or config.run
    data = data_of(config.run, config.data)
    settings = settings_of(config, data)
    known = {row: read_row(place, row, config.labels_per_word, settings) for row in rows}
    work = [RowWork(config, row) for row in rows if known[row] is None]
    if work:
        bench = Bench(replace(config, data=data))
        for done in _run_rows(bench, work):
            result = done.result(bench, settings)
            write_row(place, result)
            known[result.row] = result  # type: ignore[index]  # a row's name is written as it was given
    results = [result for result in known.values() if result is not None]
    if show:
        print_table(results)
    return results


@dataclass
class RowWork:
    """The fits of one row: all trials on the first draw, then the best of them on every draw."""

    config: EvaluateConfig
    row: RowName
    ready: deque[Fit] = field(default_factory=deque)
    """Fits that may start."""
    trials: dict[Trial, FitResult] = field(default_factory=dict)
    draws: dict[int, FitResult] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._all_trials = list(trials_of(self.config, self.row))
        self.ready.extend(Fit(self.row, trial, 0, selects=True) for trial in self._all_trials)

    @property
    def fits(self) -> int:
        """How many fits the row takes."""
        return len(self._all_trials) + draws_of(self.config, self.row)

    @property
    def finished(self) -> bool:
        """Whether every draw is tested."""
        return len(self.draws) == draws_of(self.config, self.row)

    @property
    def best(self) -> Trial:
        """The trial with the best validation rate; the first one of several."""
        return max(self._all_trials, key=lambda trial: self.trials[trial].val_rate)

    def add(self, fit: Fit, result: FitResult) -> None:
        """Takes the outcome of a fit; after the last trial the draws are ready."""
        if not fit.selects:
            self.draws[fit.draw] = result
            return
        self.trials[fit.trial] = result
        if len(self.trials) == len(self._all_trials):
            draws = range(draws_of(self.config, self.row))
            self.ready.extend(Fit(self.row, self.best, draw, selects=False) for draw in draws)

    def result(self, bench: Bench, settings: dict[str, Any]) -> RowResult:
        """The row, once it is finished."""
        labels = bench.labels("test")
        drawn = [self.draws[draw] for draw in range(len(self.draws))]
        rates = [(result.chosen == labels).float().mean().item() for result in drawn]
        mean, half = mean_and_interval(rates, len(labels))
        return RowResult(
            row=self.row,
            labels_per_word=self.config.labels_per_word,
            wcr=mean,
            interval95=half,
            chance=1 / len(bench.words),
            chosen=asdict(self.best),
            trials=[{**asdict(trial), "val_wcr": self.trials[trial].val_rate} for trial in self._all_trials],
            draws=[
                {"seed": self.config.seed + draw, "val_wcr": result.val_rate, "test_wcr": rate}
                for draw, (result, rate) in enumerate(zip(drawn, rates, strict=True))
            ],
            words=list(bench.words),
            tested=len(labels),
            confusion=_confusion(labels, [result.chosen for result in drawn], len(bench.words)),
            seconds=sum(result.seconds for result in [*self.trials.values(), *drawn]),
            settings=settings,
        )


def _run_rows(bench: Bench, rows: list[RowWork]) -> Iterator[RowWork]:
    """Runs all fits, those of the first rows first; yields each row when it is finished."""
    running: dict[Future[FitResult], tuple[RowWork, Fit]] = {}
    with _progress() as progress, FitPool(bench) as pool:
        bar = progress.add_task("lip reading", total=sum(row.fits for row in rows))
        while running or any(row.ready for row in rows):
            for row in rows:
                while row.ready and len(running) < pool.workers:
                    fit = row.ready.popleft()
                    progress.update(bar, description=str(fit))
                    running[pool.submit(fit)] = row, fit
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                row, fit = running.pop(future)
                row.add(fit, future.result())
                progress.advance(bar)
                if row.finished:
                    yield row


def _confusion(labels: Tensor, chosen: list[Tensor], words: int) -> list[list[int]]:
    """[words spoken, words chosen], counts over all draws."""
    counts = torch.zeros(words, words, dtype=torch.int64)
    for draw in chosen:
        counts.index_put_((labels, draw), torch.ones_like(draw), accumulate=True)
    return counts.tolist()


def settings_of(config: EvaluateConfig, data: Path) -> dict[str, Any]:
    """The settings on which a row of these clips depends: a finished row with the same is not computed again.

    Raises:
        ImportError, ValueError, OSError: the index of the data cannot be read.
    """
    settings = config_to_dict(config)
    for name in ("rows", "run", "results", "threads", "workers", "trajectories", "verify_data"):
        del settings[name]
    settings["task"] = read_run_config(config.run).task
    settings["encoder_sha256"] = sha256_of(find_encoder(config.run))
    settings["data_sha256"] = data_sha256(data)
    return settings


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
