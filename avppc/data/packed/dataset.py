"""A packed data set: index.json and memory-mapped shards of decoded clips, gathered into batches at memory speed.

The memory of a batch starts on a page boundary and is used again when the batch is let go. Pages are asked of the
system before they are read only while there is something to read from the disk.
"""

from __future__ import annotations

import hashlib
import importlib.util
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avppc.checks import check_bool, check_choice, check_path, check_tensor
from avppc.clip import NO_LABEL, SPLITS, ClipBatch
from avppc.data.packed.index import SHARD_FOLDER, PackedIndex
from avppc.data.packed.remote import fetch_packed, forget_copy, remote_url
from avppc.data.packed.shard import REMAKE_ADVICE, ClipShape, Shard, ShardRecord, missing_shard
from avppc.files import check_apart, real_path, sha256_of

_resource: Any = importlib.import_module("resource") if importlib.util.find_spec("resource") else None  # not on Windows
_MORE_BATCHES = 16


class Clips(Protocol):
    """One split of a data set, packed or not: what loaders and measures read."""

    split: str
    shape: ClipShape
    words: tuple[str, ...]
    sources: tuple[str, ...]
    """[n] where each clip comes from."""
    labels: Tensor
    """[n] int64 indices into `words`, -1 where not known."""
    clip_ids: Tensor
    """[n] int64."""
    speakers: Tensor
    """[n] int64, -1 where not known."""

    @property
    def sha256(self) -> str:
        """SHA-256 of which clips these are, in which order."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, *, pin_memory: bool = False) -> ClipBatch:
        """The clips of the given numbers, in that order."""

    def close(self) -> None:
        """Lets go of what is open; batches already made stay valid."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class PackedDataset:
    """One split of a packed data set: a folder, or an address such as "s3://bucket/set", whose shards are copied here.

    Raises:
        ValueError: there is no such data set or split, or a shard is not what the index says. With verify=True the
            checksum of each shard is computed first, and a single flipped byte is refused; the message names the shard.
    """

    def __init__(self, directory: str | os.PathLike[str], split: str = "train", verify: bool = True) -> None:
        check_path("directory", directory)
        check_choice("split", split, SPLITS)
        check_bool("verify", verify)
        path = local_folder(directory, [split])
        self._open(path, split, PackedIndex.read(path), verify)

    def _open(self, directory: Path, split: str, index: PackedIndex, verify: bool) -> None:
        self.directory = directory
        self.split = split
        self._index = index
        records = index.shards_of(split, directory)
        self.shape = index.shape
        self.words = index.words
        self.sources = tuple(source for record in records for source in record.sources)
        folder = self.directory / SHARD_FOLDER
        _check_inside(self.directory, records)
        if verify:
            verify_shards(folder, records)
        self._shards = [Shard(folder / record.file, index.shape, record) for record in records]
        self._starts = np.cumsum([0] + [record.clips for record in records])
        self.labels = self._numbers("labels")
        """[n] int64 indices into `words`, -1 where not known."""
        self.clip_ids = self._numbers("clip_ids")
        """[n] int64; a video's clips keep their ids when others are added."""
        self.speakers = self._numbers("speakers")
        """[n] int64, -1 where not known."""
        if not NO_LABEL <= int(self.labels.min()) <= int(self.labels.max()) < len(self.words):
            raise ValueError(
                f"{self.directory}: labels must be from -1 to {len(self.words) - 1}, the number of words - 1"
            )
        self._buffers = BufferPool()
        self._read_ahead = ReadAhead()

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def sha256(self) -> str:
        """SHA-256 of the checksums of the split's shards: which clips it has, in which order."""
        return _sha256_of_records(self._index.shards_of(self.split, self.directory))

    def __repr__(self) -> str:
        shape = self.shape
        return (
            f"PackedDataset({str(self.directory)!r}, {self.split!r}: {len(self)} clips of {shape.frames} frames, "
            f"{shape.height} x {shape.width}, {len(self.words)} words, {len(self._shards)} shards)"
        )

    def batch(self, indices: Tensor, *, pin_memory: bool = False) -> ClipBatch:
        """The clips of the given numbers, in that order, in CPU memory of the batch's own.

        Args:
            indices: [N] int64, each from 0 to len(self) - 1; may repeat.
            pin_memory: page-locked memory, from which copies to a GPU are asynchronous.

        Raises:
            ValueError, TypeError: indices of another type or shape, or out of range.
        """
        rows = check_rows(indices, len(self))
        if not self._shards:
            raise ValueError("the data set is closed")
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        within = (rows - self._starts[numbers]).tolist()
        places = [(self._shards[n], row) for n, row in zip(numbers.tolist(), within, strict=True)]
        read_before = blocks_read()
        if self._read_ahead.wanted:
            for shard, row in places:
                shard.read_ahead(row)
        shape, count = self.shape, len(rows)
        video = self._buffers.empty((count, shape.frames, shape.height, shape.width), torch.uint8, pin_memory)
        audio = self._buffers.empty((count, shape.samples), torch.int16, pin_memory)
        video_rows, audio_rows = video.numpy(), audio.numpy()
        for to_video, to_audio, (shard, row) in zip(video_rows, audio_rows, places, strict=True):
            shard.copy_clip(row, to_video, to_audio)
        self._read_ahead.batch_done(read_before, blocks_read())
        chosen = torch.from_numpy(rows)
        return ClipBatch(video, audio, self.labels[chosen], self.clip_ids[chosen], self.speakers[chosen])

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs to open the same shards; the clips themselves are not pickled."""
        if not self._shards:
            raise ValueError("the data set is closed")
        return {"directory": self.directory, "split": self.split, "index": self._index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Opens the shards anew; their checksums were computed, if asked for, where the data set was first opened."""
        self._open(state["directory"], state["split"], state["index"], verify=False)

    def close(self) -> None:
        """Lets go of the shards; batches already made stay valid."""
        self._shards = []  # their maps go with them

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _numbers(self, name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([shard.numbers(name) for shard in self._shards]))


def check_rows(indices: Tensor, clips: int) -> NDArray[np.int64]:
    """The numbers of clips in a tensor [N]; ValueError, TypeError where they are of another type or out of range."""
    check_tensor("indices", indices)
    if indices.dtype != torch.int64 or indices.ndim != 1 or len(indices) == 0 or indices.is_meta:
        raise ValueError(f"indices must be int64 [N], N >= 1; got {indices.dtype} {list(indices.shape)}")
    rows: NDArray[np.int64] = indices.cpu().numpy()
    if rows.min() < 0 or rows.max() >= clips:
        raise ValueError(f"indices must be from 0 to {clips - 1}, got {rows.min()} to {rows.max()}")
    return rows


def open_shard(
    directory: Path, index: PackedIndex, split: str, record: ShardRecord, verify: bool = True
) -> PackedDataset:
    """Opens one shard as a data set, so that a damaged one does not keep the others out; ValueError if damaged."""
    dataset = PackedDataset.__new__(PackedDataset)
    dataset._open(directory, split, replace(index, splits={split: (record,)}), verify)
    return dataset


def local_folder(directory: str | os.PathLike[str], splits: Sequence[str]) -> Path:
    """The folder of a packed set on this machine; of an address, its index and the splits' shards are copied there.

    Raises:
        ImportError, ValueError, OSError: as fetch_packed.
    """
    url = remote_url(directory)
    return Path(directory) if url is None else fetch_packed(url, splits)


def check_data_apart(out: Path, data: str | os.PathLike[str]) -> None:
    """ValueError where an output folder lies in a packed set's folder, or around it."""
    if remote_url(data) is None:
        check_apart(out, Path(data))


def data_sha256(directory: str | os.PathLike[str]) -> str:
    """SHA-256 of a set's index, which holds the checksum of each shard: the same for the same clips, wherever they lie.

    Raises:
        ImportError, ValueError, OSError: as local_folder; ValueError where there is no index.
    """
    return PackedIndex.read(local_folder(directory, ())).sha256()


def split_sha256(directory: str | os.PathLike[str], split: str) -> str:
    """SHA-256 of the checksums of a split's shards: which clips it has, in which order.

    Raises:
        ImportError, ValueError, OSError: as data_sha256; ValueError where the split has no clips.
    """
    return _sha256_of_records(PackedIndex.read(local_folder(directory, ())).shards_of(split, directory))


def _sha256_of_records(records: Sequence[ShardRecord]) -> str:
    return hashlib.sha256("\n".join(record.sha256 for record in records).encode()).hexdigest()


def _check_inside(directory: Path, records: Sequence[ShardRecord]) -> None:
    inside = real_path(directory)
    for record in records:
        path = directory / SHARD_FOLDER / record.file
        if not real_path(path).is_relative_to(inside):
            raise ValueError(f"{path} is a link that leaves the data set's folder: it is not followed")


def verify_shards(folder: Path, records: Sequence[ShardRecord]) -> None:
    """ValueError that names the first shard that is missing or whose content is not what its record says.

    A damaged copy of a remote set's shard is copied again when the set is next opened.
    """
    for record in records:
        if not (folder / record.file).is_file():
            raise missing_shard(folder / record.file)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda record: sha256_of(folder / record.file), records))
    damaged = [(record, digest) for record, digest in zip(records, digests, strict=True) if digest != record.sha256]
    copies = [forget_copy(folder / record.file) for record, _ in damaged]  # of all, so that one more try heals all
    if damaged:
        record, digest = damaged[0]
        remedy = "the same command copies it again" if copies[0] else REMAKE_ADVICE
        raise ValueError(
            f"{folder / record.file} is damaged: its SHA-256 is {digest}, the index says {record.sha256}; {remedy}"
        )


class BufferPool:
    """Hands out CPU tensors, the memory of released ones again: fresh pages cost more than the copy into them.

    Filling fresh memory ran at 1.9 GB/s, reused memory at 8 GB/s (2 cores of an EPYC, batches of 34 MB).
    """

    _SLOTS = 16

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: list[NDArray[Any]] = [np.empty(0, np.uint8)]
        # A tensor made from an array, or any view of it, counts as one reference more.
        self._references_when_free = sys.getrefcount(self._arrays[0])

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, pin_memory: bool) -> Tensor:
        """[shape] of a dtype, with whatever was in its memory."""
        if pin_memory:  # torch keeps and reuses page-locked memory itself
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        wanted = np.dtype(str(dtype).removeprefix("torch."))
        with self._lock:
            for number in range(len(self._arrays)):
                if sys.getrefcount(self._arrays[number]) == self._references_when_free:
                    array = self._arrays[number]
                    if array.shape == shape and array.dtype == wanted:
                        return torch.from_numpy(array)
            array = _empty_aligned(shape, wanted)
            self._arrays = [*self._arrays[1 - self._SLOTS :], array]
            return torch.from_numpy(array)


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """As np.empty, from the start of a page: whole lines of the cache are written 1.3 times as fast as the halves of
    two, which is what malloc's 16 bytes before the first value make of them."""
    count = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(count + mmap.PAGESIZE, np.uint8)
    start = -memory.ctypes.data % mmap.PAGESIZE
    return memory[start : start + count].view(dtype).reshape(shape)


def blocks_read() -> int | None:
    """How often this thread has waited for a disk so far: blocks read and major page faults, since file systems count
    one or the other; None where the system does not tell."""
    if _resource is None or not hasattr(_resource, "RUSAGE_THREAD"):
        return None
    usage = _resource.getrusage(_resource.RUSAGE_THREAD)
    return int(usage.ru_inblock + usage.ru_majflt)


class ReadAhead:
    """Tells whether to ask the system for a batch's pages before they are read: at first, and for some batches after
    each one that waited for a disk.

    The advice for a clip whose pages are in memory costs 3 us: a fifth of the time of a batch of 128.
    """

    def __init__(self) -> None:
        self._batches_left = _MORE_BATCHES

    @property
    def wanted(self) -> bool:
        """Whether to ask for the pages of the next batch."""
        return self._batches_left > 0

    def batch_done(self, before: int | None, after: int | None) -> None:
        """Counts a batch; takes blocks_read() from before and after it, which are equal where no disk was read."""
        if after is None or after != before:
            self._batches_left = _MORE_BATCHES
        else:
            self._batches_left = max(self._batches_left - 1, 0)
