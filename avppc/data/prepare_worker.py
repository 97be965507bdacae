"""The processes of `avppc prepare`: each decodes one unit of videos after the other into shards.

A video may crash or hang the decoder: its process is then replaced, and the video refused when that happens again.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from avppc.clip import CROP_SIZE, NO_LABEL
from avppc.config.data import PrepareConfig
from avppc.data.crop import Crop
from avppc.data.decode import DecodeError, decode_clips
from avppc.data.manifest import Video
from avppc.data.packed import SHARD_FOLDER
from avppc.data.shard import PARTIAL_SUFFIX, ClipShape, ShardRecord, ShardWriter
from avppc.files import write_json

UNIT_FOLDER = "units"
_MAX_FAILURES = 2  # of the process that decodes a video, before the video is refused


@dataclass(frozen=True)
class Unit:
    """Videos that are decoded together, into one shard or (where they are long) more."""

    name: str
    digest: str
    """Of the settings and of the videos' names, sizes and times: equal digests give equal shards."""
    videos: tuple[Video, ...]


@dataclass
class UnitRecord:
    """What came of a unit; lies in OUT/units/NAME.json once all its shards are written."""

    digest: str
    shards: list[ShardRecord] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Source and reason."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """Path and what was converted or filled in."""


@dataclass(frozen=True)
class Progress:
    """Videos and clips done since the last message; the record, when a unit is finished."""

    videos: int = 0
    clips: int = 0
    record: UnitRecord | None = None


def prepare_units(config: PrepareConfig, units: Sequence[Unit]) -> Iterator[Progress]:
    """Decodes the units in processes of their own; yields what they get done.

    Raises:
        OSError: a shard cannot be written (the disk is full, say). Finished units stay.
    """
    pending: deque[tuple[Unit, dict[str, str]]] = deque((unit, {}) for unit in units)
    failures: Counter[tuple[str, str]] = Counter()
    workers = [_Worker(config) for _ in range(min(config.processes, len(units)))]
    try:
        for worker in workers:
            worker.begin(*pending.popleft())
        while busy := [worker for worker in workers if worker.unit is not None]:
            wait([worker.connection for worker in busy], timeout=1.0)
            for worker in busy:
                try:
                    yield from worker.messages(config.timeout_seconds)
                except _WorkerLost as lost:
                    unit, refused = worker.unit, worker.refused
                    assert unit is not None
                    failures[unit.name, lost.path] += 1
                    if failures[unit.name, lost.path] >= _MAX_FAILURES:
                        if not lost.path:
                            raise RuntimeError(f"the processes that decode end outside of any video: {lost}") from lost
                        refused = refused | {lost.path: lost.reason}
                    yield Progress(videos=-worker.videos_done, clips=-worker.clips_done)
                    worker.restart()
                    worker.begin(unit, refused)
                if worker.unit is None and pending:
                    worker.begin(*pending.popleft())
    finally:
        for worker in workers:
            worker.stop(config.out)


class _WorkerLost(Exception):
    """The process died or hangs while it decodes `path`, or outside of any ("")."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path = path
        self.reason = reason


class _Worker:
    """One process, seen from the parent."""

    def __init__(self, config: PrepareConfig) -> None:
        self._config = config
        self.unit: Unit | None = None
        self.refused: dict[str, str] = {}
        self.videos_done = 0
        self.clips_done = 0
        self._start()

    def _start(self) -> None:
        context = _process_context()
        self.connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=_work, args=(theirs, self._config), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, unit: Unit, refused: dict[str, str]) -> None:
        """Gives the process a unit; the videos in `refused` are not decoded but refused with that reason."""
        self.unit, self.refused = unit, refused
        self.videos_done = self.clips_done = 0
        self._current = ""
        self._heard = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has died: messages() is going to notice
            self.connection.send((unit, refused))

    def messages(self, timeout_seconds: float) -> Iterator[Progress]:
        """What the process has said meanwhile."""
        try:
            while self.unit is not None and self.connection.poll():
                kind, value = self.connection.recv()
                self._heard = time.monotonic()
                if kind == "video":
                    self._current = value
                elif kind == "clip":
                    self.clips_done += 1
                    yield Progress(clips=1)
                elif kind == "video done":
                    self.videos_done += 1
                    yield Progress(videos=1)
                elif kind == "error":
                    raise value
                else:
                    self.unit = None
                    yield Progress(record=value)
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode or 0
            cause = f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise _WorkerLost(self._current, f"it crashes the decoder ({cause})") from None
        if self.unit is not None and self._current and time.monotonic() - self._heard > timeout_seconds:
            raise _WorkerLost(self._current, f"the decoder gives nothing for {timeout_seconds:g} s")

    def restart(self) -> None:
        self._kill()
        self._start()

    def stop(self, out: Path) -> None:
        """Ends the process at once, with what it may have left half written."""
        pid = self._process.pid
        self._kill()
        for partial in (out / SHARD_FOLDER).glob(f".*.{socket.gethostname()}.{pid}{PARTIAL_SUFFIX}"):
            partial.unlink(missing_ok=True)

    def _kill(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.join()


def _process_context() -> SpawnContext | ForkServerContext:
    """Where processes come from: never a fork of this one, whose threads decoders and torch do not survive."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not once a process
    return context


def _work(connection: Connection[Any, Any], config: PrepareConfig) -> None:
    """Main function of a process: takes units until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes itself
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    writer = ShardWriter(ClipShape(config.frames, CROP_SIZE, CROP_SIZE), config.clips_per_shard)
    while True:
        try:
            unit, refused = connection.recv()
            record = _decode_unit(connection, config, writer, unit, refused)
            connection.send(("done", record))
        except (EOFError, BrokenPipeError):
            return
        except OSError as error:
            connection.send(("error", error))
            return


def _die_with_parent() -> None:
    """Ends this process, even in the middle of a hanging video, when the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _decode_unit(
    connection: Connection[Any, Any], config: PrepareConfig, writer: ShardWriter, unit: Unit, refused: dict[str, str]
) -> UnitRecord:
    record = UnitRecord(unit.digest)
    folder = config.out / SHARD_FOLDER

    def write(path: str = "") -> None:
        connection.send(("video", ""))  # a slow disk is not the video's fault
        record.shards.append(writer.write(folder / f"{unit.name}-{len(record.shards):02}.safetensors"))
        connection.send(("video", path))

    for video in unit.videos:
        connection.send(("video", video.path))
        if video.path in refused:
            record.refused.append((video.path, refused[video.path]))
            connection.send(("video done", None))
            continue
        notes: dict[str, str] = {}
        for clip in _clips_of(video, config, record):
            source = f"{video.path}#{clip.start_frame}" if clip.start_frame else video.path
            writer.add(
                source,
                video=clip.video.numpy(),
                audio=clip.audio.numpy(),
                label=video.label,
                clip_id=clip_id(source),
                speaker=video.speaker,
            )
            notes = {note.split(":")[0]: note for note in reversed(clip.notes)} | notes
            connection.send(("clip", None))
            if writer.full:
                write(video.path)
        record.notes += [(video.path, note) for note in notes.values()]
        connection.send(("video done", None))
    if len(writer):
        write()
    write_json(config.out / UNIT_FOLDER / f"{unit.name}.json", asdict(record))
    return record


def _clips_of(video: Video, config: PrepareConfig, record: UnitRecord) -> Iterator[Any]:
    """The clips of a video; what is refused of it goes into the record."""
    crop = Crop(config.crop, config.crop_rows, config.crop_columns, config.centre_fraction)
    several = video.label == NO_LABEL and config.stride > 0  # a label belongs to one clip
    try:
        yield from decode_clips(
            config.data / video.path,
            num_frames=config.frames,
            stride=config.stride if several else None,
            crop=crop,
            on_refused=lambda start, reason: record.refused.append(
                (f"{video.path}#{start}" if start else video.path, reason)
            ),
        )
    except DecodeError as error:
        record.refused.append((video.path, error.reason))


def clip_id(source: str) -> int:
    """63 bits of a hash of the source: the same number whatever else is in the data set."""
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest(), "little") >> 1
