"""How fast log_mel is on the CPU, each preset against those who compute the same features.

Contestants agree before they are timed, and take turns, so that a noisy machine disturbs all alike. Before its timed
call each works for a tenth of a second: it then meets its own data in the caches and no threads but its own (those of
OpenBLAS, under librosa, spin on for up to 0.1 s). `extra_info` of each result holds, of the same run: frames a second
of every contestant (median and best), how many times slower each is than ours, and our GB/s (640 bytes of float32
samples in and 320 bytes of features out make a frame).

    torchaudio   torch.stft, power, dense mel product, logarithm; the MelSpectrograms of torchaudio and of nnAudio
    whisper      the same with Whisper's scaling, as openai-whisper computes it
    librosa      melspectrogram and power_to_db, with numpy's FFT: it is faster here than scipy's, librosa's default
    kaldi        kaldi-native-fbank, which has one thread: its figure belongs to threads=1
    dali         DALI's CPU spectrogram

A peer that is not installed or does not import is skipped with the reason. test_limits_log_mel sets our rate beside
what the machine can do in the same run: bytes copied and float64 products.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from log_mel_peers import PEERS
from timing import take_turns

from avppc import LogMelConfig, log_mel
from avppc.ops.log_mel.reference import mel_filter_bank_reference

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "ops" / "log_mel"))  # the tests' sounds serve here too
from make_audio import speech_like

BYTES_OF_A_FRAME = 160 * 4 + 80 * 4
MAX_TOTAL_SECONDS = 1300.0
GRID = [
    (seconds, clips)
    for seconds in (1.16, 10.0, 30.0)
    for clips in (1, 4, 16, 64, 256, 1024)
    if seconds * clips <= MAX_TOTAL_SECONDS
]
WARM_UP_SECONDS = 0.1  # before each timed call
CPU_THREADS = tuple(sorted({1, min(2, torch.get_num_threads()), torch.get_num_threads()}))


@contextmanager
def limited_to(threads: int) -> Iterator[None]:
    """torch, and the BLAS under numpy where that can be told, with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
    else:
        with threadpool_limits(threads, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def work_for(seconds: float, contestant: Callable[[], object]) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        contestant()


def compare(benchmark, peer: str, clips: int, samples: int, threads: int) -> None:
    config, make = PEERS[peer]
    if peer == "kaldi_native_fbank" and threads > 1:
        pytest.skip("kaldi-native-fbank has one thread")
    waveform = torch.stack([speech_like(samples, seed) for seed in range(min(clips, 4))])
    waveform = waveform.repeat(-(-clips // len(waveform)), 1)[:clips]
    with limited_to(threads), torch.no_grad():
        theirs = make(clips)
        contestants = {"ours": lambda: log_mel(waveform, config, backend="cpp"), peer: lambda: theirs(waveform)}
        ours, other = (contestant() for contestant in contestants.values())
        assert ours.shape == other.shape
        # The peers' transforms are in float32: of quiet bands beside loud ones little is left.
        assert (ours - other).abs().median() < 1e-4
        assert ((ours - other).abs() < 2e-3).double().mean() > 0.999
        del ours, other
        warm_ups = {name: partial(work_for, WARM_UP_SECONDS, contestant) for name, contestant in contestants.items()}
        times = take_turns(contestants, prepare=warm_ups, budget_seconds=3.0, rounds=(5, 200))
        benchmark.pedantic(contestants["ours"], rounds=5, warmup_rounds=1)
    frames = clips * config.num_frames(samples)
    mine = times["ours"]
    benchmark.extra_info.update(
        clips=clips,
        seconds=round(samples / 16_000, 2),
        threads=threads,
        frames_per_second={name: round(frames / value.median) for name, value in times.items()},
        best_frames_per_second={name: round(frames / value.best) for name, value in times.items()},
        times_faster=round(times[peer].median / mine.median, 2),
        times_faster_best=round(times[peer].best / mine.best, 2),
        gigabytes_per_second=round(BYTES_OF_A_FRAME * frames / mine.median / 1e9, 3),
    )


@pytest.mark.parametrize("threads", CPU_THREADS, ids=lambda n: f"threads{n}")
@pytest.mark.parametrize("peer", PEERS)
def test_64_clips_of_4_seconds(benchmark, peer: str, threads: int) -> None:
    compare(benchmark, peer, 64, 64_000, threads)


def flop_of_a_frame(config: LogMelConfig) -> float:
    """Of the float64 transform (2.5 n log2 n, what a real transform of n points is counted as), window and power, and
    of the mel product and the logarithm in float32 (20 for each logarithm)."""
    points, bins = config.fft_size, config.fft_size // 2 + 1
    weights = int(mel_filter_bank_reference(config).count_nonzero())
    return 2.5 * points * np.log2(points) + config.window_samples + 3 * bins + 2 * weights + 20 * config.bands


@pytest.mark.parametrize("threads", CPU_THREADS, ids=lambda n: f"threads{n}")
@pytest.mark.parametrize("preset", ["torchaudio", "whisper"])
def test_limits_log_mel(benchmark, preset: str, threads: int) -> None:
    """Our rate beside the machine's copy bandwidth (bytes read and written) and its float64 matrix products."""
    config = LogMelConfig.preset(preset)
    waveform = torch.stack([speech_like(64_000, seed) for seed in range(4)]).repeat(16, 1)
    source, target = torch.ones(2**26), torch.empty(2**26)  # 256 MiB each: no cache holds them
    left, right = torch.randn(1024, 1024).double(), torch.randn(1024, 1024).double()
    with limited_to(threads), torch.no_grad():
        contestants = {
            "ours": lambda: log_mel(waveform, config, backend="cpp"),
            "copy": lambda: target.copy_(source),
            "float64_product": lambda: left @ right,
        }
        times = take_turns(contestants, budget_seconds=4.0, rounds=(5, 100))
        benchmark.pedantic(contestants["ours"], rounds=5, warmup_rounds=1)
    frames = len(waveform) * config.num_frames(64_000)
    copied = 2 * 4 * source.numel() / times["copy"].best / 1e9
    product = 2 * 1024**3 / times["float64_product"].best / 1e9
    mine = times["ours"].best
    benchmark.extra_info.update(
        threads=threads,
        frames_per_second={"ours": round(frames / times["ours"].median)},
        best_frames_per_second={"ours": round(frames / mine)},
        gigabytes_per_second=round(BYTES_OF_A_FRAME * frames / mine / 1e9, 3),
        copy_gigabytes_per_second=round(copied, 2),
        share_of_copy=round(BYTES_OF_A_FRAME * frames / mine / 1e9 / copied, 3),
        flop_of_a_frame=round(flop_of_a_frame(config)),
        gflop_per_second=round(flop_of_a_frame(config) * frames / mine / 1e9, 2),
        float64_product_gflop_per_second=round(product, 2),
        share_of_float64_product=round(flop_of_a_frame(config) * frames / mine / 1e9 / product, 3),
    )


@pytest.mark.parametrize(("seconds", "clips"), GRID, ids=[f"{seconds}s-N{clips}" for seconds, clips in GRID])
@pytest.mark.parametrize("peer", PEERS)
def test_clips(benchmark, peer: str, seconds: float, clips: int) -> None:
    compare(
        benchmark, peer, clips, round(seconds * 16_000), torch.get_num_threads() if peer != "kaldi_native_fbank" else 1
    )
