"""Lip reading: which word is spoken, from the picture alone, with few labels or all."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from avppc.config.evaluate import EvaluateConfig, HeadName, RowName
from avppc.config.plain import config_to_dict
from avppc.data.packed import PackedDataset
from avppc.evaluate.classifier import ClassifierData, FitConfig, fit_classifier, predict
from avppc.evaluate.labels import draw_labeled_clips
from avppc.evaluate.results import RowResult, print_table, read_row, write_row
from avppc.evaluate.sources import EncoderWithHead, PictureSource, encode_features, read_trajectories
from avppc.evaluate.statistics import mean_and_interval
from avppc.files import sha256_of
from avppc.models.encoder_file import ENCODER_FILE, load_encoder
from avppc.models.temporal import make_head
from avppc.models.video import VideoEncoder
from avppc.train.hardware import keep_memory, one_thread, resolve_device, use_bf16
from avppc.train.run import read_run_config


@dataclass(frozen=True)
class Trial:
    """One choice of head and learning rates."""

    head: HeadName
    head_learning_rate: float
    encoder_learning_rate: float | None = None


@dataclass
class Bench:
    """What every row of the table shares: the clips, the label draws, the device."""

    config: EvaluateConfig
    splits: dict[str, PackedDataset]
    encoder: VideoEncoder
    device: torch.device
    bf16: bool
    advance: Callable[[str], None]
    label_rows: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        config, labels = self.config, self.splits["train"].labels
        self.words = self.splits["train"].words
        draws = max(config.draws, config.training_draws) if config.labels_per_word else 1
        self.label_rows = [
            draw_labeled_clips(labels, config.labels_per_word, config.seed + draw) for draw in range(draws)
        ]

    def labels(self, split: str) -> Tensor:
        return self.splits[split].labels

    def fresh_encoder(self) -> VideoEncoder:
        """An encoder of random weights, always the same ones."""
        torch.manual_seed(self.config.seed)
        return VideoEncoder(self.encoder.config).to(self.device)


def run(config: EvaluateConfig) -> int:
    """`avppc evaluate`: evaluates every row, writes its JSON, prints the table; returns 0."""
    evaluate(config)
    return 0


def evaluate(config: EvaluateConfig) -> list[RowResult]:
    """The rows asked for, in their order; a row that the same settings already gave is read, not computed again.

    Head, learning rates and epoch of each row are chosen on the validation clips, with the first draw of labels; each
    draw is then tested once.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_memory()
    device = resolve_device(config.device)
    run_config = read_run_config(config.run)
    encoder = load_encoder(config.run).to(device)
    checksum = sha256_of(config.run / ENCODER_FILE)
    data = config.data or run_config.data
    splits = {split: PackedDataset(data, split) for split in ("train", "val", "test")}
    rows = config.rows
    if config.trajectories is not None and "ceiling" not in rows:
        rows = (*rows, "ceiling")
    if "ceiling" in rows and config.trajectories is None:
        raise ValueError("the row 'ceiling' needs trajectories: the directory that `avppc synth` wrote")
    results = []
    with _progress() as progress:
        bar = progress.add_task("lip reading", total=None)

        def advance(text: str) -> None:
            progress.update(bar, description=text, advance=1)

        bench = Bench(config, splits, encoder, device, use_bf16(config.precision, device), advance)
        progress.update(bar, total=sum(_count_fits(config, row) for row in rows))
        for row in rows:
            settings = {**_settings(config), "encoder_sha256": checksum}
            result = read_row(config.run, row, config.labels_per_word, settings)
            if result is None:
                result = _evaluate_row(bench, row, settings)
                write_row(config.run, result)
            results.append(result)
    print_table(results)
    return results


def _evaluate_row(bench: Bench, row: RowName, settings: dict[str, Any]) -> RowResult:
    start = time.perf_counter()
    trains = row in ("supervised", "finetuned")
    fit = _fit_pictures(bench, row) if trains else _fit_features(bench, row)
    draws = len(bench.label_rows) if not bench.config.labels_per_word else _draws(bench.config, row)
    test_labels = bench.labels("test")
    trials = [(trial, fit(trial, 0, True)[0]) for trial in _trials(bench.config, row)]
    best = max(trials, key=lambda item: item[1])[0]
    drawn, confusion = [], torch.zeros(len(bench.words), len(bench.words), dtype=torch.int64)
    for draw in range(draws):
        val_rate, chosen = fit(best, draw, False)
        right = chosen == test_labels
        drawn.append({"seed": bench.config.seed + draw, "val_wcr": val_rate, "test_wcr": right.float().mean().item()})
        confusion.index_put_((test_labels, chosen), torch.ones_like(chosen), accumulate=True)
    mean, half = mean_and_interval([draw["test_wcr"] for draw in drawn], len(test_labels))
    return RowResult(
        row=row,
        labels_per_word=bench.config.labels_per_word,
        wcr=mean,
        interval95=half,
        chance=1 / len(bench.words),
        chosen=asdict(best),
        trials=[{**asdict(trial), "val_wcr": rate} for trial, rate in trials],
        draws=drawn,
        words=list(bench.words),
        tested=len(test_labels),
        confusion=confusion.tolist(),
        seconds=time.perf_counter() - start,
        settings=settings,
    )


def _trials(config: EvaluateConfig, row: RowName) -> Iterator[Trial]:
    """Every choice that is tried for a row."""
    for head in config.heads:
        if row in ("supervised", "finetuned"):
            rates = config.scratch_learning_rates if row == "supervised" else config.finetune_learning_rates
            for rate in rates:
                yield Trial(head, min(config.head_learning_rates), rate)
        else:
            for rate in config.head_learning_rates:
                yield Trial(head, rate)


Fit = Callable[[Trial, int, bool], tuple[float, Tensor]]
"""(trial, draw, whether it is a trial only) -> validation rate and, unless a trial only, the words chosen in test."""


def _fit_features(bench: Bench, row: RowName) -> Fit:
    """Heads over frozen features, or over the true mouth trajectories."""
    config = bench.config
    rows = torch.cat(bench.label_rows[: config.draws]).unique()
    if row == "ceiling":
        assert config.trajectories is not None
        source = read_trajectories(config.trajectories, bench.splits, rows)
    else:
        bench.advance(f"{row}: features")
        encoder = bench.encoder if row == "frozen" else bench.fresh_encoder()
        source = encode_features(encoder, bench.splits, rows, bench.device, bench.bf16)

    def fit(trial: Trial, draw: int, is_trial: bool) -> tuple[float, Tensor]:
        bench.advance(f"{row}: {trial.head}, rate {trial.head_learning_rate:g}, draw {draw + 1}")
        head = _make_head(bench, trial, source.features, draw)
        groups: list[dict[str, object]] = [{"params": head.parameters(), "lr": trial.head_learning_rate}]
        with one_thread():
            return _fit(bench, head, groups, source, draw, config.epochs, is_trial)

    return fit


def _fit_pictures(bench: Bench, row: RowName) -> Fit:
    """The encoder trained together with the head: from random weights or from the run's."""
    config = bench.config
    source = PictureSource(bench.splits, bench.encoder, bench.device)

    def fit(trial: Trial, draw: int, is_trial: bool) -> tuple[float, Tensor]:
        bench.advance(f"{row}: {trial.head}, rate {trial.encoder_learning_rate:g}, draw {draw + 1}")
        encoder = copy.deepcopy(bench.encoder) if row == "finetuned" else bench.fresh_encoder()
        head = _make_head(bench, trial, encoder.out_features, draw).to(bench.device)
        model = EncoderWithHead(encoder, head, bench.device, bench.bf16)
        groups: list[dict[str, object]] = [
            {"params": encoder.parameters(), "lr": trial.encoder_learning_rate},
            {"params": head.parameters(), "lr": trial.head_learning_rate},
        ]
        epochs = config.selection_epochs if is_trial else config.training_epochs
        return _fit(bench, model, groups, source, draw, epochs, is_trial)

    return fit


def _make_head(bench: Bench, trial: Trial, features: int, draw: int) -> nn.Module:
    torch.manual_seed(bench.config.seed + draw)
    config = bench.config
    return make_head(trial.head, features, len(bench.words), config.head_hidden, config.gru_layers)


def _fit(
    bench: Bench,
    model: nn.Module,
    groups: list[dict[str, object]],
    source: ClassifierData,
    draw: int,
    epochs: int,
    is_trial: bool,
) -> tuple[float, Tensor]:
    rows = bench.label_rows[draw]
    device = next(model.parameters()).device
    train = rows, bench.labels("train")[rows].to(device)
    settings = FitConfig(epochs, bench.config.batch_size, bench.config.validate_every, bench.config.seed + draw)
    rate = fit_classifier(model, groups, source, train, bench.labels("val"), settings)
    return rate, torch.empty(0, dtype=torch.int64) if is_trial else predict(model, source, "test")


def _draws(config: EvaluateConfig, row: RowName) -> int:
    return config.training_draws if row in ("supervised", "finetuned") else config.draws


def _count_fits(config: EvaluateConfig, row: RowName) -> int:
    draws = _draws(config, row) if config.labels_per_word else 1
    return sum(1 for _ in _trials(config, row)) + draws + (row in ("random", "frozen"))


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """The settings on which a row depends; a finished row of the same settings is not computed again."""
    settings = config_to_dict(config)
    for name in ("rows", "run", "threads", "trajectories"):
        del settings[name]
    return settings


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
