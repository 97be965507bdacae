"""Heads, which turn frame features [N, T, D] into words, and lip readers: an encoder with a head, kept in one file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from avppc.checks import check_choice, check_integer, check_number, check_path, check_types
from avppc.data.augment import crop_video
from avppc.data.config import CropSettings
from avppc.evaluate.config import HEADS, HeadName
from avppc.files import sha256_of
from avppc.models.config import EncoderConfig
from avppc.models.encoder_file import ENCODER_FILE, make_model, read_model, write_model
from avppc.models.encoders import VideoEncoder
from avppc.settings import config_from_dict
from avppc.train.hardware import autocast

FORMAT, VERSION = "avppc-reader", 1
READER_ROWS = ("frozen", "finetuned")
"""Rows of the lip-reading table that leave a reader: those of the run's own encoder."""


class GRUHead(nn.Module):
    """Words from a bidirectional GRU whose logits are averaged over the frames: [N, T, features] -> [N, words]."""

    def __init__(self, features: int, words: int, hidden: int = 64, layers: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        self.dropout_in = nn.Dropout(0.2)
        self.gru = nn.GRU(features, hidden, layers, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(2 * hidden, words)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(self.dropout_in(x))
        # The classifier is linear, so the mean of the frames' logits is the logits of the mean state.
        return self.classify(self.dropout(states.mean(1)))


class TemporalConvHead(nn.Module):
    """Words from two strided convolutions over time: [N, T, features] -> [N, words].

    Conv1d(5, stride 2) - BatchNorm - ReLU - MaxPool(2) - Conv1d(5, stride 2) - BatchNorm - ReLU - mean - two linear
    maps, as usual for lip reading on LRW.
    """

    def __init__(self, features: int, words: int, hidden: int = 64, dropout: float = 0.3) -> None:
        super().__init__()
        self.dropout_in = nn.Dropout(0.2)
        self.conv = nn.Sequential(
            nn.Conv1d(features, 2 * hidden, 5, 2, 2, bias=False),
            nn.BatchNorm1d(2 * hidden),
            nn.ReLU(inplace=True),
            nn.MaxPool1d(2, 2, ceil_mode=True),
            nn.Conv1d(2 * hidden, 4 * hidden, 5, 2, 2, bias=False),
            nn.BatchNorm1d(4 * hidden),
            nn.ReLU(inplace=True),
        )
        self.linear = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(4 * hidden, 2 * hidden), nn.BatchNorm1d(2 * hidden), nn.ReLU(inplace=True)
        )
        self.classify = nn.Linear(2 * hidden, words)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv(self.dropout_in(x).transpose(1, 2)).mean(2)
        return self.classify(self.linear(pooled))


class MultiScaleHead(nn.Module):
    """Words from a multi-scale temporal convolutional network: [N, T, features] -> [N, words].

    Residual blocks of two layers; each layer has convolutions of 3, 5 and 7 frames side by side, dilated by 1, 2, 4, 8
    from block to block; the mean over time goes to one linear map.

    Reference: Martinez, Ma, Petridis, Pantic, "Lipreading using Temporal Convolutional Networks", ICASSP 2020.
    """

    KERNELS = (3, 5, 7)

    def __init__(self, features: int, words: int, hidden: int = 64, blocks: int = 4, dropout: float = 0.2) -> None:
        super().__init__()
        width = len(self.KERNELS) * max(1, hidden // 2)
        self.dropout_in = nn.Dropout(0.2)
        sizes = [features] + [width] * blocks
        self.blocks = nn.Sequential(
            *(
                _MultiScaleBlock(inputs, width, self.KERNELS, 1 << number, dropout)
                for number, inputs in enumerate(sizes[:-1])
            )
        )
        self.classify = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.blocks(self.dropout_in(x).transpose(1, 2)).mean(2))


class _MultiScaleBlock(nn.Module):
    """Two layers of parallel convolutions and a shortcut: [N, inputs, T] -> [N, width, T]."""

    def __init__(self, inputs: int, width: int, kernels: tuple[int, ...], dilation: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(_MultiScaleLayer(channels, width, kernels, dilation, dropout) for channels in (inputs, width))
        )
        self.shortcut = nn.Identity() if inputs == width else nn.Conv1d(inputs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) + self.shortcut(x)).relu()


class _MultiScaleLayer(nn.Module):
    """Convolutions of several lengths side by side: [N, inputs, T] -> [N, width, T]."""

    def __init__(self, inputs: int, width: int, kernels: tuple[int, ...], dilation: int, dropout: float) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv1d(inputs, width // len(kernels), kernel, padding="same", dilation=dilation, bias=False)
            for kernel in kernels
        )
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(torch.cat([branch(x) for branch in self.branches], 1)).relu())


class BinsHead(nn.Module):
    """Words from features averaged in seven bins of time and one linear map: [N, T, features] -> [N, words]."""

    BINS = 7

    def __init__(self, features: int, words: int, dropout: float = 0.3) -> None:
        super().__init__()
        self.dropout_in = nn.Dropout(0.2)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(features * self.BINS, words)

    def forward(self, x: Tensor) -> Tensor:
        bins = nn.functional.adaptive_avg_pool1d(self.dropout_in(x).transpose(1, 2), self.BINS)
        return self.classify(self.dropout(bins.flatten(1)))


def make_head(name: HeadName, features: int, words: int, hidden: int = 64, gru_layers: int = 1) -> nn.Module:
    """A word classifier over frame features: "gru", "tconv" (temporal convolution), "bins" (linear over seven bins of
    time) or "mstcn" (multi-scale temporal convolutions)."""
    if name == "gru":
        return GRUHead(features, words, hidden, gru_layers)
    if name == "tconv":
        return TemporalConvHead(features, words, hidden)
    if name == "bins":
        return BinsHead(features, words)
    if name == "mstcn":
        return MultiScaleHead(features, words, hidden)
    raise ValueError(f"head must be one of {', '.join(HEADS)}; got {name!r}")


@dataclass(frozen=True)
class ReaderInfo:
    """What a reader is made of, and where it comes from."""

    encoder: EncoderConfig
    words: tuple[str, ...]
    """The vocabulary, in the order of the outputs."""
    frames: int
    """Frames of the clips that it was trained on."""
    head: HeadName
    head_hidden: int
    gru_layers: int
    row: str
    """"frozen" or "finetuned", its row of the lip-reading table."""
    labels_per_word: int
    """Labelled clips a word that it was trained on; 0: all."""
    seed: int
    """Of the draw of these clips."""
    val_wcr: float
    """Share of the validation clips that it reads right, 0 to 1."""
    test_wcr: float
    """The same of the test clips."""
    crop: CropSettings
    """How `avppc prepare` has cropped the clips that it was trained on; the defaults where that is not known."""
    settings: dict[str, Any]
    """The settings of the evaluation, the run's task and the checksums of its encoder and of the data's index."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("row", self.row, READER_ROWS)
        check_integer("frames", self.frames, 1, 10_000)
        check_integer("head_hidden", self.head_hidden, 4, 65_536)
        check_integer("gru_layers", self.gru_layers, 1, 1024)
        check_integer("labels_per_word", self.labels_per_word, 0)
        check_integer("seed", self.seed, 0)
        check_number("val_wcr", self.val_wcr, 0, 1)
        check_number("test_wcr", self.test_wcr, 0, 1)
        if not 2 <= len(self.words) <= 1 << 20 or not all(isinstance(word, str) for word in self.words):
            raise ValueError(f"words must hold texts, two at least; got {str(self.words)[:100]}")
        if not isinstance(self.settings, dict):
            raise TypeError(f"settings must be a dict, got {self.settings!r}")

    @property
    def encoder_sha256(self) -> str:
        """Of the encoder file of the run that it belongs to."""
        return str(self.settings.get("encoder_sha256"))


class LipReader(nn.Module):
    """Logits of the words from pictures of a mouth: [N, T, side, side] luma, 0 to 1 -> [N, words].

    The pictures are the encoder's input, as `crop_video` makes it from stored crops; T is what it was trained on,
    info.frames. Features are standardised, as in training, before the head sees them.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, info: ReaderInfo) -> None:
        super().__init__()
        self.info = info
        self.encoder = VideoEncoder(info.encoder)
        width = self.encoder.out_features
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.head = make_head(info.head, width, len(info.words), info.head_hidden, info.gru_layers)

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary, in the order of the logits."""
        return self.info.words

    def forward(self, video: Tensor, *, bf16: bool = False) -> Tensor:
        """Logits [N, words], float32.

        Args:
            video: [N, T, side, side] luma, 16/255 black to 235/255 white, side = info.encoder.input_pixels.
            bf16: computes the encoder's products in bfloat16.
        """
        with autocast(video.device, bf16):
            features = self.encoder(video)
        return self.head((features.float() - self.mean) / self.deviation)

    @torch.inference_mode()
    def read(self, clips: Tensor, *, bf16: bool = False) -> Tensor:
        """Probabilities [N, words] of stored crops [N, T, 96, 96] uint8, as `prepare` and `decode_clip` give them."""
        config = self.info.encoder
        return self(crop_video(clips, config.crop_pixels, config.input_pixels), bf16=bf16).softmax(1)


def reader_path(folder: Path, row: str, labels_per_word: int) -> Path:
    """FOLDER/evaluation/reader-ROW-LABELS.safetensors."""
    return folder / "evaluation" / f"reader-{row}-{labels_per_word or 'all'}.safetensors"


def save_reader(info: ReaderInfo, weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes a reader, atomically.

    Args:
        weights: of the LipReader, by name; "mean" and "deviation" may be left out where features are seen as they are.
    """
    state = {**LipReader(info).state_dict(), **weights}
    write_model(path, state, {"format": FORMAT, "version": VERSION, "config": asdict(info)})


def load_reader(path: str | os.PathLike[str]) -> LipReader:
    """A lip reader in eval mode, from its file or from the directory of a run that `avppc evaluate` has measured.

    Of a run's readers it is the one that reads most validation clips, whatever row and number of labels it is of;
    `reader.info` says which. Those of an encoder that the run has not any more are left out.

    Raises:
        FileNotFoundError: there is no such file, or the run has no reader.
        ValueError: a file is not a reader, or is damaged; the text names it.

    Examples:
        >>> reader = load_reader("runs/demo")                                        # doctest: +SKIP
        >>> reader.words[reader.read(clips).argmax(1)[0]]                            # doctest: +SKIP
        'ABOUT'
    """
    check_path("path", path)
    file = Path(path)
    return _best_reader(file) if file.is_dir() else _read(file)


def _read(file: Path) -> LipReader:
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no reader at {file}: give a reader's file, or the directory of a run that avppc evaluate has "
            "measured"
        )
    values, weights = read_model(file, FORMAT, VERSION)
    info = config_from_dict(ReaderInfo, values.get("config"), str(file))
    return make_model(file, lambda: LipReader(info), values, weights).eval()


def _best_reader(run: Path) -> LipReader:
    files = sorted((run / "evaluation").glob("reader-*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"there is no reader in {run}: avppc evaluate --run {run} --rows frozen trains one, and keeps it; with "
            "--labels-per-word 0 it learns from all labels and reads best"
        )
    readers = [_read(file) for file in files]
    encoder = run / ENCODER_FILE
    if encoder.is_file():
        digest = sha256_of(encoder)
        readers = [reader for reader in readers if reader.info.encoder_sha256 == digest]
    if not readers:
        raise ValueError(
            f"{run} has no reader of its encoder, only of one from before: avppc evaluate --run {run} trains it anew"
        )
    return max(readers, key=lambda reader: (reader.info.val_wcr, reader.info.labels_per_word == 0))
