"""`avppc read`: what is said in a video, from the picture alone, as a page: the video with the mouth's box, the
likeliest words over time, and the offset of the sound.

A window as long as the clips that the reader was trained on slides over the video; what it reads belongs to the
window's middle. Neither the video nor all windows are ever in memory: of each window the likeliest words stay.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from avppc.clip import VIDEO_FPS
from avppc.data.config import TRACKED_CROPS, CropSettings
from avppc.data.prepare.worker import Notes, kind_of
from avppc.data.video.crop import Crop
from avppc.data.video.decode import decode_clips
from avppc.data.video.faces import make_crop, make_finder
from avppc.data.video.reader import DecodedClip
from avppc.data.video.source import DecodeError
from avppc.evaluate.config import ReadConfig
from avppc.evaluate.diagnose.check_sync import OffsetMeter
from avppc.evaluate.diagnose.task import load_task
from avppc.evaluate.film import look_at
from avppc.evaluate.lipreading.reader import LipReader, find_words, load_reader
from avppc.evaluate.read_page import GENERATOR, SHOWN, Reading, Windows, write_page
from avppc.files import check_writable, write_json
from avppc.printing import ProgressBar
from avppc.train.hardware import resolve_device, set_up_cpu, use_bf16

_KEPT = 8  # words of each window; the others count as good as nothing
_BATCH = 64
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
    reading = read_video(config)
    windows = reading.windows
    if config.json is not None:
        write_json(config.json, as_json(reading))
    write_page(reading, out)
    print(" ".join(item.word for item in reading.words) or "no word is probable enough")
    for first, last, reason in windows.refused:
        print(f"not read from {first:.2f} to {last:.2f} s: {reason}")
    if windows.damage:
        print(f"not read after {windows.seconds[-1]:.2f} s: {windows.damage}")
    print(f"the page is {out}")
    return 3 if windows.refused or windows.damage else 0


def _check_page(out: Path) -> None:
    """ValueError where the page would replace a file that is none of ours."""
    with contextlib.suppress(FileNotFoundError), out.open("rb") as file:
        if GENERATOR.encode() not in file.read(1000):
            raise ValueError(f"{out} is there already, and not a page of this command: give another --out")


def read_video(config: ReadConfig) -> Reading:
    """Reads a video as execute does, and shows its progress."""
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
    return Reading(config, reader, picture, crop, crop_name, windows, words, offset, problem)


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


def as_json(reading: Reading) -> dict[str, Any]:
    """All that was read, as JSON values: times in seconds of the video, probabilities from 0 to 1."""
    windows, info = reading.windows, reading.reader.info
    return {
        "video": str(reading.config.video),
        "seconds": reading.picture.seconds,
        "text": " ".join(item.word for item in reading.words),
        "words": [asdict(item) for item in reading.words],
        "windows": [
            {
                "seconds": round(float(seconds), 4),
                "words": {
                    reading.reader.words[word]: round(float(share), 4)
                    for word, share in zip(words[:SHOWN], shares[:SHOWN], strict=True)
                },
            }
            for seconds, words, shares in zip(windows.seconds, windows.words, windows.probabilities, strict=True)
        ],
        "window_frames": windows.frames,
        "refused": [
            {"start_seconds": first, "end_seconds": last, "reason": reason} for first, last, reason in windows.refused
        ],
        "damage": windows.damage or None,
        "notes": windows.notes,
        "offset": _offset_json(reading),
        "reader": {
            "row": info.row,
            "labels_per_word": info.labels_per_word,
            "head": info.head,
            "val_wcr": info.val_wcr,
            "test_wcr": info.test_wcr,
            "encoder_sha256": info.encoder_sha256,
            "words": list(info.words),
        },
    }


def _offset_json(reading: Reading) -> dict[str, Any]:
    """The offset of the sound, positive where it is late; or why there is none."""
    if reading.offset is None:
        return {"late_ms": None, "problem": reading.offset_problem}
    overall = reading.offset.overall
    late = [None if math.isnan(value) else round(value, 1) for value in reading.offset.late_ms.tolist()]
    return {
        "late_ms": round(overall.offset_ms, 1) if overall.is_clear else None,
        "problem": None if overall.is_clear else "sound and picture have too little to do with each other",
        "seconds": [round(value, 3) for value in reading.offset.seconds.tolist()],
        "late_ms_at": late,
    }
