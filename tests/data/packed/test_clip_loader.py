from __future__ import annotations

import threading
import time

import pytest
import torch
from packed_sets import clip_video, write_packed

from avppc.data.packed.dataset import PackedDataset
from avppc.data.packed.loader import ClipLoader, EpochSampler, iterate_once


@pytest.fixture
def dataset(tmp_path):
    with PackedDataset(write_packed(tmp_path / "packed")) as dataset:
        yield dataset


def make_sampler(**options) -> EpochSampler:
    return EpochSampler(23, 4, seed=9, **options)


def ids(batch) -> list[int]:
    return (batch.clip_ids - 1000).tolist()


def loader_threads() -> int:
    return sum(thread.name == "avppc-loader" for thread in threading.enumerate())


@pytest.mark.parametrize("prefetch", [1, 2, 7])
def test_batches_come_in_the_samplers_order(dataset, prefetch):
    expected = make_sampler()
    with ClipLoader(dataset, make_sampler(), prefetch=prefetch) as loader:
        for _ in range(12):
            batch = next(loader)
            assert ids(batch) == next(expected).tolist()
            assert torch.equal(batch.video[0], torch.from_numpy(clip_video(ids(batch)[0])))


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 8])
def test_resume_drops_and_repeats_nothing(dataset, stop):
    whole = make_sampler()
    expected = [next(whole).tolist() for _ in range(15)]
    with ClipLoader(dataset, make_sampler(), prefetch=3) as loader:
        before = [ids(next(loader)) for _ in range(stop)]
        time.sleep(0.02)  # let it prefetch
        state = loader.state()
    with ClipLoader(dataset, make_sampler(), prefetch=2) as loader:
        loader.load_state(state)
        after = [ids(next(loader)) for _ in range(15 - stop)]
    assert before + after == expected


def test_state_counts_what_was_consumed(dataset):
    with ClipLoader(dataset, make_sampler(), prefetch=4) as loader:
        assert loader.state() == {"epoch": 0, "batches_consumed": 0}
        next(loader)
        time.sleep(0.05)
        assert loader.state() == {"epoch": 0, "batches_consumed": 1}
        for _ in range(4):
            next(loader)
        assert loader.state() == {"epoch": 1, "batches_consumed": 0}


def test_load_state_of_a_running_loader(dataset):
    with ClipLoader(dataset, make_sampler()) as loader:
        first = [ids(next(loader)) for _ in range(3)]
        loader.load_state({"epoch": 0, "batches_consumed": 0})
        assert [ids(next(loader)) for _ in range(3)] == first


def test_batches_held_by_the_consumer_stay_as_they_are(dataset):
    with ClipLoader(dataset, make_sampler()) as loader:
        held = [next(loader) for _ in range(30)]
    for batch in held:
        for row, number in enumerate(ids(batch)):
            assert torch.equal(batch.video[row], torch.from_numpy(clip_video(number)))


class Failing:
    """A data set whose third batch fails."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.calls = 0

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices, **options):
        self.calls += 1
        if self.calls == 3:
            raise OSError("the disk is gone")
        return self.dataset.batch(indices, **options)


def test_an_error_of_the_thread_reaches_the_consumer(dataset):
    loader = ClipLoader(Failing(dataset), make_sampler())
    expected = make_sampler()
    assert ids(next(loader)) == next(expected).tolist()
    assert ids(next(loader)) == next(expected).tolist()
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader)
    assert loader.state() == {"epoch": 0, "batches_consumed": 2}
    assert loader_threads() == 0
    assert ids(next(loader)) == next(expected).tolist()  # the disk is back: nothing was lost
    loader.close()


def test_close_ends_the_thread(dataset):
    before = loader_threads()
    loader = ClipLoader(dataset, make_sampler(), prefetch=2)
    assert loader_threads() == before  # nothing starts before the first batch
    next(loader)
    assert loader_threads() == before + 1
    loader.close()
    loader.close()
    assert loader_threads() == before


def test_waiting_is_measured(dataset):
    class Slow(Failing):
        def batch(self, indices, **options):
            time.sleep(0.5)
            return self.dataset.batch(indices, **options)

    with ClipLoader(Slow(dataset), make_sampler()) as loader:
        assert loader.wait_seconds == 0
        next(loader)
        assert loader.wait_seconds > 0.1  # how much of it a busy machine lets pass before `next` waits is not told


def test_sampler_of_another_set_is_refused(dataset):
    with pytest.raises(ValueError, match="sampler must order the 23 clips of the data set, it has 5"):
        ClipLoader(dataset, EpochSampler(5, 1, seed=0))


def test_iterate_once_covers_everything_in_order(dataset):
    batches = list(iterate_once(dataset, batch_size=10))
    assert [len(batch) for batch in batches] == [10, 10, 3]
    assert [number for batch in batches for number in ids(batch)] == list(range(23))


def test_a_device_that_is_not_there_is_refused_at_once(dataset, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', but torch finds no CUDA GPU here"):
        ClipLoader(dataset, make_sampler(), device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a CUDA device need one")
def test_cuda_batches_are_the_same(dataset):
    expected = make_sampler()
    with ClipLoader(dataset, make_sampler(), device="cuda") as loader:
        for _ in range(10):
            batch = next(loader)
            assert batch.device.type == "cuda"
            numbers = next(expected).tolist()
            assert ids(batch) == numbers
            for row, number in enumerate(numbers):
                assert torch.equal(batch.video[row].cpu(), torch.from_numpy(clip_video(number)))
