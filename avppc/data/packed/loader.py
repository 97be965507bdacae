"""Batches for training: in which order, gathered ahead by a thread, copied to the GPU meanwhile, counted when consumed.

The order of the clips is a pure function of (seed, epoch, rank, world size), independent of library versions.
"""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections.abc import Iterator
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avppc.checks import INTEGER_DTYPES, check_device, check_integer, check_tensor
from avppc.clip import ClipBatch
from avppc.data.packed.dataset import Clips
from avppc.draws import bits_of, splitmix64

_POLL_SECONDS = 0.1  # how soon the thread notices that it is to end


class EpochSampler:
    """An endless stream of index tensors, epoch after epoch, each epoch in an order of its own.

    The clips of an epoch are put into one order for all ranks and cut into global batches of batch_size * world_size;
    rank r takes the r-th part of each; what fills no global batch is left out in this epoch. So a run that goes on with
    other ranks but the same global batch sees the same clips in the same steps.

    Args:
        num_clips: clips in the data set, at least 1.
        batch_size: clips a batch on each rank, at least 1.
        seed: of the orders, at least 0; the same on all ranks.
        rank: which part of each global batch this stream hands out, 0 to world_size - 1.
        world_size: ranks that share the global batches, at least 1.
        speakers: [num_clips] integers of at least 0, the speaker of each clip; looked at with speakers_per_batch only.
        speakers_per_batch: each global batch holds this many groups of clips, each group of one speaker; a divisor of
            the global batch. What of a speaker's clips fills no group is left out in this epoch, and so is a remainder
            of groups. None: clips are shuffled whoever speaks.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value, or the clips fill no global batch.
    """

    def __init__(
        self,
        num_clips: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        speakers: Tensor | None = None,
        speakers_per_batch: int | None = None,
    ) -> None:
        check_integer("num_clips", num_clips, 1, 1 << 48)
        check_integer("batch_size", batch_size, 1, 1 << 48)
        check_integer("seed", seed, 0)
        check_integer("world_size", world_size, 1, 1 << 20)
        check_integer("rank", rank, 0, world_size - 1)
        self.num_clips = num_clips
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._speakers = _check_speakers(speakers, speakers_per_batch, num_clips, self.global_batch)
        self._speakers_per_batch = speakers_per_batch
        self._epoch = 0
        self._batches_consumed = 0
        self._order_epoch = -1
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)
        self.batches_per_epoch = self._count_batches()
        """Batches an epoch, the same on each rank and in each epoch."""

    @property
    def global_batch(self) -> int:
        """Clips a step on all ranks together."""
        return self.batch_size * self.world_size

    def state(self) -> dict[str, int]:
        """Where the stream stands: all that is needed to go on from here."""
        return {"epoch": self._epoch, "batches_consumed": self._batches_consumed}

    def load_state(self, state: dict[str, int]) -> None:
        """Goes on where `state` was taken; ValueError for a state that this stream never has."""
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict, got {type(state).__name__}")
        if set(state) != {"epoch", "batches_consumed"}:
            raise ValueError(f"state must have the keys epoch and batches_consumed, got {list(state)}")
        check_integer("state: epoch", state["epoch"], 0)
        check_integer("state: batches_consumed", state["batches_consumed"], 0, self.batches_per_epoch - 1)
        self._epoch, self._batches_consumed = state["epoch"], state["batches_consumed"]

    def copy(self) -> EpochSampler:
        """A stream of its own that stands where this one stands."""
        return copy.copy(self)

    def advance(self) -> None:
        """Counts one batch as consumed."""
        self._batches_consumed += 1
        if self._batches_consumed == self.batches_per_epoch:
            self._epoch, self._batches_consumed = self._epoch + 1, 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """The next batch of this rank, [N] int64; counted as consumed."""
        batch = self.batch(self._epoch, self._batches_consumed)
        self.advance()
        return batch

    def batch(self, epoch: int, number: int) -> Tensor:
        """Batch `number` of an epoch on this rank, [N] int64; the stream stays where it is."""
        check_integer("epoch", epoch, 0)
        check_integer("number", number, 0, self.batches_per_epoch - 1)
        order = self.order(epoch)[number * self.global_batch : (number + 1) * self.global_batch]
        return torch.from_numpy(np.array_split(order, self.world_size)[self.rank].copy())

    def order(self, epoch: int) -> NDArray[np.int64]:
        """All clips used in an epoch on all ranks, in order."""
        if epoch != self._order_epoch:
            if self._speakers is None:
                self._order = _permutation(self.num_clips, self.seed, epoch)
            else:
                self._order = self._grouped_order(epoch)
            self._order_epoch = epoch
        return self._order

    def _count_batches(self) -> int:
        clips = self.num_clips
        if self._speakers is not None:
            group = self._group_size
            _, counts = np.unique(self._speakers, return_counts=True)
            clips = int((counts // group).sum()) * group
        batches = clips // self.global_batch
        if batches == 0:
            raise ValueError(
                f"batch_size must be one that {clips} clips fill on each of {self.world_size} ranks, "
                f"got {self.batch_size}"
                + ("" if self._speakers is None else f" in groups of {self._group_size} clips of one speaker")
            )
        return batches

    @property
    def _group_size(self) -> int:
        assert self._speakers_per_batch is not None
        return self.global_batch // self._speakers_per_batch

    def _grouped_order(self, epoch: int) -> NDArray[np.int64]:
        """Each speaker's clips, shuffled and cut into groups; then the groups shuffled."""
        assert self._speakers is not None
        size = self._group_size
        shuffled = _permutation(self.num_clips, self.seed, epoch)
        by_speaker = shuffled[np.argsort(self._speakers[shuffled], kind="stable")]
        _, starts, counts = np.unique(self._speakers[by_speaker], return_index=True, return_counts=True)
        groups = np.concatenate(
            [
                by_speaker[start : start + count // size * size].reshape(-1, size)
                for start, count in zip(starts, counts, strict=True)
            ]
        )
        # The clips' own order is used up by now: the groups need one of their own.
        return groups[_permutation(len(groups), self.seed, epoch, stream=1)].reshape(-1)


def _permutation(count: int, seed: int, epoch: int, stream: int = 0) -> NDArray[np.int64]:
    """Numbers 0 to count - 1, sorted by 64-bit keys that splitmix64 makes of (seed, epoch, stream, number)."""
    start = 0
    for value in (seed, epoch, stream):
        start = splitmix64(start ^ value % (1 << 64))
    keys = bits_of(start, torch.arange(count)).numpy()
    return np.argsort(keys.view(np.uint64), kind="stable")


def _check_speakers(
    speakers: Tensor | None, speakers_per_batch: int | None, num_clips: int, global_batch: int
) -> NDArray[np.int64] | None:
    if speakers_per_batch is None:
        return None
    check_integer("speakers_per_batch", speakers_per_batch, 1, global_batch)
    if speakers is None:
        raise ValueError("speakers_per_batch needs speakers")
    check_tensor("speakers", speakers)
    if speakers.shape != (num_clips,) or speakers.dtype not in INTEGER_DTYPES or speakers.is_meta:
        raise ValueError(f"speakers must be {num_clips} integers, got {speakers.dtype} {list(speakers.shape)}")
    if int(speakers.min()) < 0:
        raise ValueError("speakers_per_batch needs the speaker of each clip, some are not known (-1)")
    if global_batch % speakers_per_batch:
        raise ValueError(f"speakers_per_batch must divide the global batch of {global_batch}, got {speakers_per_batch}")
    return np.asarray(speakers.cpu().numpy(), np.int64)


class SampledBatches:
    """What ClipLoader and DaliLoader share: an endless stream of batches in a sampler's order, made ahead of time.

    `state()` counts the batches handed out, not those made ahead: a run that loads it gets exactly the clips that were
    to come next. Use as a context manager, or call close().
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        self.wait_seconds = 0.0
        """Time the consumer has waited for data, in all."""

    def state(self) -> dict[str, int]:
        """The sampler's state after the batches handed out so far."""
        return self.sampler.state()

    def load_state(self, state: dict[str, int]) -> None:
        """Goes on where `state` was taken; what was made ahead is thrown away."""
        self.close()
        self.sampler.load_state(state)

    def close(self) -> None:
        """Ends the threads or processes that make batches ahead; the next batch asked for starts them anew."""
        raise NotImplementedError

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ClipBatch:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ClipLoader(SampledBatches):
    """An endless stream of batches in the sampler's order, on `device`.

    A thread keeps up to `prefetch` batches ready. On a GPU they are gathered in page-locked memory and copied on a
    stream of their own, so that neither the gather nor the copy holds up the training step.
    """

    def __init__(
        self,
        dataset: Clips,
        sampler: EpochSampler,
        *,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
    ) -> None:
        check_integer("prefetch", prefetch, 1, 1024)
        _check_dataset(dataset)
        if not isinstance(sampler, EpochSampler):
            raise TypeError(f"sampler must be an EpochSampler, got {type(sampler).__name__}")
        if sampler.num_clips != len(dataset):
            raise ValueError(f"sampler must order the {len(dataset)} clips of the data set, it has {sampler.num_clips}")
        super().__init__(sampler)
        self.dataset = dataset
        self.device = check_device("device", device)
        self.prefetch = prefetch
        self._worker: _Worker | None = None

    def __next__(self) -> ClipBatch:
        """The next batch; an error of the thread is raised here."""
        if self._worker is None:
            self._worker = _Worker(self.dataset, self.sampler.copy(), self.device, self.prefetch)
        start = time.perf_counter()
        try:
            batch = self._worker.get()
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - start
        self.sampler.advance()
        return batch

    def close(self) -> None:
        """Ends the thread; the next batch asked for starts one anew."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def iterate_once(dataset: Clips, batch_size: int = 64) -> Iterator[ClipBatch]:
    """All clips once and in order, for evaluation; the last batch may be smaller."""
    check_integer("batch_size", batch_size, 1)
    _check_dataset(dataset)
    clips = torch.arange(len(dataset))
    return (dataset.batch(clips[start : start + batch_size]) for start in range(0, len(clips), batch_size))


def _check_dataset(dataset: Clips) -> None:
    # By what it can do, not by its class: a wrapper around a data set, or a VideoDataset, does as well.
    if not callable(getattr(dataset, "batch", None)) or not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset must be a PackedDataset, got {type(dataset).__name__}")


class _Worker:
    """The thread that gathers batches, and the queue in which they wait."""

    def __init__(self, dataset: Clips, sampler: EpochSampler, device: torch.device, prefetch: int) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._device = device
        self._queue: queue.Queue[tuple[ClipBatch, torch.cuda.Event | None] | BaseException] = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._load_all, name="avppc-loader", daemon=True)
        self._thread.start()

    def get(self) -> ClipBatch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            # The memory belongs to the copying stream: it must not be given to the next batch while this one is in use.
            for value in (batch.video, batch.audio, batch.labels, batch.clip_ids, batch.speakers):
                value.record_stream(stream)
        return batch

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _load_all(self) -> None:
        try:
            stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            for indices in self._sampler:
                if not self._put(self._load(indices, stream)):
                    return
        except BaseException as error:
            self._put(error)

    def _load(self, indices: Tensor, stream: torch.cuda.Stream | None) -> tuple[ClipBatch, torch.cuda.Event | None]:
        if stream is None:
            return self._dataset.batch(indices).to(self._device), None
        batch = self._dataset.batch(indices, pin_memory=True)
        with torch.cuda.stream(stream):
            moved = batch.to(self._device, non_blocking=True)
            copied = stream.record_event()
        return moved, copied

    def _put(self, item: tuple[ClipBatch, torch.cuda.Event | None] | BaseException) -> bool:
        """False when the loader was closed meanwhile."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
