"""One fit: a word classifier trained on the labelled clips of one draw, with one head and one choice of learning rates.

Which clips are labelled depends on a seed alone, so that all encoders are compared on the same clips.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from avppc.data.config import AugmentConfig
from avppc.data.packed.dataset import Clips
from avppc.data.source import DataSource
from avppc.evaluate.config import EvaluateConfig, HeadName, RowName
from avppc.evaluate.lipreading.classifier import (
    HELD_OUT_SPLITS,
    VIEWS,
    ClassifierData,
    EncoderWithHead,
    FrozenFeatures,
    MouthPictures,
    encode_features,
    fit_classifier,
    predict,
    read_trajectories,
)
from avppc.evaluate.lipreading.heads import make_head
from avppc.models.encoder_file import load_encoder
from avppc.models.encoders import VideoEncoder
from avppc.train.hardware import one_thread, resolve_device, use_bf16
from avppc.train.run_folder import find_source

TRAINED_ROWS: tuple[RowName, ...] = ("supervised", "finetuned")


@dataclass(frozen=True)
class Trial:
    """One choice of head and learning rates."""

    head: HeadName
    head_learning_rate: float
    encoder_learning_rate: float | None = None
    """None where the encoder is frozen."""

    def __str__(self) -> str:
        rate = self.head_learning_rate if self.encoder_learning_rate is None else self.encoder_learning_rate
        return f"{self.head}, rate {rate:g}"


@dataclass(frozen=True)
class Fit:
    """What to train: a row of the table, head and learning rates, and which draw of labelled clips."""

    row: RowName
    trial: Trial
    draw: int
    """Number of the label draw, from 0."""
    selects: bool
    """Whether it only serves to choose among the trials. Such a fit is not tested, and where the classifier sees
    pictures, not features, it is shorter."""
    keeps: bool = False
    """Whether its result holds the classifier; that of a trial on features always does."""
    trained: FitResult | None = None
    """The trial that was trained alike, on the same draw: its classifier is tested, and no other is trained."""

    def __str__(self) -> str:
        return f"{self.row}: {self.trial}, {'trial' if self.selects else f'draw {self.draw + 1}'}"


@dataclass(frozen=True)
class FitResult:
    """The outcome of a fit."""

    val_rate: float
    """Rate of right words on the validation clips at the best epoch, 0 to 1."""
    predictions: Tensor
    """[test clips] int64, the word that the classifier takes each for; empty if the fit only selects."""
    seconds: float
    classifier: bytes | None = None
    """Weights of a LipReader, but for those that are the run's own, as a safetensors file; if the fit keeps them."""

    def __getstate__(self) -> dict[str, Any]:
        """Without a tensor, which would go to another process through a socket that breaks when that one is killed."""
        return {**vars(self), "predictions": self.predictions.numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, predictions=torch.from_numpy(state["predictions"]))


def trials_of(config: EvaluateConfig, row: RowName) -> Iterator[Trial]:
    """All trials of a row of the table."""
    for head in config.heads:
        if row in TRAINED_ROWS:
            rates = config.scratch_learning_rates if row == "supervised" else config.finetune_learning_rates
            for rate in rates:
                yield Trial(head, min(config.head_learning_rates), rate)
        else:
            for rate in config.head_learning_rates:
                yield Trial(head, rate)


def count_draws(config: EvaluateConfig, row: RowName) -> int:
    """Number of label draws on which a row is tested; with all labels there is nothing to draw, so 1."""
    if not config.labels_per_word:
        return 1
    return config.training_draws if row in TRAINED_ROWS else config.draws


def count_choosing_draws(config: EvaluateConfig, row: RowName) -> int:
    """Number of label draws by which a row's trials are compared; rows that train the encoder take long, so 1."""
    return 1 if row in TRAINED_ROWS else min(config.selection_draws, count_draws(config, row))


@dataclass
class FitInputs:
    """What all fits of an evaluation share: the clips, which of them are labelled, the run's encoder, the device."""

    config: EvaluateConfig
    given: DataSource | None = None
    """Where the clips are; None: as the settings say."""
    verify: bool = True
    """Whether the shards' checksums are verified, if the settings ask for it."""
    processes: int | None = None
    """How many decode the clips, where these are not packed; None: as the source says."""
    labelled: list[Tensor] = field(init=False)
    """For each label draw, int64 indices of the labelled clips in the training split."""

    def __post_init__(self) -> None:
        config = self.config
        self.source = self.given or find_source(config.run, config.data, config.loader)
        self.device = resolve_device(config.device)
        self.bf16 = use_bf16(config.precision, self.device)
        self.encoder = load_encoder(config.run).to(self.device)
        verify = self.verify and config.verify_data
        self.splits: dict[str, Clips] = {"train": self.source.open("train", verify, self.processes)}
        check_words(self.source.data, self.words)
        self.splits |= {split: self.source.open(split, verify, self.processes) for split in HELD_OUT_SPLITS}
        draws = max(count_draws(config, row) for row in ("frozen", "supervised"))
        self.labelled = [
            draw_labelled_clips(self.labels("train"), config.labels_per_word, config.seed + draw, self.words)
            for draw in range(draws)
        ]
        if len(self.labelled[0]) < 2:
            raise ValueError(f"labels_per_word gives {len(self.labelled[0])} labelled clip in all, 2 are needed")

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary: a label is the number of its word."""
        return self.splits["train"].words

    def labels(self, split: str) -> Tensor:
        """[n] int64 labels of the clips of a split, -1 where a clip has none."""
        return self.splits[split].labels

    def fresh_encoder(self) -> VideoEncoder:
        """An encoder of random weights, the same each time."""
        torch.manual_seed(self.config.seed)
        return VideoEncoder(self.encoder.config).to(self.device)

    def features(self, row: RowName) -> FrozenFeatures | None:
        """What the heads of a row with a fixed encoder see, computed once for all fits of the row.

        None if the fits see pictures instead: the row trains its encoder, or features would exceed feature_gigabytes.
        """
        if row in TRAINED_ROWS:
            return None
        clips = torch.cat(self.labelled[: count_draws(self.config, row)]).unique()
        if row == "ceiling":
            assert self.config.trajectories is not None
            return read_trajectories(self.config.trajectories, self.splits, clips)
        if self._feature_bytes(len(clips)) > self.config.feature_gigabytes * 1e9:
            return None
        encoder = self.encoder if row == "frozen" else self.fresh_encoder()
        return encode_features(encoder, self.splits, clips, self.device, self.bf16)

    def _feature_bytes(self, labelled: int) -> int:
        clips = labelled * len(VIEWS) + sum(len(self.splits[split]) for split in HELD_OUT_SPLITS)
        return 4 * clips * self.splits["train"].shape.frames * self.encoder.out_features


def train_fit(inputs: FitInputs, fit: Fit, features: FrozenFeatures | None = None) -> FitResult:
    """Trains a classifier and, unless the fit only selects, tests it.

    Args:
        features: inputs.features(fit.row) where the encoder is fixed; without them the classifier sees pictures.
    """
    start = time.perf_counter()
    if features is None:
        val_rate, predictions, weights = _fit_pictures(inputs, fit)
    else:
        with one_thread():  # heads are so small that two threads would only wait for each other
            val_rate, predictions, weights = _fit_features(inputs, fit, features)
    seconds = time.perf_counter() - start
    # As bytes: tensors would go to another process by a file descriptor each.
    keeps = fit.keeps or (fit.selects and features is not None)
    kept = save({name: value.detach().contiguous().cpu() for name, value in weights.items()}) if keeps else None
    return FitResult(val_rate, predictions, seconds, kept)


Fitted = tuple[float, Tensor, dict[str, Tensor]]
"""Rate on the validation clips, predictions of the test clips, and weights by their names in a LipReader."""


def _fit_features(inputs: FitInputs, fit: Fit, features: FrozenFeatures) -> Fitted:
    head = _make_head(inputs, fit, features.width)
    if fit.trained is None or fit.trained.classifier is None:
        groups: list[dict[str, object]] = [{"params": head.parameters(), "lr": fit.trial.head_learning_rate}]
        outcome = _train_and_test(inputs, fit, head, groups, features, inputs.config.epochs)
    else:
        weights = load(fit.trained.classifier)
        head.load_state_dict({name: weights[f"head.{name}"] for name in head.state_dict()})
        outcome = fit.trained.val_rate, predict(head, features, "test")
    standard = {"mean": features.mean, "deviation": features.deviation}
    return *outcome, {**head.state_dict(prefix="head."), **standard}


def _fit_pictures(inputs: FitInputs, fit: Fit) -> Fitted:
    """A head on the encoder, which is trained with it (from random weights or the run's) or frozen."""
    config, trains = inputs.config, fit.row in TRAINED_ROWS
    encoder = copy.deepcopy(inputs.encoder) if fit.row in ("finetuned", "frozen") else inputs.fresh_encoder()
    head = _make_head(inputs, fit, encoder.out_features).to(inputs.device)
    model = EncoderWithHead(encoder, head, inputs.device, inputs.bf16, frozen=not trains)
    groups: list[dict[str, object]] = [{"params": head.parameters(), "lr": fit.trial.head_learning_rate}]
    if trains:
        groups.insert(0, {"params": encoder.parameters(), "lr": fit.trial.encoder_learning_rate})
    augment = AugmentConfig(time_mask_frames=config.recipe.time_mask_frames)  # else the defaults, whatever the run's
    pictures = MouthPictures(inputs.splits, encoder, inputs.device, augment)
    epochs = config.training_epochs if trains else config.epochs
    if fit.selects:
        epochs = min(epochs, config.selection_epochs)
    outcome = _train_and_test(inputs, fit, model, groups, pictures, epochs)
    return *outcome, (model if trains else head).state_dict(prefix="" if trains else "head.")


def _make_head(inputs: FitInputs, fit: Fit, width: int) -> nn.Module:
    config = inputs.config
    torch.manual_seed(config.seed + fit.draw)
    return make_head(fit.trial.head, width, len(inputs.words), config.head_hidden, config.gru_layers)


def _train_and_test(
    inputs: FitInputs, fit: Fit, model: nn.Module, groups: list[dict[str, object]], data: ClassifierData, epochs: int
) -> tuple[float, Tensor]:
    clips, seed = inputs.labelled[fit.draw], inputs.config.seed + fit.draw
    train = clips, inputs.labels("train")[clips].to(next(model.parameters()).device)
    rate = fit_classifier(model, groups, data, train, inputs.labels("val"), inputs.config, epochs, seed)
    return rate, torch.empty(0, dtype=torch.int64) if fit.selects else predict(model, data, "test")


def check_words(data: str | os.PathLike[str], words: Sequence[str]) -> None:
    """ValueError where a data set has fewer than two words, so that there is nothing to classify.

    Args:
        data: the data set, for the text of the error.
        words: its words.
    """
    if not words:
        raise ValueError(
            f"{data} has no labels: lip reading is tested on words, which `avppc prepare` takes from folders "
            "VIDEOS/WORD/{train,val,test}. `avppc diagnose`, `embed` and `check-sync` need no labels"
        )
    if len(words) == 1:
        raise ValueError(f"{data} has one word only, {words[0]}: there is nothing to tell apart")


def draw_labelled_clips(labels: Tensor, per_word: int, seed: int, words: Sequence[str] = ()) -> Tensor:
    """Indices of the clips whose labels may be used: [n] int64, ascending.

    Args:
        labels: [clips] int64, the label of each clip of the training split; -1: none.
        per_word: clips to draw of each word; 0: all.
        seed: another one draws other clips.
        words: the vocabulary, for the text of an error.

    Raises:
        ValueError: a word has fewer clips, or fewer than two words have clips.
    """
    numbers = labels[labels >= 0].unique().tolist()
    if not numbers:
        raise ValueError("the training split has no labelled clips")
    if len(numbers) == 1:
        raise ValueError(f"the training split has clips of one word only, {_name(numbers[0], words)}: 2 are needed")
    drawn = []
    for word in numbers:
        of_word = torch.where(labels == word)[0]
        if per_word > len(of_word):
            raise ValueError(
                f"labels_per_word is {per_word}, but {_name(word, words)} has {len(of_word)} training clips"
            )
        generator = np.random.default_rng([seed, word])
        chosen = generator.permutation(len(of_word))[: per_word or len(of_word)]
        drawn.append(of_word[torch.from_numpy(chosen)])
    return torch.cat(drawn).sort().values


def _name(word: int, words: Sequence[str]) -> str:
    return words[word] if word < len(words) else f"word number {word}"
