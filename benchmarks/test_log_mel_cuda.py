"""How fast log_mel is on a GPU, against those who compute the same features there.

Contestants agree before they are timed. `extra_info` of each result holds, of the same run: milliseconds (median, 20%
and 80% quantiles) eager and as a CUDA graph of every contestant, how many times slower each is than ours (the better of
its two against the better of ours), frames a second, and our GB/s (640 bytes of float32 samples in and 320 bytes of
features out make a frame) beside those of a copy in the same run. Inputs are not in the cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import gpu_timing
import pytest
import torch
from gpu_timing import GpuTimes
from log_mel_peers import GPU_PEERS
from torch import Tensor

from avppc import log_mel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "ops" / "log_mel"))  # the tests' sounds serve here too
from make_audio import speech_like

MISSING = None if torch.cuda.is_available() else "no CUDA device is available to torch"
pytestmark = pytest.mark.skipif(MISSING is not None and os.environ.get("AVPPC_REQUIRE_GPU") != "1", reason=str(MISSING))

BYTES_OF_A_FRAME = 160 * 4 + 80 * 4
SIZES = [(1.16, 64), (1.16, 1024), (1.16, 4096), (4.0, 64), (30.0, 16), (30.0, 128)]  # (seconds, clips)


def clips_of_speech(clips: int, samples: int) -> Tensor:
    """[clips, samples] on the GPU; four different ones, repeated."""
    some = torch.stack([speech_like(samples, seed) for seed in range(4)]).cuda()
    return some.repeat(-(-clips // 4), 1)[:clips].contiguous()


def eager_and_graph(function: Callable[[], object]) -> dict[str, GpuTimes]:
    function()
    found = {"eager_ms": gpu_timing.times(function)}
    replay = gpu_timing.as_graph(function)
    if replay is not None:
        found["graph_ms"] = gpu_timing.times(replay)
    return found


def copy_gigabytes_per_second() -> float:
    """Bytes read and written, of 1 GiB that no cache holds."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * 4 * source.numel() / gpu_timing.times(lambda: target.copy_(source)).median / 1e6


@pytest.mark.parametrize(("seconds", "clips"), SIZES, ids=[f"{seconds}s-N{clips}" for seconds, clips in SIZES])
@pytest.mark.parametrize("peer", GPU_PEERS)
def test_clips(benchmark, peer: str, seconds: float, clips: int) -> None:
    config, make = GPU_PEERS[peer]
    theirs = make("cuda")
    waveform = clips_of_speech(clips, round(seconds * 16_000))

    def ours() -> Tensor:
        return log_mel(waveform, config, backend="cuda")

    mine, other = ours(), theirs(waveform)
    assert mine.shape == other.shape
    # The peers' transforms are in float32: of quiet bands beside loud ones little is left.
    assert (mine - other).abs().median() < 1e-4
    assert ((mine - other).abs() < 2e-3).double().mean() > 0.999
    memory = {
        "ours": gpu_timing.peak_extra_mib(ours),
        peer: gpu_timing.peak_extra_mib(lambda: theirs(waveform)),
    }
    del mine, other
    times = {"ours": eager_and_graph(ours), peer: eager_and_graph(lambda: theirs(waveform))}
    best = {name: min(value.median for value in found.values()) for name, found in times.items()}
    frames = clips * config.num_frames(waveform.shape[1])
    rate, copied = BYTES_OF_A_FRAME * frames / best["ours"] / 1e6, copy_gigabytes_per_second()
    benchmark.extra_info.update(
        clips=clips,
        seconds=seconds,
        milliseconds={name: {key: value.rounded() for key, value in found.items()} for name, found in times.items()},
        times_faster=round(best[peer] / best["ours"], 2),
        frames_per_second={name: round(1e3 * frames / value) for name, value in best.items()},
        peak_extra_mib={name: round(value, 1) for name, value in memory.items()},
        gigabytes_per_second=round(rate, 1),
        copy_gigabytes_per_second=round(copied, 1),
        share_of_copy=round(rate / copied, 3),
    )
    benchmark.pedantic(lambda: (ours(), torch.cuda.synchronize()), rounds=5, warmup_rounds=1)
