"""A lip reader in one file: the encoder, the head that `avppc evaluate` has trained on it, and the words it knows.

And from the likeliest words of each moment of a video to the words that are said in it, one after the other.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from avppc.checks import check_choice, check_integer, check_number, check_path, check_types
from avppc.clip import VIDEO_FPS
from avppc.data.augment import crop_video
from avppc.data.config import CropSettings
from avppc.evaluate.config import HEADS, HeadName
from avppc.evaluate.lipreading.heads import make_head
from avppc.evaluate.lipreading.results import decisive
from avppc.files import sha256_of
from avppc.models.config import EncoderConfig
from avppc.models.encoder_file import ENCODER_FILE, make_model, read_model, write_model
from avppc.models.video import VideoEncoder
from avppc.settings import config_from_dict
from avppc.train.hardware import autocast

FORMAT, VERSION = "avppc-reader", 1
READER_ROWS = ("frozen", "finetuned")
"""Rows of the lip-reading table that leave a reader: those of the run's own encoder."""


# Chosen on the validation sentences of GRID's first talker, 70 of them.
SWITCH_COST = 5.0  # nats, at a step of one frame
LEAST_PROBABILITY = 0.25  # of a word at its best moment
_RARE = 1e-3  # the probability of a word that is not among the likeliest ones
_NEAR_SECONDS = 0.12  # beyond the ends of a word, in which it still counts as read there


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
        check_choice("head", self.head, HEADS)
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


def has_reader(folder: Path, row: str, labels_per_word: int, settings: dict[str, Any]) -> bool:
    """Whether the reader of a row that was evaluated with these settings is there, whole."""
    try:
        info = _read(reader_path(folder, row, labels_per_word)).info
    except (FileNotFoundError, ValueError):
        return False
    return decisive(info.settings) == decisive(settings)


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
            f"{run} has no reader: avppc evaluate --run {run} --rows frozen trains one, and keeps it; with "
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


@dataclass(frozen=True)
class SpokenWord:
    """A word that was read."""

    word: str
    start_seconds: float
    """When it becomes the likeliest word."""
    end_seconds: float
    """When another one does."""
    seconds: float
    """When it is most probable."""
    probability: float
    """Then, 0 to 1."""


def find_words(
    seconds: NDArray[np.float64],  # [n]
    numbers: NDArray[np.int32],  # [n, K]
    probabilities: NDArray[np.float32],  # [n, K]
    words: Sequence[str],
) -> list[SpokenWord]:
    """The row of words that explains the likeliest words of each moment best: the path through them with the largest
    product of probabilities, where each change of the word costs a factor exp(-SWITCH_COST).

    Args:
        seconds: of the moments, growing; where the step is larger than usual, nothing is known in between.
        numbers: of the likeliest words of each moment.
        probabilities: theirs.
        words: the vocabulary.
    """
    if not len(seconds):
        return []
    step = float(np.diff(seconds).min()) if len(seconds) > 1 else 1 / VIDEO_FPS
    cuts = np.flatnonzero(np.diff(seconds) > 1.5 * step) + 1
    found: list[SpokenWord] = []
    for part in np.split(np.arange(len(seconds)), cuts):
        path = _best_path(numbers[part], probabilities[part], len(words), SWITCH_COST / (step * VIDEO_FPS))
        begin = 0
        for word, group in itertools.groupby(path):
            moments = part[begin : begin + len(list(group))]
            begin += len(moments)
            chances = np.where(numbers[moments] == word, probabilities[moments], 0.0).max(1)
            best = int(chances.argmax())
            if chances[best] >= LEAST_PROBABILITY:
                start, end = float(seconds[moments[0]]) - step / 2, float(seconds[moments[-1]]) + step / 2
                spoken = (start, end, float(seconds[moments[best]]), float(chances[best]))
                found.append(SpokenWord(words[word], *spoken))
    return found


def _best_path(
    numbers: NDArray[np.int32],  # [n, K]
    probabilities: NDArray[np.float32],  # [n, K]
    words: int,
    switch_cost: float,
) -> list[int]:
    """The word of each moment. What is kept for the way back is one bit a word and moment."""
    rare = np.log(_RARE)
    gains = np.log(probabilities.astype(np.float64) + _RARE) - rare  # above that of a rare word
    scores = np.zeros(words)
    scores[numbers[0]] = gains[0]
    stays: list[NDArray[np.uint8]] = []
    froms: list[int] = []
    for likeliest, gain in zip(numbers[1:], gains[1:], strict=True):
        best = int(scores.argmax())
        switched = scores[best] - switch_cost
        stay = scores >= switched
        stays.append(np.packbits(stay))
        froms.append(best)
        scores = np.where(stay, scores, switched)
        scores[likeliest] += gain
    path = [int(scores.argmax())]
    for bits, best in zip(reversed(stays), reversed(froms), strict=True):
        word = path[-1]
        stayed = bits[word >> 3] >> (7 - (word & 7)) & 1
        path.append(word if stayed else best)
    return path[::-1]


@dataclass(frozen=True)
class TrueWord:
    """A word that is said, as somebody has written it down."""

    word: str
    start_seconds: float
    end_seconds: float
    known: bool
    """Whether it is in the vocabulary."""
    found: bool
    """Whether it is among the words that were read, most probable at a moment within it, or nearly so."""
    at_middle: str
    """The likeliest word at its middle; "" where nothing was read within _NEAR_SECONDS of it."""

    @property
    def right_at_middle(self) -> bool:
        """Whether that is this word."""
        return self.at_middle == self.word


def compare(
    truth: Sequence[tuple[str, float, float]],
    found: Sequence[SpokenWord],
    seconds: NDArray[np.float64],  # [n]
    likeliest: NDArray[np.int32],  # [n]
    words: Sequence[str],
) -> list[TrueWord]:
    """What was read of each word that is said. Capital letters and small ones are the same.

    Args:
        truth: word, start and end in seconds.
        found: the words that were read.
        seconds: the moments.
        likeliest: the number of the likeliest word of each.
        words: the vocabulary.
    """
    known = {word.casefold(): word for word in words}
    free = list(found)
    compared = []
    for text, start, end in truth:
        word = known.get(text.casefold(), text)
        match = next((item for item in free if item.word == word and _is_near(item.seconds, start, end)), None)
        if match is not None:
            free.remove(match)  # it is one word's alone
        middle = (start + end) / 2
        nearest = int(np.abs(seconds - middle).argmin())
        at_middle = words[likeliest[nearest]] if abs(seconds[nearest] - middle) <= _NEAR_SECONDS else ""
        compared.append(TrueWord(word, start, end, text.casefold() in known, match is not None, at_middle))
    return compared


def _is_near(moment: float, start: float, end: float) -> bool:
    return start - _NEAR_SECONDS <= moment <= end + _NEAR_SECONDS
