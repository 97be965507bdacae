"""Gradients of log_mel's definition: right where there is sound, and 0, not NaN, where there is none."""

from __future__ import annotations

import itertools

import pytest
import torch
from make_audio import speech_like
from torch import Tensor

from avppc import LogMelConfig
from avppc.ops.log_mel.reference import log_mel_reference

DTYPES = [torch.float32, torch.float64]


def gradient(waveform: Tensor, config: LogMelConfig, lengths: Tensor | None = None) -> Tensor:
    """Of a weighted sum of the features, so that nothing cancels."""
    waveform = waveform.clone().requires_grad_()
    features = log_mel_reference(waveform, config, lengths)
    weights = torch.linspace(-1, 2, features.numel(), dtype=features.dtype).reshape(features.shape)
    (result,) = torch.autograd.grad((features * weights).sum(), waveform)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("log", ["none", "ln", "db"])
@pytest.mark.parametrize("power", [1, 2])
def test_digital_silence_has_gradient_zero(power: int, log: str, dtype: torch.dtype) -> None:
    settings = itertools.product(["none", "per_feature"], [None, 8.0], [0, 5])
    waveform = torch.cat([speech_like(800), torch.zeros(1600)]).to(dtype).expand(2, -1)
    for normalize, dynamic_range, mfcc in settings:
        config = LogMelConfig(
            power=power, log=log, normalize=normalize, dynamic_range=dynamic_range, mfcc=mfcc, bands=20
        )
        for lengths in (None, torch.tensor([0, 900])):
            result = gradient(waveform, config, lengths)
            assert result.isfinite().all()
            assert (result[:, 800 + config.fft_size :] == 0).all()
            assert (result[1, :800] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_feature_that_does_not_vary_has_gradient_zero(dtype: torch.dtype) -> None:
    one_frame = LogMelConfig(normalize="per_feature", drop_last_frame=False)
    assert (gradient(speech_like(150)[None].to(dtype), one_frame) == 0).all()
    silent = LogMelConfig(normalize="per_feature", log="none")
    assert (gradient(torch.zeros(1, 1600, dtype=dtype), silent) == 0).all()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("normalize", ["none", "per_feature"])
def test_gradients_equal_finite_differences(power: int, normalize: str) -> None:
    config = LogMelConfig(
        fft_size=32, window_samples=30, hop_samples=16, bands=4, log_offset=1e-2, power=power, normalize=normalize
    )
    generator = torch.Generator().manual_seed(0)
    waveform = 0.3 * torch.randn(96, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: log_mel_reference(x, config), waveform.requires_grad_())
