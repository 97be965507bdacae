"""One packed shard: a safetensors file of decoded clips, written whole or not at all, read through a memory map.

    labels, clip_ids, speakers   int64  [n]
    audio                        int16  [n, 640 T]
    video                        uint8  [n, T, H, W]

in this order, without gaps. Any safetensors reader opens it; ours checks the header against the file's size and the
index. `verify_shards` of dataset.py checks the checksums of the content.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avppc.clip import SAMPLES_PER_FRAME
from avppc.files import name_in_errors, parse_json, replace_file

_PAGE_BYTES = mmap.PAGESIZE
REMAKE_ADVICE = "`avppc prepare` with the same settings makes it anew"
_HEADER_LIMIT_BYTES = 1 << 16
_ALIGNMENT_BYTES = 4096
_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I16": np.dtype("<i2"), "U8": np.dtype("u1")}


@dataclass(frozen=True)
class ClipShape:
    """What each clip of a packed set looks like."""

    frames: int
    """T, frames of 1/25 s."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""

    @property
    def samples(self) -> int:
        """S, audio samples at 16 kHz."""
        return self.frames * SAMPLES_PER_FRAME

    def tensors(self, clips: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """safetensors dtype and shape of each tensor of a shard of so many clips, in the file's order."""
        return {
            "labels": ("I64", (clips,)),
            "clip_ids": ("I64", (clips,)),
            "speakers": ("I64", (clips,)),
            "audio": ("I16", (clips, self.samples)),
            "video": ("U8", (clips, self.frames, self.height, self.width)),
        }


@dataclass(frozen=True)
class ShardRecord:
    """What the index says of a shard."""

    file: str
    """Its name, without folder."""
    clips: int
    bytes: int
    """Size of the file."""
    sha256: str
    """Hexadecimal digest of the whole file."""
    sources: tuple[str, ...]
    """Where each clip comes from: the video's path below the data's root, and "#29" where it starts at frame 29."""


class ShardWriter:
    """Collects clips in memory and writes them as one file."""

    def __init__(self, shape: ClipShape, capacity: int) -> None:
        self.shape = shape
        self.capacity = capacity
        self._arrays = {name: np.empty(size, _DTYPES[dtype]) for name, (dtype, size) in shape.tensors(capacity).items()}
        self._sources: list[str] = []

    def __len__(self) -> int:
        return len(self._sources)

    @property
    def full(self) -> bool:
        """Whether there is no room for another clip."""
        return len(self) == self.capacity

    def add(self, source: str, **values: Any) -> None:
        """Adds a clip: video [T, H, W], audio [S], label, clip_id, speaker; ValueError where a shape differs."""
        row = len(self)
        if self.full:
            raise ValueError(f"the shard is full with {self.capacity} clips")
        for name, plural in (("label", "labels"), ("clip_id", "clip_ids"), ("speaker", "speakers")):
            self._arrays[plural][row] = values[name]
        for name in ("video", "audio"):
            value, expected = np.asarray(values[name]), self._arrays[name].shape[1:]
            if value.shape != expected or value.dtype != self._arrays[name].dtype:
                raise ValueError(
                    f"{name} of {source} must be {self._arrays[name].dtype} of shape {expected}, "
                    f"got {value.dtype} of shape {value.shape}"
                )
            self._arrays[name][row] = value
        self._sources.append(source)

    def write(self, path: Path) -> ShardRecord:
        """Writes the clips collected so far and starts anew; the file is there whole or not at all.

        Raises:
            OSError: the disk is full or fails; nothing is left behind.
        """
        clips = len(self)
        if clips == 0:
            raise ValueError(f"a shard holds at least one clip, {path} would hold none")
        header = _header(self.shape, clips)
        digest = hashlib.sha256(header)
        with replace_file(path) as temporary, temporary.open("xb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(header))
            for array in self._arrays.values():
                content = array[:clips].data.cast("B")
                digest.update(content)
                _write_all(file.fileno(), content)
            size = file.tell()
        record = ShardRecord(path.name, clips, size, digest.hexdigest(), tuple(self._sources))
        self._sources.clear()
        return record


class Shard:
    """A shard's clips on its read-only memory map.

    Raises:
        ValueError: the file's size or header is not what `record` and `shape` say; the message names the file.
    """

    def __init__(self, path: Path, shape: ClipShape, record: ShardRecord) -> None:
        if not path.is_file():
            raise missing_shard(path)
        self.path = path
        self._bytes = record.bytes
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._handle)
        size = os.fstat(self._handle).st_size
        if size != record.bytes:
            raise ValueError(f"{path} has {size} bytes, the index says {record.bytes}: truncated or overwritten")
        with name_in_errors(path):
            start = os.read(self._handle, 8 + _HEADER_LIMIT_BYTES)
        offsets = _check_header(path, start, size, shape, record.clips)
        self._map = mmap.mmap(self._handle, 0, access=mmap.ACCESS_READ)
        self._arrays = {
            name: np.frombuffer(self._map, _DTYPES[dtype], int(np.prod(size)), offsets[name]).reshape(size)
            for name, (dtype, size) in shape.tensors(record.clips).items()
        }
        can_read_ahead = hasattr(mmap, "MADV_WILLNEED")
        self._read_ahead = [
            (offsets[name], self._arrays[name][0].nbytes) for name in ("audio", "video") if can_read_ahead
        ]

    def numbers(self, name: str) -> NDArray[np.int64]:
        """A copy of labels, clip_ids or speakers, [n]."""
        self._check_size()
        return self._arrays[name].astype(np.int64)

    def copy_clip(
        self,
        row: int,
        video: NDArray[np.uint8],  # [T, H, W]
        audio: NDArray[np.int16],  # [S]
    ) -> None:
        """Copies a clip into these arrays.

        Raises:
            ValueError: the file has been cut short since it was opened; the message names it.
        """
        self._check_size()
        np.copyto(video, self._arrays["video"][row])
        np.copyto(audio, self._arrays["audio"][row])

    def _check_size(self) -> None:
        """To be asked right before each read: of a file that was cut short, a memory map ends the process (SIGBUS).

        Reading without a map needs no such question, but copies at four fifths of its speed.
        """
        size = os.fstat(self._handle).st_size
        if size < self._bytes:
            raise ValueError(
                f"{self.path} has been cut short while it was in use, from {self._bytes:,} to {size:,} bytes; "
                f"{REMAKE_ADVICE}"
            )

    def read_ahead(self, row: int) -> None:
        """Asks the system for a clip's pages in one piece.

        From a cold virtual disk, random batches came at 0.08 GB/s by page faults alone and at 1.3 GB/s with this.
        """
        for offset, row_bytes in self._read_ahead:
            start = offset + row * row_bytes
            past_page = start % _PAGE_BYTES
            self._map.madvise(mmap.MADV_WILLNEED, start - past_page, row_bytes + past_page)


def missing_shard(path: Path) -> ValueError:
    """The error to raise where an index names a shard that is not there."""
    return ValueError(f"{path} is missing; {REMAKE_ADVICE}")


def _entries(shape: ClipShape, clips: int) -> dict[str, dict[str, Any]]:
    """What the header of a shard says of its tensors, which follow each other without gaps."""
    entries, offset = {}, 0
    for name, (dtype, size) in shape.tensors(clips).items():
        start, offset = offset, offset + int(np.prod(size)) * _DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [start, offset]}
    return entries


def _header(shape: ClipShape, clips: int) -> bytes:
    """Length and JSON header, padded with spaces so that the data begin on a page."""
    entries = {"__metadata__": {"format": "pt", "avppc": "packed clips"}} | _entries(shape, clips)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _check_header(path: Path, start: bytes, file_bytes: int, shape: ClipShape, clips: int) -> dict[str, int]:
    """Offsets of the tensors in the file, after checking that it holds exactly what it should."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= min(_HEADER_LIMIT_BYTES, file_bytes - 8):
        raise ValueError(f"{path} is not a packed shard: its header would have {length} bytes")
    try:
        found = parse_json(start[8 : 8 + length])
    except ValueError as error:
        raise ValueError(f"{path} is not a packed shard: its header is not JSON ({error})") from error
    entries = _entries(shape, clips)
    if not isinstance(found, dict) or found.keys() - {"__metadata__"} != entries.keys():
        raise ValueError(f"{path} is not a packed shard: it must hold the tensors {', '.join(entries)}")
    for name, expected in entries.items():
        if found[name] != expected:
            raise ValueError(f"{path}: {name} must be {expected}, got {found[name]}")
    needed = 8 + length + max(entry["data_offsets"][1] for entry in entries.values())
    if file_bytes != needed:
        raise ValueError(f"{path} must have {needed} bytes for {clips} clips, it has {file_bytes}")
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in entries.items()}


def _write_all(handle: int, content: memoryview) -> None:
    while content:
        content = content[os.write(handle, content) :]
