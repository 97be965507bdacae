"""Batches for training: gathered ahead by a thread, copied to the GPU meanwhile, counted only when consumed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from avppc.checks import check_device, check_integer
from avppc.clip import ClipBatch
from avppc.data.packed.dataset import Clips
from avppc.data.packed.sampler import EpochSampler

_POLL_SECONDS = 0.1  # how soon the thread notices that it is to end


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
