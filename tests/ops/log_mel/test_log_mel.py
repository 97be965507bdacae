"""log_mel against its definition in float64: presets, odd settings, hard signals, lengths, independent clips."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from log_mel_configs import DALI, MFCC, NEMO, NEMO_2_4, PRESETS, SNIPPED_DB, configurations, tolerance_of
from make_audio import hard_cases, real_speech, speech_like
from torch import Tensor

from avppc import LogMelConfig, log_mel
from avppc.ops.log_mel.reference import log_mel_reference


def assert_equals_definition(waveform: Tensor, config: LogMelConfig, lengths: Tensor | None = None) -> None:
    """Compares the C++ features with the definition in float64."""
    exact = waveform.double() / (32768.0 if waveform.dtype == torch.int16 else 1.0)
    expected = log_mel_reference(exact, config, lengths)
    features = log_mel(waveform, config, lengths=lengths, backend="cpp")
    assert features.dtype == torch.float32
    assert features.shape == expected.shape
    torch.testing.assert_close(features.double(), expected, atol=tolerance_of(config, exact), rtol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16], ids=str)
def test_speech_equals_the_definition(preset: str, dtype: torch.dtype, level: str) -> None:
    waveform = torch.stack([speech_like(18_560, seed) for seed in range(3)] + [real_speech(18_560)])
    if dtype == torch.int16:
        waveform = (waveform * 32767).round().to(torch.int16)
    assert_equals_definition(waveform, LogMelConfig.preset(preset))


@pytest.mark.parametrize("config", [NEMO, NEMO_2_4, DALI, SNIPPED_DB, MFCC],
                         ids=["nemo", "nemo-2.4", "dali", "snipped", "mfcc"])  # fmt: skip
def test_other_conventions_equal_the_definition(config: LogMelConfig, level: str) -> None:
    assert_equals_definition(torch.stack([speech_like(18_560, seed) for seed in range(3)]), config)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("samples", [1, 7, 160, 161, 399, 400, 559, 560, 561, 16_001, 960_000], ids=lambda n: f"S{n}")
def test_any_length_equals_the_definition(preset: str, samples: int) -> None:
    config = LogMelConfig.preset(preset)
    if config.num_frames(samples) == 0:
        with pytest.raises(ValueError, match=f"waveform has {samples} samples a clip, too few for one frame"):
            log_mel(torch.zeros(samples), config)
        return
    assert_equals_definition(speech_like(samples), config)


@pytest.mark.parametrize("padding", ["reflect", "constant"])
@pytest.mark.parametrize("samples", [1, 2, 3, 7, 255, 256, 257])
def test_clips_shorter_than_the_padding_are_reflected_again_and_again(padding: str, samples: int) -> None:
    config = LogMelConfig(drop_last_frame=False, padding=padding)
    assert_equals_definition(torch.randn(2, samples, generator=torch.Generator().manual_seed(samples)), config)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", sorted(hard_cases(8)))
def test_hard_signals_equal_the_definition(preset: str, case: str, level: str) -> None:
    config = LogMelConfig.preset(preset)
    waveform = hard_cases(4000)[case]
    features = log_mel(waveform, config, backend="cpp")
    assert features.isfinite().all()
    assert_equals_definition(waveform, config)


@pytest.mark.parametrize("preset", PRESETS)
def test_quiet_bands_beside_a_loud_tone_are_right(preset: str) -> None:
    """A tone with noise at -100 dB: torch's float32 transform errs by 1e-3 and more, ours must not."""
    config = LogMelConfig.preset(preset)
    time = torch.arange(32_000, dtype=torch.float64) / 16_000
    noise = torch.randn(32_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    waveform = (0.9 * torch.sin(2 * torch.pi * 1000 * time) + 1e-5 * noise).float()
    truth = log_mel_reference(waveform.double(), config)
    error = (log_mel(waveform, config, backend="cpp") - truth).abs().max()
    error_of_torch = (log_mel_reference(waveform, config) - truth).abs().max()
    assert error <= tolerance_of(config)
    assert error <= error_of_torch


@pytest.mark.filterwarnings("ignore:.*mel bands")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(config=configurations(), samples=st.integers(1, 5000), int16=st.booleans(), seed=st.integers(0, 9))
def test_any_configuration_equals_the_definition(config: LogMelConfig, samples: int, int16: bool, seed: int) -> None:
    samples = max(samples, 3 * config.hop_samples + config.fft_size)
    samples = min(samples, 300 * config.hop_samples + config.fft_size)
    waveform = 0.2 * torch.randn(2, samples, generator=torch.Generator().manual_seed(seed))
    if int16:
        waveform = (waveform * 8000).to(torch.int16)
    lengths = torch.tensor([samples, samples // 2])
    if config.normalize == "none":
        assert_equals_definition(waveform, config, lengths)
        return
    # Dividing by the deviation of few or equal frames magnifies what rounding leaves.
    expected = log_mel_reference(waveform.double() / (32768.0 if int16 else 1.0), config, lengths)
    features = log_mel(waveform, config, lengths=lengths, backend="cpp")
    torch.testing.assert_close(features.double(), expected, atol=0.1, rtol=1e-2)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("config", [*map(LogMelConfig.preset, PRESETS), NEMO, NEMO_2_4, DALI, SNIPPED_DB, MFCC],
                         ids=[*PRESETS, "nemo", "nemo-2.4", "dali", "snipped", "mfcc"])  # fmt: skip
def test_lengths_give_each_clip_as_if_it_were_alone(config: LogMelConfig, backend: str) -> None:
    lengths = torch.tensor([9000, 0, 401, 8999, 1000, 160])
    waveform = torch.stack([speech_like(9000, seed) for seed in range(6)])
    for clip, length in enumerate(lengths):
        waveform[clip, length:] = torch.nan  # must not be read
    features = log_mel(waveform, config, lengths=lengths, backend=backend)
    silence = log_mel(torch.zeros(9000), dataclasses.replace(config, dynamic_range=None, relative_to_max=False,
                                                             normalize="none"), backend=backend)[0]  # fmt: skip
    for clip, length in enumerate(lengths.tolist()):
        frames = config.num_frames(length)
        if frames:
            alone = log_mel(waveform[clip, :length], config, backend=backend)
            torch.testing.assert_close(features[clip, :frames], alone, atol=1e-5, rtol=0)
        rest = features[clip, frames:]
        if config.normalize != "none":
            assert (rest == 0).all()
        elif config.dynamic_range is None:
            torch.testing.assert_close(rest, silence.expand_as(rest), atol=1e-5, rtol=0)
        else:  # the floor of that clip: not below its maximum less the range
            assert (rest == rest[:1]).all()
            if frames and not config.mfcc:
                assert rest.numel() == 0 or rest.max() <= features[clip, :frames].min() + 1e-5


@pytest.mark.parametrize("preset", PRESETS)
def test_a_clip_does_not_depend_on_its_batch_or_on_threads(preset: str, level: str) -> None:
    config = LogMelConfig.preset(preset)
    waveform = torch.stack([speech_like(7000, seed) for seed in range(5)])
    alone = torch.stack([log_mel(clip, config, backend="cpp") for clip in waveform])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(log_mel(waveform, config, backend="cpp"), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_bad_sample_spoils_its_own_clip_only(preset: str, bad: float, backend: str) -> None:
    config = LogMelConfig.preset(preset)
    waveform = torch.stack([speech_like(5000, seed) for seed in range(3)])
    clean = log_mel(waveform, config, backend=backend)
    waveform[1, 2500] = bad
    features = log_mel(waveform, config, backend=backend)
    assert torch.equal(features[[0, 2]], clean[[0, 2]])
    touched = ~features[1].isfinite()
    if config.dynamic_range is None:
        frames = touched.any(-1).nonzero().flatten() * config.hop_samples + config.first_sample
        assert (frames <= 2500).all()
        assert (frames + config.window_samples > 2500).all()
        assert len(frames) >= 2
    else:  # a broken sample is never mistaken for silence: it shows in the clip's maximum
        assert touched.any()


def test_non_contiguous_and_many_dimensional_waveforms() -> None:
    waveform = torch.stack([speech_like(3200, seed) for seed in range(6)])
    expected = log_mel(waveform, backend="cpp")
    assert torch.equal(log_mel(waveform.reshape(2, 3, 3200), backend="cpp"), expected.reshape(2, 3, 20, 80))
    assert torch.equal(log_mel(waveform.T.contiguous().T, backend="cpp"), expected)
    assert torch.equal(log_mel(waveform[2], backend="cpp"), expected[2])
    lengths = torch.tensor([[3200, 1600, 800], [3200, 3200, 161]], dtype=torch.int32)
    nested = log_mel(waveform.reshape(2, 3, 3200), lengths=lengths, backend="cpp")
    assert torch.equal(nested.reshape(6, 20, 80), log_mel(waveform, lengths=lengths.reshape(-1).long(), backend="cpp"))


def test_silence_is_the_logarithm_of_the_floor() -> None:
    silence = torch.zeros(1600)
    assert log_mel(silence).unique().tolist() == pytest.approx([-13.8155106])  # ln 1e-6
    assert log_mel(silence, LogMelConfig.preset("librosa")).unique().tolist() == pytest.approx([-100.0])
    assert log_mel(silence, LogMelConfig.preset("whisper")).unique().tolist() == pytest.approx([-1.5])
    assert log_mel(silence, LogMelConfig.preset("kaldi")).unique().tolist() == pytest.approx([-15.9423847])


def test_denormal_sound_leaves_the_processor_as_it_was() -> None:
    log_mel(torch.full((1600,), 1e-41), backend="cpp")
    assert (torch.tensor([1e-41]) * 1.0 > 0).all()
