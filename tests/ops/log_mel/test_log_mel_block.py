"""The CUDA kernels of log_mel without a GPU: their blocks run on the host and are compared with the definition.

tests/ops/log_mel/test_log_mel_cuda.py runs the kernels themselves where there is a GPU.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from log_mel_configs import MFCC, NEMO, OTHER_FFT_SIZES, PRESETS, configurations, tolerance_of
from make_audio import hard_cases, speech_like
from torch import Tensor

from avppc import LogMelConfig
from avppc.ops.log_mel.reference import log_mel_reference

SOURCES = Path(__file__).parents[3] / "csrc"
A100_SHARED_BYTES = 163 * 1024  # the least of the architectures that are built for

Blocks = Callable[..., tuple[Tensor, int]]


@pytest.fixture(scope="session")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    """run(waveform, config, lengths) -> features, number of launches."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler, "the tests need a C++ compiler, as the build does"
    library = tmp_path_factory.mktemp("log_mel") / "blocks.so"
    files = [
        Path(__file__).with_name("log_mel_block_host.cpp"),
        SOURCES / "log_mel_tables.cpp",
        SOURCES / "fft_plan.cpp",
    ]
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, *files, "-o", library], check=True)
    function = ctypes.CDLL(str(library)).log_mel_on_host
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int64,
                         ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]  # fmt: skip

    def run(
        waveform: Tensor,  # [N, S]
        config: LogMelConfig,
        lengths: Tensor | None = None,
        *,
        doubles: bool = True,
        falling: bool = False,
        shared_bytes: int = A100_SHARED_BYTES,
    ) -> tuple[Tensor, int]:
        clips, samples = waveform.shape
        out = torch.full((clips, config.num_frames(samples), config.features), torch.nan)
        lengths_address = None if lengths is None else lengths.data_ptr()
        launches = function(
            config.to_text().encode(), waveform.data_ptr(), waveform.dtype == torch.int16, lengths_address,
            clips, samples, shared_bytes, doubles, falling, out.data_ptr(),
        )  # fmt: skip
        return out, launches

    return run


@pytest.mark.parametrize("samples", [1600, 18_560, 40_000], ids=lambda n: f"S{n}")
@pytest.mark.parametrize("config", [*map(LogMelConfig.preset, PRESETS), NEMO, MFCC], ids=[*PRESETS, "nemo", "mfcc"])
def test_speech_equals_the_definition(blocks: Blocks, config: LogMelConfig, samples: int) -> None:
    waveform = torch.stack([speech_like(samples, seed) for seed in range(2)])
    lengths = torch.tensor([samples, samples * 2 // 3])
    features, launches = blocks(waveform, config, lengths)
    expected = log_mel_reference(waveform.double(), config, lengths)
    torch.testing.assert_close(features.double(), expected, atol=tolerance_of(config), rtol=1e-6)
    needs_whole_clip = bool(config.dynamic_range or config.mfcc or config.normalize != "none")
    assert launches == (2 if needs_whole_clip and samples == 40_000 else 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_float_transform_is_as_good_as_that_of_torch(blocks: Blocks, preset: str) -> None:
    """For GPUs on which doubles are slow."""
    config = LogMelConfig.preset(preset)
    waveform = torch.stack([speech_like(18_560, seed) for seed in range(3)])
    truth = log_mel_reference(waveform.double(), config)
    error = (blocks(waveform, config, doubles=False)[0] - truth).square().mean().sqrt()
    error_of_torch = (log_mel_reference(waveform, config) - truth).square().mean().sqrt()
    assert error <= 1.5 * error_of_torch


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", sorted(hard_cases(8)))
def test_hard_signals_equal_the_definition(blocks: Blocks, preset: str, case: str) -> None:
    config = LogMelConfig.preset(preset)
    waveform = hard_cases(4000)[case][None]
    features, _ = blocks(waveform, config)
    expected = log_mel_reference(waveform.double(), config)
    torch.testing.assert_close(features.double(), expected, atol=tolerance_of(config), rtol=1e-6)


@pytest.mark.parametrize("config", [LogMelConfig.preset("whisper"), NEMO, MFCC], ids=["whisper", "nemo", "mfcc"])
@pytest.mark.parametrize("samples", [4000, 40_000], ids=["whole", "chunks"])
def test_threads_may_run_in_any_order(blocks: Blocks, config: LogMelConfig, samples: int) -> None:
    """A step that reads what another thread writes in the same step would differ."""
    waveform = speech_like(samples)[None]
    assert torch.equal(blocks(waveform, config)[0], blocks(waveform, config, falling=True)[0])


def test_a_bad_sample_spoils_its_own_clip_only(blocks: Blocks) -> None:
    for samples in (5000, 40_000):
        config = LogMelConfig.preset("whisper")
        waveform = torch.stack([speech_like(samples, seed) for seed in range(3)])
        clean, _ = blocks(waveform, config)
        waveform[1, 2500] = torch.nan
        features, _ = blocks(waveform, config)
        assert torch.equal(features[[0, 2]], clean[[0, 2]])
        assert features[1].isnan().all()


def test_large_transforms_take_fewer_warps_and_the_largest_may_not_fit(blocks: Blocks) -> None:
    config = LogMelConfig(fft_size=8192, window_samples=8000, hop_samples=4000)
    waveform = speech_like(32_000)[None]
    expected = log_mel_reference(waveform.double(), config)
    features, launches = blocks(waveform, config)
    assert launches == 1
    torch.testing.assert_close(features.double(), expected, atol=tolerance_of(config), rtol=1e-6)
    assert blocks(waveform, config, shared_bytes=48 * 1024)[1] == 0


@pytest.mark.parametrize("fft_size", OTHER_FFT_SIZES)
def test_transforms_without_a_kernel_are_refused(blocks: Blocks, fft_size: int) -> None:
    config = LogMelConfig(fft_size=fft_size, window_samples=2, hop_samples=1, bands=1)
    assert not config.has_cuda_transform
    assert blocks(speech_like(100)[None], config)[1] == -1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    config=configurations(any_fft_size=False),
    samples=st.integers(1, 4000),
    int16=st.booleans(),
    falling=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_configuration_equals_the_definition(
    blocks: Blocks, config: LogMelConfig, samples: int, int16: bool, falling: bool, seed: int
) -> None:
    config = dataclasses.replace(config, normalize="none")
    samples = max(samples, 3 * config.hop_samples + config.fft_size)
    samples = min(samples, 200 * config.hop_samples + config.fft_size)
    waveform = 0.2 * torch.randn(2, samples, generator=torch.Generator().manual_seed(seed))
    if int16:
        waveform = (waveform * 8000).to(torch.int16)
    exact = waveform.double() / (32768.0 if int16 else 1.0)
    lengths = torch.tensor([samples, samples // 2])
    expected = log_mel_reference(exact, config, lengths)
    features, _ = blocks(waveform, config, lengths, falling=falling)
    torch.testing.assert_close(features.double(), expected, atol=tolerance_of(config, exact), rtol=1e-6)
