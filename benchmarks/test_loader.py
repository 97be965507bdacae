"""How fast clips come: packed shards against a raw memory-mapped read, decoding against a bare PyAV loop.

A clip is 29 x 96 x 96 bytes of video and 18,560 x 2 bytes of audio: 304,384 bytes. Rates are medians over rounds in
which the contestants take turns, so that a noisy machine disturbs all alike. `extra_info` holds clips/s, GB/s and the
ratios (above 1: ours is faster). Packed data lie in the page cache, as they do after the first epoch where memory
allows.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from avppc.clip import CLIP_FRAMES, CROP_SIZE
from avppc.data.packed.dataset import PackedDataset
from avppc.data.packed.index import SHARD_FOLDER, PackedIndex
from avppc.data.packed.loader import ClipLoader, EpochSampler
from avppc.data.packed.shard import ClipShape, ShardWriter
from avppc.data.video.crop import Crop
from avppc.data.video.decode import decode_clip

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data" / "video"))  # the tests' videos serve here too
from loader_baselines import bare_decode, dali_loader, decoders
from make_videos import write_video
from timing import take_turns

SHAPE = ClipShape(CLIP_FRAMES, CROP_SIZE, CROP_SIZE)
CLIP_BYTES = CLIP_FRAMES * CROP_SIZE * CROP_SIZE + 2 * SHAPE.samples
CLIPS = 2048
BATCH = 128
ROUNDS = 30
WORKERS = 2
VIDEOS = 96
DECODE_ROUNDS = 5


def median_seconds(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contestant over so many rounds."""
    return {name: times.median for name, times in take_turns(contestants, rounds=(rounds, rounds)).items()}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """2048 clips of noise in shards of 512: 0.6 GB."""
    directory = tmp_path_factory.mktemp("packed")
    folder = directory / SHARD_FOLDER
    folder.mkdir()
    rng = np.random.default_rng(0)
    writer, records = ShardWriter(SHAPE, 512), []
    for number in range(CLIPS):
        video = rng.integers(0, 256, (SHAPE.frames, SHAPE.height, SHAPE.width), dtype=np.uint8)
        audio = rng.integers(-32768, 32768, SHAPE.samples, dtype=np.int16)
        writer.add(f"{number}.mp4", video=video, audio=audio, label=0, clip_id=number, speaker=0)
        if writer.full:
            records.append(writer.write(folder / f"train-{len(records):05}.safetensors"))
    PackedIndex(SHAPE, ("WORD",), {"train": tuple(records)}).write(directory)
    return directory


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[str]:
    """256 x 256, 29 frames, H.264 and AAC at 16 kHz, as in LRW."""
    folder = tmp_path_factory.mktemp("videos")
    return [str(write_video(folder / f"{number}.mp4", seed=number, clicks=(0.5,))) for number in range(VIDEOS)]


def test_packed_batches(benchmark, packed):
    """One random batch by PackedDataset.batch, against as many bytes read straight ahead from np.memmap."""
    dataset = PackedDataset(packed)
    shard = next((packed / SHARD_FOLDER).iterdir())
    raw = np.memmap(shard, np.uint8, "r")
    rng = np.random.default_rng(1)
    # From the start of a page, as our batches: numpy's own 16 bytes past it would slow the raw read down.
    memory = np.empty(BATCH * CLIP_BYTES + mmap.PAGESIZE, np.uint8)
    target = memory[-memory.ctypes.data % mmap.PAGESIZE :][: BATCH * CLIP_BYTES]
    assert torch.equal(dataset.batch(torch.tensor([3, 900])).clip_ids, torch.tensor([3, 900]))

    def ours() -> object:
        return dataset.batch(torch.from_numpy(rng.permutation(CLIPS)[:BATCH]))

    def raw_read() -> object:
        start = int(rng.integers(len(raw) - len(target)))
        np.copyto(target, raw[start : start + len(target)])
        return target

    def raw_read_into_new_memory() -> object:
        start = int(rng.integers(len(raw) - len(target)))
        return np.array(raw[start : start + len(target)])

    for _ in range(2 * CLIPS // BATCH):  # until no page is new to this process, nor asked for ahead
        ours()
    seconds = median_seconds({"ours": ours, "raw": raw_read, "raw_new": raw_read_into_new_memory}, ROUNDS)
    benchmark.extra_info.update(
        clips_per_second=BATCH / seconds["ours"],
        gb_per_second=BATCH * CLIP_BYTES / seconds["ours"] / 1e9,
        raw_gb_per_second=BATCH * CLIP_BYTES / seconds["raw"] / 1e9,
        raw_new_memory_gb_per_second=BATCH * CLIP_BYTES / seconds["raw_new"] / 1e9,
        ratio_to_raw=seconds["raw"] / seconds["ours"],
        ratio_to_raw_new_memory=seconds["raw_new"] / seconds["ours"],
    )
    benchmark.pedantic(ours, rounds=ROUNDS, warmup_rounds=2)


def test_packed_loader(benchmark, packed):
    """A batch out of the prefetching loader, asked for without pause."""
    dataset = PackedDataset(packed)
    with ClipLoader(dataset, EpochSampler(len(dataset), BATCH, seed=0)) as loader:
        assert next(loader).video.shape == (BATCH, CLIP_FRAMES, CROP_SIZE, CROP_SIZE)
        benchmark.pedantic(lambda: next(loader), rounds=ROUNDS, warmup_rounds=4)
    median = benchmark.stats.stats.median
    benchmark.extra_info.update(clips_per_second=BATCH / median, gb_per_second=BATCH * CLIP_BYTES / median / 1e9)


def bare_frames(path: str) -> tuple[int, float]:
    """Frames decoded and the processor seconds it took, of all threads."""
    start = time.process_time()
    return len(bare_decode(path)[0]), time.process_time() - start


def our_frames(path: str) -> tuple[int, float]:
    """Frames decoded and the processor seconds it took, of all threads."""
    start = time.process_time()
    return len(decode_clip(path).video), time.process_time() - start


class PlainDataset(torch.utils.data.Dataset):
    """What a project without packed shards would write."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        video, audio = bare_decode(self.paths[number])
        return torch.from_numpy(video), torch.from_numpy(audio)


@pytest.mark.parametrize("workers", [1, WORKERS])
def test_decoding(benchmark, videos, packed, workers):
    """All videos by decode_clip in `workers` processes, against a bare PyAV loop in as many, and a plain DataLoader.

    On a machine that others use too, the ratio of processor seconds tells more than that of the clock: the bare loop's
    resampler has a thread of its own, which claims a share of its own.
    """
    video, audio = bare_decode(videos[0])
    clip = decode_clip(videos[0])
    assert np.array_equal(clip.video.numpy(), video)
    assert np.abs(clip.audio.numpy().astype(int) - audio).max() <= 1
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    dataset = PackedDataset(packed, verify=False)
    rng = np.random.default_rng(1)
    plain = torch.utils.data.DataLoader(
        PlainDataset(videos),
        batch_size=16,
        num_workers=workers,
        multiprocessing_context=context,
        persistent_workers=True,
    )
    cpu_seconds: dict[str, list[float]] = {"ours": [], "bare": []}

    def decode(name: str, function: Callable[[str], tuple[int, float]]) -> None:
        frames, cpu = zip(*pool.imap_unordered(function, videos, chunksize=4), strict=True)
        assert sum(frames) == CLIP_FRAMES * len(videos)
        cpu_seconds[name].append(sum(cpu))

    with context.Pool(workers) as pool:
        contestants: dict[str, Callable[[], object]] = {
            "ours": lambda: decode("ours", our_frames),
            "bare": lambda: decode("bare", bare_frames),
            "plain": lambda: [batch.shape for batch, _ in plain],
        }
        seconds = median_seconds(contestants, DECODE_ROUNDS)
        benchmark.pedantic(contestants["ours"], rounds=DECODE_ROUNDS, warmup_rounds=1)
    packed_seconds = median_seconds(
        {"packed": lambda: dataset.batch(torch.from_numpy(rng.permutation(CLIPS)[:BATCH]))}, ROUNDS
    )["packed"]
    benchmark.extra_info.update(
        workers=workers,
        clips_per_second=len(videos) / seconds["ours"],
        bare_clips_per_second=len(videos) / seconds["bare"],
        plain_data_loader_clips_per_second=len(videos) / seconds["plain"],
        ratio_to_bare=seconds["bare"] / seconds["ours"],
        cpu_ratio_to_bare=statistics.median(cpu_seconds["bare"]) / statistics.median(cpu_seconds["ours"]),
        ratio_to_plain_data_loader=seconds["plain"] / seconds["ours"],
        packed_ratio_to_decoding=(BATCH / packed_seconds) / (len(videos) / seconds["ours"]),
    )


def test_backends(benchmark, videos):
    """One clip after the other by each decoder that is installed, in this process; clips/s of each."""
    paths = videos[:24]
    clip = decode_clip(paths[0])
    contestants = decoders()
    for name, decode in contestants.items():
        found = decode(paths[0])
        images = found.video if name.startswith("ours") else found[0]
        assert images.shape == (CLIP_FRAMES, CROP_SIZE, CROP_SIZE)
        assert np.abs(np.asarray(images)[0].astype(int) - clip.video[0].numpy()).mean() < 25  # red is not luma
    rounds = {name: (lambda decode=decode: [decode(path) for path in paths]) for name, decode in contestants.items()}
    seconds = median_seconds(rounds, DECODE_ROUNDS)
    benchmark.extra_info.update({f"{name}_clips_per_second": len(paths) / value for name, value in seconds.items()})
    benchmark.pedantic(rounds["ours_pyav"], rounds=1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # DALI leaves a socket open
def test_dali(benchmark, tmp_path):
    """DALI against our PyAV path on the same files: VP9, which it decodes on a CPU too."""
    codec = {"video_codec": "libvpx-vp9", "audio_codec": "libopus", "rate": 48_000, "options": {"b": "300k"}}
    paths = [str(write_video(tmp_path / f"{n}.webm", seed=n, **codec)) for n in range(16)]
    loader = dali_loader(tmp_path, 8, Crop("window"))
    if loader is None:
        pytest.skip("nvidia-dali-cuda130 is not installed")
    with loader:
        assert next(loader).video.shape == (8, CLIP_FRAMES, CROP_SIZE, CROP_SIZE)
        contestants = {"dali": loader.__next__, "pyav": lambda: [decode_clip(path) for path in paths[:8]]}
        seconds = median_seconds(contestants, DECODE_ROUNDS)
        benchmark.pedantic(contestants["dali"], rounds=1)
    del loader, contestants
    gc.collect()  # the socket is complained about here, where that is ignored
    benchmark.extra_info.update(
        device="cuda" if torch.cuda.is_available() else "cpu",
        clips_per_second=8 / seconds["dali"],
        pyav_one_process_clips_per_second=8 / seconds["pyav"],
    )
