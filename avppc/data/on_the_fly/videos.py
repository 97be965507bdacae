"""Clips decoded when they are asked for, instead of packed shards: for a first look, or where the disk is small.

A VideoDataset decodes on threads whatever it is given; a ListedDataset the clips of a list, in processes of its own.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avppc.checks import check_integer
from avppc.clip import CLIP_FRAMES, CROP_SIZE, NO_LABEL, Clip, ClipBatch
from avppc.data.config import PrepareConfig
from avppc.data.on_the_fly.listing import TRACK_FOLDER, ClipList, Entry, checksum_of
from avppc.data.packed.dataset import BufferPool, check_rows
from avppc.data.packed.shard import ClipShape
from avppc.data.prepare.pool import Progress, Report, Unit, WorkerPool
from avppc.data.prepare.worker import CHANGED, clip_id, clip_of_word
from avppc.data.scan import Video, WordSpan
from avppc.data.video.crop import Crop
from avppc.data.video.decode import SEEK_BEYOND_FRAMES, Backend, decode_clip
from avppc.data.video.faces import make_crop
from avppc.data.video.source import DecodeError, damage_as_decode_error
from avppc.data.video.track import MouthTrack
from avppc.files import sha256_of

_MOST_CLIPS_PER_UNIT = 8  # of one process at a time


@dataclass(frozen=True)
class VideoClip:
    """A clip that is still in its video."""

    path: Path
    start_frame: int = 0
    """In frames of 1/25 s from the video's first."""
    label: int = NO_LABEL
    clip_id: int = 0
    speaker: int = -1
    crop: Crop | None = None
    """Of this video; None: that of all."""


def first_clips(root: Path, videos: Sequence[Video]) -> list[VideoClip]:
    """The clip at the start of each video of a scan, with the ids that `avppc prepare` gives them."""
    return [VideoClip(root / v.path, 0, v.label, clip_id(v.path), v.speaker) for v in videos]


class VideoDataset:
    """Decodes batches of clips on threads; takes the place of a PackedDataset in a ClipLoader.

    Raises (in batch):
        DecodeError: a clip cannot be decoded; `avppc index` tells such videos beforehand.
    """

    def __init__(
        self,
        clips: Sequence[VideoClip],
        *,
        num_frames: int = CLIP_FRAMES,
        crop: Crop | None = None,
        backend: Backend = "pyav",
        threads: int = 0,
    ) -> None:
        check_integer("threads", threads, 0, 1024)
        self.clips = tuple(clips)
        self.num_frames = num_frames
        self.crop = crop or Crop()
        self.backend: Backend = backend
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, thread_name_prefix="avppc-decode")

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, indices: Tensor, *, pin_memory: bool = False) -> ClipBatch:
        """The clips of the given numbers, in that order."""
        batch = ClipBatch.stack(list(self._pool.map(self._decode, indices.tolist())))
        return batch.pin_memory() if pin_memory else batch

    def _decode(self, number: int) -> Clip:
        clip = self.clips[number]
        found = decode_clip(
            clip.path,
            start_frame=clip.start_frame,
            num_frames=self.num_frames,
            crop=clip.crop or self.crop,
            backend=self.backend,
        )
        return Clip(found.video, found.audio, clip.label, clip.clip_id, clip.speaker)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


@dataclass(frozen=True)
class ClipTask:
    """A clip to decode, and what is known of it."""

    video: Video
    """Without the words inside it."""
    entry: Entry
    """What the list says of the video."""
    start_frame: int
    word: WordSpan | None
    crc: int


@dataclass(frozen=True)
class ClipUnit(Unit):
    """Clips that one process decodes."""

    places: tuple[int, ...] = ()
    """In the batch."""
    tasks: tuple[ClipTask, ...] = ()


Decoded = tuple[NDArray[np.uint8], NDArray[np.int16]]
"""Pictures [T, H, W] and sound [S] of a clip."""


class ClipJob:
    """Decodes the clips of a unit, to what `avppc prepare` would have packed."""

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self._unseekable: set[Path] = set()

    def handle(self, unit: Unit, refused: dict[str, str], report: Report) -> list[Decoded | str]:
        """The clips, in order; for one that cannot be decoded, why not."""
        assert isinstance(unit, ClipUnit)
        found: list[Decoded | str] = []
        for task in unit.tasks:
            path = task.video.path
            report.video(path)
            try:
                if path in refused:
                    raise DecodeError(path, refused[path])
                found.append(self.decode(task))
            except DecodeError as error:
                found.append(error.reason)
        report.video("")
        return found

    def decode(self, task: ClipTask) -> Decoded:
        """A clip's pictures and sound.

        Raises:
            DecodeError: the video is gone, has changed since it was listed, or cannot be decoded.
        """
        config, path = self.config, self.config.data / task.video.path
        with damage_as_decode_error(path):
            _check_unchanged(config, task)
        crop = _crop_of(config, task)
        found = self._decode(path, task, crop, may_seek=path not in self._unseekable)
        looked_up = config.backend == "pyav" and task.start_frame > SEEK_BEYOND_FRAMES
        if looked_up and path not in self._unseekable and checksum_of(*found) != task.crc:
            # What was looked up is not quite what comes when all before it is decoded, too.
            self._unseekable.add(path)
            found = self._decode(path, task, crop, may_seek=False)
        return found

    def _decode(self, path: Path, task: ClipTask, crop: Crop, may_seek: bool) -> Decoded:
        config = self.config
        clip = decode_clip(
            path,
            start_frame=task.start_frame,
            num_frames=config.frames,
            crop=crop,
            backend=config.backend,
            may_seek=may_seek,
        )
        if task.word is not None:
            clip = clip_of_word(clip, task.word, config.word_context)
        return clip.video.numpy(), clip.audio.numpy()

    def clean_up(self) -> None:
        """Nothing to do: these workers write no files."""


def _check_unchanged(config: PrepareConfig, task: ClipTask) -> None:
    """DecodeError where a file is not the one that was listed, by size and time or, where these differ, by content."""
    video = task.video
    files = [(video.path, video.bytes, video.mtime_ns, task.entry["sha256"])]
    if video.sound is not None and video.sound_path is not None and task.entry["sound_sha256"] is not None:
        files.append((video.sound_path, video.sound.bytes, video.sound.mtime_ns, task.entry["sound_sha256"]))
    for name, size, mtime_ns, digest in files:
        status = os.stat(config.data / name)
        if (status.st_size, status.st_mtime_ns) != (size, mtime_ns) and sha256_of(config.data / name) != digest:
            raise DecodeError(
                str(config.data / name),
                f"{CHANGED} since its clips were listed ({size:,} bytes then, {status.st_size:,} now): put it back to "
                "go on; a new run lists it anew",
            )


def _crop_of(config: PrepareConfig, task: ClipTask) -> Crop:
    """The crop of a clip; where it follows the mouth, by the track that was found when the video was listed."""
    if "track" not in task.entry:
        return make_crop(config, config.data / task.video.path, None, box=task.video.box)
    name, first, last = task.entry["track"]
    rows = np.load(config.out / TRACK_FOLDER / name, mmap_mode="r", allow_pickle=False)[first:last]
    places = map(tuple, rows["place"].tolist())
    return Crop("track", track=MouthTrack(dict(zip(rows["stamp"].tolist(), places, strict=True))))


def _results(step: Progress) -> tuple[tuple[int, ...], list[Decoded | str]]:
    """Places in the batch and clips, of a step that finishes a unit."""
    return (step.unit.places, step.record) if isinstance(step.unit, ClipUnit) else ((), [])


class ListedDataset:
    """The clips of one split of a folder of videos, decoded in processes; takes the place of a PackedDataset.

    Args:
        clips: of the split, at least one.
        words: of the whole set, in the order of their labels.
        processes: how many decode; they are started when the first batch is asked for.

    Raises (in batch):
        DecodeError: a video is gone, has changed since it was listed, or cannot be decoded any more.
    """

    def __init__(self, clips: ClipList, split: str, words: tuple[str, ...], processes: int) -> None:
        self.clips = clips
        self.directory = clips.config.data
        self.split = split
        self.words = words
        self.shape = ClipShape(clips.config.frames, CROP_SIZE, CROP_SIZE)
        self.sources = clips.sources
        self.labels = torch.tensor(clips.labels(), dtype=torch.int64)
        """[n] int64 indices into `words`, -1 where not known."""
        self.clip_ids = torch.tensor([clip_id(source) for source in self.sources])
        """[n] int64, those of a packed set."""
        speakers = torch.tensor([video.speaker for video in clips.videos])
        self.speakers = speakers[torch.from_numpy(clips.numbers)]
        """[n] int64, -1 where not known."""
        self.processes = processes
        self._buffers = BufferPool()
        self._lock = threading.Lock()
        self._pool: WorkerPool | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of which clips these are, in which order."""
        return self.clips.sha256

    def __len__(self) -> int:
        return len(self.sources)

    def __repr__(self) -> str:
        videos, backend = len(self.clips.videos), self.clips.config.backend
        return (
            f"ListedDataset({str(self.directory)!r}, {self.split!r}: {len(self)} clips of {videos} videos, {backend})"
        )

    def batch(self, indices: Tensor, *, pin_memory: bool = False) -> ClipBatch:
        """The clips of the given numbers, in that order, in CPU memory of the batch's own; as PackedDataset.batch."""
        rows = check_rows(indices, len(self))
        video, audio, failed = self._decode(rows, pin_memory)
        if failed:
            place = min(failed)
            path = self.clips.videos[int(self.clips.numbers[rows[place]])].path
            raise DecodeError(str(self.directory / path), failed[place])
        return self._batch_of(torch.from_numpy(rows), video, audio)

    def batch_of_good(self, indices: Tensor) -> tuple[ClipBatch | None, list[int], dict[int, str]]:
        """The clips that can be decoded, for who can do without the others.

        Returns:
            The batch, None where it would be empty; the numbers of its clips; and by their numbers why others are not
            in it.
        """
        rows = check_rows(indices, len(self))
        video, audio, failed = self._decode(rows, pin_memory=False)
        good = torch.tensor([place for place in range(len(rows)) if place not in failed], dtype=torch.int64)
        chosen = torch.from_numpy(rows)[good]
        batch = self._batch_of(chosen, video[good], audio[good]) if len(good) else None
        return batch, chosen.tolist(), {int(rows[place]): reason for place, reason in failed.items()}

    def _batch_of(self, rows: Tensor, video: Tensor, audio: Tensor) -> ClipBatch:
        return ClipBatch(video, audio, self.labels[rows], self.clip_ids[rows], self.speakers[rows])

    def _decode(self, rows: NDArray[np.int64], pin_memory: bool) -> tuple[Tensor, Tensor, dict[int, str]]:
        """Pictures [N, T, H, W] and sound [N, S] of the clips, and by their places why some cannot be decoded."""
        shape, count = self.shape, len(rows)
        video = self._buffers.empty((count, shape.frames, shape.height, shape.width), torch.uint8, pin_memory)
        audio = self._buffers.empty((count, shape.samples), torch.int16, pin_memory)
        failed: dict[int, str] = {}
        with self._lock:
            pool, self._pool = self._pool or self._start(), None  # not kept where it is left in the middle of its work
            try:
                for step in pool.run(self._units(rows)):
                    for place, found in zip(*_results(step), strict=True):
                        if isinstance(found, str):
                            failed[place] = found
                        else:
                            video[place], audio[place] = map(torch.from_numpy, found)
                self._pool = pool
            finally:
                if self._pool is None:
                    pool.close()
        return video, audio, failed

    def _start(self) -> WorkerPool:
        pool = WorkerPool(ClipJob(self.clips.config), self.processes, self.clips.config.timeout_seconds)
        weakref.finalize(self, pool.close)
        return pool

    def _units(self, rows: NDArray[np.int64]) -> list[ClipUnit]:
        size = min(_MOST_CLIPS_PER_UNIT, -(-len(rows) // (4 * self.processes)))
        units = []
        for start in range(0, len(rows), size):
            places = tuple(range(start, min(start + size, len(rows))))
            tasks = tuple(self._task(int(rows[place])) for place in places)
            units.append(ClipUnit(str(start), "", (), places, tasks))
        return units

    def _task(self, row: int) -> ClipTask:
        number = int(self.clips.numbers[row])
        video, entry = self.clips.videos[number], self.clips.entries[number]
        start, word, crc = self.clips.columns[row].tolist()
        needed = {key: value for key, value in entry.items() if key in ("sha256", "sound_sha256", "track")}
        span = None if word < 0 else (video.words or ())[word]
        return ClipTask(replace(video, words=None), needed, start, span, crc)

    def close(self) -> None:
        """Ends the processes; the next batch asked for starts them anew."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
                self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def video_clips(self) -> list[VideoClip]:
        """The clips as a DaliLoader takes them."""
        numbers = zip(self.labels.tolist(), self.clip_ids.tolist(), self.speakers.tolist(), strict=True)
        config, found = self.clips.config, []
        crops = [make_crop(config, config.data / video.path, None, box=video.box) for video in self.clips.videos]
        starts = self.clips.columns[:, 0].tolist()
        for number, start, facts in zip(self.clips.numbers.tolist(), starts, numbers, strict=True):
            found.append(VideoClip(config.data / self.clips.videos[number].path, start, *facts, crops[number]))
        return found


def as_batch(clips: Sequence[VideoClip], video: Tensor, audio: Tensor) -> ClipBatch:
    """A batch on the video's device."""
    numbers = torch.tensor([[clip.label, clip.clip_id, clip.speaker] for clip in clips]).to(video.device)
    return ClipBatch(video, audio.to(video.device), *(numbers[:, column].contiguous() for column in range(3)))
