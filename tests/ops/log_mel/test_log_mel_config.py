"""LogMelConfig: what it refuses, how many frames it promises, and that C++ understands and checks the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avppc import _C, log_mel
from avppc.ops.log_mel.config import LogMelConfig
from avppc.ops.log_mel.reference import dct_reference, mel_filter_bank_reference, window_reference

CONFIGS = {
    **{name: LogMelConfig.preset(name) for name in ("torchaudio", "librosa", "whisper", "kaldi")},
    "left": LogMelConfig(framing="left", window="hann_half_sample", hop_samples=77),
    "mfcc": LogMelConfig(mfcc=13, mel_scale="slaney", mel_norm="slaney", min_hz=125.5, max_hz=7600.0),
    "mid_hop": LogMelConfig(framing="mid_hop", window="hamming", hop_samples=161, fft_size=882, window_samples=882),
    "exact": LogMelConfig(framing="exact", window="blackman", fft_size=700, padding="circular"),
    "own_window": LogMelConfig(window=torch.kaiser_window(400, dtype=torch.float64), padding="replicate"),
    "wide": LogMelConfig(window="hamming_symmetric", window_samples=33, fft_size=34, bands=3),
    "blackman": LogMelConfig(window="blackman_symmetric"),
    "rectangular": LogMelConfig(window="rectangular"),
    "symmetric": LogMelConfig(window="hann_symmetric", window_samples=321, bands=23, sample_rate_hz=8000),
}


def test_the_default_is_the_torchaudio_preset_with_four_frames_a_video_frame() -> None:
    assert LogMelConfig() == LogMelConfig.preset("torchaudio")
    assert LogMelConfig().num_frames(29 * 640) == 29 * 4


@pytest.mark.parametrize(
    ("preset", "frames"), [("torchaudio", 116), ("librosa", 117), ("whisper", 116), ("kaldi", 114)]
)
def test_frames_of_an_lrw_clip(preset: str, frames: int) -> None:
    assert LogMelConfig.preset(preset).num_frames(18_560) == frames


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"fft_size": 0}, ValueError, "fft_size must be from 2 to 8192, got 0"),
        ({"fft_size": 405, "window_samples": 400}, ValueError, "fft_size must be even"),
        ({"fft_size": 16384}, ValueError, "fft_size must be from 2 to 8192"),
        ({"window_samples": 513}, ValueError, "window_samples must be from 2 to 512, got 513"),
        ({"hop_samples": 0}, ValueError, "hop_samples must be from 1"),
        ({"hop_samples": 160.0}, TypeError, "hop_samples must be an int, got float"),
        ({"bands": 0}, ValueError, "bands must be from 1 to 512"),
        ({"mel_scale": "bark"}, ValueError, "mel_scale must be one of 'htk', 'slaney', 'kaldi'; got 'bark'"),
        ({"mel_norm": "area"}, ValueError, "mel_norm must be one of"),
        ({"min_hz": 9000.0}, ValueError, r"min_hz must be below max_hz \(8000.0\), got 9000.0"),
        ({"max_hz": 8001.0}, ValueError, "max_hz must be from 0.0 to 8000.0, got 8001.0"),
        ({"power": 3}, ValueError, "power must be from 1 to 2, got 3"),
        ({"framing": "centre"}, ValueError, "framing must be one of"),
        ({"padding": "edge"}, ValueError, "padding must be one of"),
        ({"window": "hanning"}, ValueError, "window must be one of"),
        ({"preemphasis": 1.5}, ValueError, "preemphasis must be from 0.0 to 1.0"),
        ({"preemphasis_scope": "clip"}, ValueError, "preemphasis_scope must be one of"),
        ({"remove_dc": 2}, TypeError, "remove_dc must be True or False, got 2"),
        ({"log": "log2"}, ValueError, "log must be one of"),
        ({"log_offset": 0.0}, ValueError, "log_offset or log_floor must be at least 1e-30 or silence has no logarithm"),
        ({"log_offset": float("nan")}, ValueError, "log_offset must be finite"),
        ({"dynamic_range": -1.0}, ValueError, "dynamic_range must be from 0.0"),
        ({"mfcc": 81}, ValueError, "mfcc must be from 0 to 80, got 81"),
        ({"normalize": "clip"}, ValueError, "normalize must be one of"),
        ({"output_scale": "1"}, TypeError, "output_scale must be a number, got str"),
    ],
)
def test_refuses(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        LogMelConfig(**changes)


def test_refuses_an_unknown_preset() -> None:
    with pytest.raises(ValueError, match="name must be one of 'torchaudio', 'librosa', 'whisper', 'kaldi'; got 'nemo'"):
        LogMelConfig.preset("nemo")


@pytest.mark.parametrize("name", CONFIGS)
def test_text_keeps_every_field(name: str) -> None:
    assert LogMelConfig.from_text(CONFIGS[name].to_text()) == CONFIGS[name]


def test_integers_are_numbers_too() -> None:
    config = LogMelConfig(min_hz=20, output_scale=-(2**70))
    assert config == LogMelConfig.from_text(config.to_text())
    assert config.to_text() == LogMelConfig(min_hz=20.0, output_scale=-(2.0**70)).to_text()
    assert log_mel(torch.zeros(16_000), config, backend="reference").isfinite().all()


@given(offset=st.floats(1e-30, 1.0), scale=st.floats(-10.0, 10.0))
def test_text_keeps_every_bit_of_a_number(offset: float, scale: float) -> None:
    config = LogMelConfig(log_offset=offset, output_scale=scale)
    assert LogMelConfig.from_text(config.to_text()) == config


@given(
    name=st.sampled_from(sorted(CONFIGS)),
    samples=st.integers(-1, 5000),
    drop=st.booleans(),
    hop=st.integers(1, 700),
)
def test_python_and_cpp_promise_the_same_frames(name: str, samples: int, drop: bool, hop: int) -> None:
    config = dataclasses.replace(CONFIGS[name], drop_last_frame=drop, hop_samples=hop)
    assert _C.log_mel_num_frames(config.to_text(), samples) == config.num_frames(samples)


@pytest.mark.parametrize("name", CONFIGS)
def test_cpp_tables_equal_the_reference(name: str) -> None:
    config = CONFIGS[name]
    np.testing.assert_allclose(_C.log_mel_window(config.to_text()), window_reference(config), atol=1e-15)
    bank = mel_filter_bank_reference(config).numpy()
    assert bank.max() > 0
    np.testing.assert_allclose(_C.log_mel_filter_bank(config.to_text()), bank, atol=1e-12)
    np.testing.assert_allclose(_C.log_mel_cosine_transform(config.to_text()), dct_reference(config).T, atol=1e-7)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("fft_size=512", "fft_size=513", "log_mel: fft_size must be even"),
        ("fft_size=512", "fft_size=1e9", "fft_size must be a number from 2 to 8192, got '1e9'"),
        ("window_samples=400", "window_samples=600", "window_samples must be a number from 2 to 512"),
        ("bands=80", "bands=80.5", "bands must be an integer"),
        ("bands=80", "bands=", "bands must be a number"),
        ("window=hann;", "window=boxcar;", "window must be one of 'hann'"),
        ("window=hann;", "window=1,0.5;", "window must be a name or window_samples values, got '2 values'"),
        ("window=hann;", "window=1,nan;", "window must be a number from -1e.06 to 1e.06, got 'nan'"),
        ("remove_dc=False", "remove_dc=0", "remove_dc must be True or False, got '0'"),
        ("log_offset=1e-06", "log_offset=nan", "log_offset must be a number"),
        ("log_offset=1e-06", "log_offset=0", "log_offset or log_floor must be at least 1e-30"),
        ("mfcc=0;", "", "the configuration lacks mfcc"),
        ("mfcc=0;", "mfcc=0;mfcc=1;", "come once"),
        ("mfcc=0;", "mfcc=0;colour=3;", "free of unknown fields, got 'colour'"),
        ("mfcc=0;", "mfcc;", "'name=value' parts"),
    ],
)
def test_cpp_refuses_what_python_would(old: str, new: str, text: str) -> None:
    valid = LogMelConfig().to_text()
    assert old in valid
    with pytest.raises(ValueError, match=text):
        _C.log_mel_num_frames(valid.replace(old, new), 16_000)


def test_filters_that_are_normed_have_area_one_and_the_others_height_one() -> None:
    fine = LogMelConfig(fft_size=8192, bands=20, mel_norm="slaney", mel_scale="slaney")
    width_hz = fine.sample_rate_hz / fine.fft_size
    assert torch.allclose(mel_filter_bank_reference(fine).sum(0) * width_hz, torch.ones(20).double(), rtol=1e-3)
    plain = mel_filter_bank_reference(dataclasses.replace(fine, mel_norm="none"))
    assert torch.allclose(plain.amax(0), torch.ones(20).double(), atol=0.02)
