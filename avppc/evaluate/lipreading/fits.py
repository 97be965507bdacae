"""One fit of a lip-reading classifier: a row's input, a head, learning rates, a draw of labels.

Which clips are labelled is chosen by a seed, and the same for every encoder that is compared.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from avppc.data.packed.dataset import PackedDataset
from avppc.evaluate.config import EvaluateConfig, HeadName, RowName
from avppc.evaluate.lipreading.classifier import HELD_OUT_SPLITS, ClassifierData, FitConfig, fit_classifier, predict
from avppc.evaluate.lipreading.heads import make_head
from avppc.evaluate.lipreading.inputs import (
    TRAINING_AUGMENT,
    VIEWS,
    EncoderWithHead,
    FeatureSource,
    PictureSource,
    encode_features,
    read_trajectories,
)
from avppc.models.encoder_file import load_encoder
from avppc.models.video import VideoEncoder
from avppc.train.hardware import one_thread, resolve_device, use_bf16
from avppc.train.run_folder import read_run_config

TRAINED_ROWS: tuple[RowName, ...] = ("supervised", "finetuned")


@dataclass(frozen=True)
class Trial:
    """One choice of head and learning rates."""

    head: HeadName
    head_learning_rate: float
    encoder_learning_rate: float | None = None

    def __str__(self) -> str:
        rate = self.head_learning_rate if self.encoder_learning_rate is None else self.encoder_learning_rate
        return f"{self.head}, rate {rate:g}"


@dataclass(frozen=True)
class Fit:
    """A trial on one draw of the labels."""

    row: RowName
    trial: Trial
    draw: int
    selects: bool
    """Whether it only helps to choose a trial: it is never tested, and is shorter if it sees pictures, not features."""

    def __str__(self) -> str:
        return f"{self.row}: {self.trial}, {'trial' if self.selects else f'draw {self.draw + 1}'}"


@dataclass(frozen=True)
class FitResult:
    """The outcome of a fit."""

    val_rate: float
    """Rate of right words on the validation clips at the best epoch, 0 to 1."""
    chosen: Tensor
    """[test clips] int64, the words chosen for them; empty if the fit only selects."""
    seconds: float


def trials_of(config: EvaluateConfig, row: RowName) -> Iterator[Trial]:
    """Every choice that is tried for a row."""
    for head in config.heads:
        if row in TRAINED_ROWS:
            rates = config.scratch_learning_rates if row == "supervised" else config.finetune_learning_rates
            for rate in rates:
                yield Trial(head, min(config.head_learning_rates), rate)
        else:
            for rate in config.head_learning_rates:
                yield Trial(head, rate)


def draws_of(config: EvaluateConfig, row: RowName) -> int:
    """Draws of the labels on which a row is tested; with all labels there is one."""
    if not config.labels_per_word:
        return 1
    return config.training_draws if row in TRAINED_ROWS else config.draws


@dataclass
class Bench:
    """What every fit shares: the clips, the label draws, the run's encoder, the device."""

    config: EvaluateConfig
    verify: bool = True
    """Whether the shards' checksums are verified."""
    label_rows: list[Tensor] = field(init=False)
    """Rows of the labelled training clips, one tensor for each draw."""

    def __post_init__(self) -> None:
        config = self.config
        self.device = resolve_device(config.device)
        self.bf16 = use_bf16(config.precision, self.device)
        data = config.data or read_run_config(config.run).data
        self.encoder = load_encoder(config.run).to(self.device)
        verify = self.verify and config.verify_data
        self.splits = {"train": PackedDataset(data, "train", verify)}
        check_words(data, self.words)
        self.splits |= {split: PackedDataset(data, split, verify) for split in HELD_OUT_SPLITS}
        draws = max(draws_of(config, row) for row in ("frozen", "supervised"))
        self.label_rows = [
            draw_labelled_clips(self.labels("train"), config.labels_per_word, config.seed + draw, self.words)
            for draw in range(draws)
        ]
        if len(self.label_rows[0]) < 2:
            raise ValueError(f"labels_per_word gives {len(self.label_rows[0])} labelled clip in all, 2 are needed")

    @property
    def words(self) -> tuple[str, ...]:
        """The words in the order of their labels."""
        return self.splits["train"].words

    def labels(self, split: str) -> Tensor:
        """[n] int64 words of the clips of a split, -1 where unknown."""
        return self.splits[split].labels

    def fresh_encoder(self) -> VideoEncoder:
        """An encoder of random weights, the same each time."""
        torch.manual_seed(self.config.seed)
        return VideoEncoder(self.encoder.config).to(self.device)

    def features(self, row: RowName) -> FeatureSource | None:
        """What the heads of a row with a fixed encoder see, computed once for all of its fits.

        None if there is no room for it: the fits then see pictures through the frozen encoder.
        """
        rows = torch.cat(self.label_rows[: draws_of(self.config, row)]).unique()
        if row != "ceiling" and self._feature_bytes(len(rows)) > self.config.feature_gigabytes * 1e9:
            return None
        if row == "ceiling":
            assert self.config.trajectories is not None
            return read_trajectories(self.config.trajectories, self.splits, rows)
        encoder = self.encoder if row == "frozen" else self.fresh_encoder()
        return encode_features(encoder, self.splits, rows, self.device, self.bf16)

    def _feature_bytes(self, labelled: int) -> int:
        clips = labelled * len(VIEWS) + sum(len(self.splits[split]) for split in HELD_OUT_SPLITS)
        return 4 * clips * self.splits["train"].shape.frames * self.encoder.out_features

    def run(self, fit: Fit, features: FeatureSource | None = None) -> FitResult:
        """Trains a classifier and, unless the fit only selects, tests it; `features` are those of its row."""
        start = time.perf_counter()
        if features is None:
            val_rate, chosen = self._fit_pictures(fit)
        else:
            with one_thread():  # heads are so small that two threads would only wait for each other
                val_rate, chosen = self._fit_features(fit, features)
        return FitResult(val_rate, chosen, time.perf_counter() - start)

    def _fit_features(self, fit: Fit, features: FeatureSource) -> tuple[float, Tensor]:
        head = self._make_head(fit, features.features)
        groups: list[dict[str, object]] = [{"params": head.parameters(), "lr": fit.trial.head_learning_rate}]
        return self._train_and_test(head, groups, features, fit, self.config.epochs)

    def _fit_pictures(self, fit: Fit) -> tuple[float, Tensor]:
        """A head on the encoder, which is trained with it (from random weights or the run's) or frozen."""
        config, trains = self.config, fit.row in TRAINED_ROWS
        encoder = copy.deepcopy(self.encoder) if fit.row in ("finetuned", "frozen") else self.fresh_encoder()
        head = self._make_head(fit, encoder.out_features).to(self.device)
        model = EncoderWithHead(encoder, head, self.device, self.bf16, frozen=not trains)
        groups: list[dict[str, object]] = [{"params": head.parameters(), "lr": fit.trial.head_learning_rate}]
        if trains:
            groups.insert(0, {"params": encoder.parameters(), "lr": fit.trial.encoder_learning_rate})
        augment = replace(TRAINING_AUGMENT, time_mask_frames=config.recipe.time_mask_frames)
        source = PictureSource(self.splits, encoder, self.device, augment)
        epochs = config.training_epochs if trains else config.epochs
        if fit.selects:
            epochs = min(epochs, config.selection_epochs)
        return self._train_and_test(model, groups, source, fit, epochs)

    def _make_head(self, fit: Fit, features: int) -> nn.Module:
        config = self.config
        torch.manual_seed(config.seed + fit.draw)
        return make_head(fit.trial.head, features, len(self.words), config.head_hidden, config.gru_layers)

    def _train_and_test(
        self, model: nn.Module, groups: list[dict[str, object]], source: ClassifierData, fit: Fit, epochs: int
    ) -> tuple[float, Tensor]:
        config, rows = self.config, self.label_rows[fit.draw]
        device = next(model.parameters()).device
        train = rows, self.labels("train")[rows].to(device)
        settings = FitConfig(epochs, config.batch_size, config.validate_every, config.seed + fit.draw, config.recipe)
        rate = fit_classifier(model, groups, source, train, self.labels("val"), settings)
        return rate, torch.empty(0, dtype=torch.int64) if fit.selects else predict(model, source, "test")


def check_words(data: str | os.PathLike[str], words: Sequence[str]) -> None:
    """ValueError where a data set has no words to tell apart.

    Args:
        data: the data set, for the text of the error.
        words: its words.
    """
    if not words:
        raise ValueError(
            f"{data} has no labels: lip reading is tested on words, which `avppc prepare` takes from folders "
            "VIDEOS/WORD/{train,val,test}. `avppc probe`, `embed` and `check-sync` need no labels"
        )
    if len(words) == 1:
        raise ValueError(f"{data} has one word only, {words[0]}: there is nothing to tell apart")


def draw_labelled_clips(labels: Tensor, per_word: int, seed: int, words: Sequence[str] = ()) -> Tensor:
    """Row numbers of the clips whose labels may be used: `per_word` of each word, 0: all; int64, ascending.

    Args:
        words: what the labels mean, for the text of an error.

    Raises:
        ValueError: a word has fewer clips, or fewer than two words have clips.
    """
    numbers = labels[labels >= 0].unique().tolist()
    if not numbers:
        raise ValueError("the training split has no labelled clips")
    if len(numbers) == 1:
        raise ValueError(f"the training split has clips of one word only, {_name(numbers[0], words)}: 2 are needed")
    rows = []
    for word in numbers:
        of_word = torch.where(labels == word)[0]
        if per_word > len(of_word):
            raise ValueError(
                f"labels_per_word is {per_word}, but {_name(word, words)} has {len(of_word)} training clips"
            )
        generator = np.random.default_rng([seed, word])
        chosen = generator.permutation(len(of_word))[: per_word or len(of_word)]
        rows.append(of_word[torch.from_numpy(chosen)])
    return torch.cat(rows).sort().values


def _name(word: int, words: Sequence[str]) -> str:
    return words[word] if word < len(words) else f"word number {word}"
