"""`avppc read`: what is said in a video, from the picture alone, as a page: the video with the mouth's box, the
likeliest words over time, and the offset of the sound.

A window as long as the clips that the reader was trained on slides over the video; what it reads belongs to the
window's middle. Neither the video nor all windows are ever in memory: of each window the likeliest words stay.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
import torch
from numpy.typing import NDArray

from avppc.clip import VIDEO_FPS
from avppc.data.config import TRACKED_CROPS, CropSettings, PrepareConfig
from avppc.data.prepare.worker import Notes, kind_of
from avppc.data.scan import is_word_file
from avppc.data.video.crop import Crop
from avppc.data.video.decode import decode_clips
from avppc.data.video.faces import make_crop, make_finder
from avppc.data.video.reader import DecodedClip
from avppc.data.video.source import DecodeError
from avppc.data.words import read_table, read_word_file
from avppc.evaluate.diagnose.check_sync import OffsetMeter
from avppc.evaluate.diagnose.task import load_task
from avppc.evaluate.lipreading.heads import LipReader, load_reader
from avppc.evaluate.media import look_at
from avppc.export.config import ReadConfig
from avppc.export.read_page import GENERATOR, Reading, SpokenWord, TrueWord, Windows, as_json, write_page
from avppc.files import check_writable, name_in_errors, write_json
from avppc.printing import ProgressBar
from avppc.train.hardware import resolve_device, set_up_cpu, use_bf16

_KEPT = 8  # words of each window; the others count as good as nothing
_BATCH = 64
# Chosen on the validation sentences of GRID's first talker, 70 of them.
SWITCH_COST = 5.0  # nats, at a step of one frame
LEAST_PROBABILITY = 0.25  # of a word at its best moment
_RARE = 1e-3  # the probability of a word that is not among the likeliest ones
_NEAR_SECONDS = 0.12  # beyond the ends of a word, in which it still counts as read there
_OFFSET_STRIDE_FRAMES = 5  # between the windows in which sound and picture are compared


def execute(config: ReadConfig) -> int:
    """`avppc read`: writes the page and prints the words; 0: all of the video is read, 3: parts of it cannot be.

    Raises:
        DecodeError: nothing of the video can be read, because it is damaged or too short, or shows no face.
        FileNotFoundError, ValueError: there is no reader, or it is damaged; or the page would replace something else.
        ImportError: the crop needs a package that is not installed.
    """
    out = config.out or Path(config.video.stem + ".html")
    _check_page(out)
    for path in filter(None, (out, config.json)):
        check_writable(path)
    truth = _read_truth(config)
    reading = read_video(config, truth)
    windows = reading.windows
    if config.json is not None:
        write_json(config.json, as_json(reading))
    write_page(reading, out)
    print(" ".join(item.word for item in reading.words) or "no word is probable enough")
    for first, last, reason in windows.refused:
        print(f"not read from {first:.2f} to {last:.2f} s: {reason}")
    if windows.damage:
        print(f"not read after {windows.seconds[-1]:.2f} s: {windows.damage}")
    if reading.truth:
        all_words = f"of {len(reading.truth)} words of {config.words}"
        read, right = (sum(each) for each in zip(*((i.found, i.right_at_middle) for i in reading.truth), strict=True))
        print(f"{read} {all_words} are among those read, {right} are the likeliest at their middle")
    print(f"the page is {out}")
    return 3 if windows.refused or windows.damage else 0


def _check_page(out: Path) -> None:
    """ValueError where the page would replace a file that is none of ours."""
    with contextlib.suppress(FileNotFoundError), name_in_errors(out), out.open("rb") as file:
        if GENERATOR.encode() not in file.read(1000):
            raise ValueError(f"{out} is there already, and not a page of this command: give another --out")


def _read_truth(config: ReadConfig) -> list[tuple[str, float, float]]:
    """Word, start and end in seconds of all that config.words says of the video; without a file, nothing."""
    if config.words is None:
        return []
    ignore = frozenset(PrepareConfig.words_ignore)
    if is_word_file(config.words.name):
        listed = read_word_file(config.words, ignore)
    else:
        listed = read_table(config.words, ignore)
        named = {config.video.name, config.video.stem}
        listed.words = [word for word in listed.words if PurePath(word.clip.replace("\\", "/")).name in named]
    if not listed.words:
        raise ValueError(f"{config.words} has no words of {config.video.stem}")
    words = sorted(listed.words, key=lambda word: word.first)
    return [(word.text, word.first / VIDEO_FPS, word.last / VIDEO_FPS) for word in words]


def read_video(config: ReadConfig, truth: Sequence[tuple[str, float, float]] = ()) -> Reading:
    """Reads a video as execute does, and shows its progress.

    Args:
        truth: the words that are said, each with its start and end in seconds.
    """
    set_up_cpu(config.threads)
    device = resolve_device(config.device)
    bf16 = use_bf16(config.precision, device)
    reader = load_reader(config.run).to(device)
    picture = look_at(config.video)
    total = int(picture.seconds * VIDEO_FPS)
    crop, crop_name = _crop(config, reader, total)
    offset, problem = None, ""
    run = config.run if config.run.is_dir() else config.run.parents[1]
    try:
        meter = OffsetMeter(load_task(run, device, bf16))
    except (FileNotFoundError, ValueError) as error:
        meter, problem = None, str(error)
    with ProgressBar("read", total, "frames") as progress:
        windows = _read_windows(config, reader, crop, bf16, meter, progress)
    if meter is not None:
        try:
            offset = meter.finish()
        except ValueError as error:
            problem = str(error)
    words = find_words(windows.seconds, windows.words, windows.probabilities, reader.words)
    compared = compare(truth, words, windows.seconds, windows.words[:, 0], reader.words)
    return Reading(config, reader, picture, crop, crop_name, windows, words, compared, offset, problem)


def _crop(config: ReadConfig, reader: LipReader, total: int) -> tuple[Crop, str]:
    """The crop that is asked for, else the one of the reader's training clips; and what to say of it."""
    given = config.crop != "auto"
    settings: CropSettings = config if given else reader.info.crop
    if settings.crop == "box":
        raise ValueError(
            f"crop 'box' takes the mouth's place from a manifest, {config.video} has none: give --crop window with "
            "--crop-rows and --crop-columns, or --crop mesh"
        )
    name = f"{settings.crop}, {'as given' if given else 'as of the training clips'}"
    if settings.crop not in TRACKED_CROPS:
        return make_crop(settings, config.video, None), name
    finder = make_finder(settings.crop)
    with ProgressBar("find the mouth", total, "frames") as progress:
        return make_crop(settings, config.video, finder, alive=progress.advance), name


def _read_windows(
    config: ReadConfig, reader: LipReader, crop: Crop, bf16: bool, meter: OffsetMeter | None, progress: ProgressBar
) -> Windows:
    found = _Found(reader, bf16, config.stride_frames)
    every = config.stride_frames * max(1, _OFFSET_STRIDE_FRAMES // config.stride_frames)
    damage = ""
    waiting: list[DecodedClip] = []
    done = 0
    try:
        clips = decode_clips(
            config.video,
            num_frames=reader.info.frames,
            stride=config.stride_frames,
            crop=crop,
            on_refused=found.refuse,
            needs_sound=False,
        )
        for clip in clips:
            waiting.append(clip)
            if meter is not None and clip.start_frame % every == 0:
                meter.add(clip)
            if len(waiting) == _BATCH:
                found.add(waiting)
                waiting.clear()
                progress.advance(clip.start_frame - done)
                done = clip.start_frame
    except DecodeError as error:
        if not found.starts and not waiting:
            raise
        damage = error.reason
    if waiting:
        end = waiting[-1].start_frame + reader.info.frames
        found.add(waiting)
        progress.advance(end - done)
    return found.windows(config.video, damage)


class _Found:
    """Collects the likeliest words of the windows."""

    def __init__(self, reader: LipReader, bf16: bool, stride: int) -> None:
        self._reader, self._bf16, self._stride = reader, bf16, stride
        self._device = reader.mean.device
        self._kept = min(_KEPT, len(reader.words))
        self.starts: list[int] = []
        self._words: list[NDArray[np.int32]] = []
        self._probabilities: list[NDArray[np.float32]] = []
        self._refused: list[tuple[int, int, str]] = []
        self._notes = Notes()

    def add(self, clips: list[DecodedClip]) -> None:
        """Reads some windows."""
        batch = torch.stack([clip.video for clip in clips]).to(self._device)
        likeliest = self._reader.read(batch, bf16=self._bf16).topk(self._kept, 1)
        self.starts += [clip.start_frame for clip in clips]
        self._words.append(likeliest.indices.to(torch.int32).cpu().numpy())
        self._probabilities.append(likeliest.values.cpu().numpy())
        for clip in clips:
            self._notes.add(clip.notes)

    def refuse(self, start: int, reason: str) -> None:
        """Notes a window that cannot be read; those in a row for one reason become one entry."""
        if self._refused:
            first, last, before = self._refused[-1]
            if start - last == self._stride and kind_of(before) == kind_of(reason):
                self._refused[-1] = (first, start, before)
                return
        self._refused.append((start, start, reason))

    def windows(self, video: Path, damage: str) -> Windows:
        """All that was read; DecodeError where that is nothing."""
        if not self.starts:
            raise DecodeError(str(video), damage or self._refused[0][2])
        frames = self._reader.info.frames
        middle = frames / 2
        return Windows(
            starts=np.array(self.starts, np.int64),
            words=np.concatenate(self._words),
            probabilities=np.concatenate(self._probabilities),
            frames=frames,
            stride=self._stride,
            refused=[((a + middle) / VIDEO_FPS, (b + middle) / VIDEO_FPS, why) for a, b, why in self._refused],
            damage=damage,
            notes=self._notes.lines(),
        )


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
    free: dict[str, list[SpokenWord]] = {}
    for item in found:
        free.setdefault(item.word, []).append(item)
    compared = []
    for text, start, end in truth:
        word = known.get(text.casefold(), text)
        match = next((item for item in free.get(word, ()) if _is_near(item.seconds, start, end)), None)
        if match is not None:
            free[word].remove(match)  # it is one word's alone
        middle = (start + end) / 2
        nearest = int(np.abs(seconds - middle).argmin())
        at_middle = words[likeliest[nearest]] if abs(seconds[nearest] - middle) <= _NEAR_SECONDS else ""
        compared.append(TrueWord(word, start, end, text.casefold() in known, match is not None, at_middle))
    return compared


def _is_near(moment: float, start: float, end: float) -> bool:
    return start - _NEAR_SECONDS <= moment <= end + _NEAR_SECONDS
