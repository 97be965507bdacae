"""The presets, and the settings that docs/features.md gives for other peers, against those implementations: librosa and
kaldi-native-fbank themselves, DALI where it is installed, the formulas of torchaudio, Whisper, NeMo and DALI."""

from __future__ import annotations

import dataclasses
from typing import Any

import kaldi_native_fbank
import librosa
import numpy as np
import pytest
import torch
from log_mel_configs import DALI, NEMO, NEMO_2_4
from make_audio import hard_cases, real_speech, speech_like
from numpy.typing import NDArray
from torch import Tensor

from avppc import LogMelConfig, log_mel

pytestmark = pytest.mark.filterwarnings("ignore:n_fft=512 is too large")  # librosa, of a clip shorter than its padding

TOLERANCE = 1e-4
SAMPLES = (401, 1600, 18_560, 160_000, 960_000)
BACKENDS = ("cpp", "reference")


def sound(name: str, samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    if name == "noise":
        return torch.rand(samples, generator=generator) * 2 - 1
    return {"speech": real_speech, "syllables": speech_like}[name](samples)


def triangles(edges: NDArray[np.float64], places: NDArray[np.float64]) -> NDArray[np.float64]:
    """[places, bands] heights of the triangles over every three edges."""
    columns = []
    for low, middle, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
        up, down = (places - low) / (middle - low), (high - places) / (high - middle)
        columns.append(np.maximum(0, np.minimum(up, down)))
    return np.stack(columns, axis=1)


def torchaudio_log_mel(waveform: Tensor) -> Tensor:
    """ln(MelSpectrogram(16000, n_fft=512, win_length=400, hop_length=160, n_mels=80) + 1e-6) without the last frame."""
    spectrum = torch.stft(waveform.double(), 512, 160, 400, torch.hann_window(400, dtype=torch.float64), center=True,
                          pad_mode="reflect", return_complex=True)  # fmt: skip
    mel_of_hz = 2595 * np.log10(1 + np.array([0.0, 8000.0]) / 700)
    edges_hz = 700 * (10 ** (np.linspace(*mel_of_hz, 82) / 2595) - 1)
    bank = torch.from_numpy(triangles(edges_hz, np.linspace(0, 8000, 257)))
    return ((spectrum.abs() ** 2).T @ bank + 1e-6).log()[:-1]


def whisper_log_mel(waveform: Tensor) -> Tensor:
    """Whisper's log_mel_spectrogram, with the filters from librosa where its file of filters comes from."""
    window = torch.hann_window(400, dtype=torch.float64)
    stft = torch.stft(waveform.double(), 400, 160, window=window, return_complex=True)
    magnitudes = stft[..., :-1].abs() ** 2
    filters = torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=400, n_mels=80, dtype=np.float64))
    log_spec = torch.clamp(filters @ magnitudes, min=1e-10).log10()
    log_spec = torch.maximum(log_spec, log_spec.max() - 8.0)
    return ((log_spec + 4.0) / 4.0).T


def librosa_log_mel(waveform: Tensor) -> Tensor:
    power = librosa.feature.melspectrogram(y=waveform.double().numpy(), sr=16_000, n_fft=512, win_length=400,
                                           hop_length=160, n_mels=80)  # fmt: skip
    return torch.from_numpy(librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=80.0)).T


def kaldi_fbank(waveform: Tensor) -> Tensor:
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 80
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(16_000, waveform.tolist())
    fbank.input_finished()
    return torch.from_numpy(np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)]))


def kaldi_formula(waveform: Tensor) -> Tensor:
    """What kaldi-native-fbank computes, in float64 where it has float32."""
    frames = waveform.double().unfold(-1, 400, 160).numpy()
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    povey = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    power = np.abs(np.fft.rfft(frames * povey, 512)) ** 2
    bin_mel = 1127 * np.log(1 + np.arange(256) * 31.25 / 700)  # the bin at 8000 Hz is left out
    edges_mel = np.linspace(1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + 8000 / 700), 82)
    mel = power[:, :256] @ triangles(edges_mel, bin_mel)
    return torch.from_numpy(np.log(np.maximum(mel, np.finfo(np.float32).eps)))


def nemo_features(waveform: Tensor, pad_mode: str) -> Tensor:
    """FilterbankFeatures() of NeMo without dither; it was run itself as 2.4.0 ("reflect") and 2.6.0 ("constant")."""
    x = waveform.double()
    x = torch.cat([x[:1], x[1:] - 0.97 * x[:-1]])
    window = torch.hann_window(320, periodic=False, dtype=torch.float64)
    spectrum = torch.stft(x, 512, 160, 320, window, center=True, pad_mode=pad_mode, return_complex=True)
    filters = torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=512, n_mels=64, norm="slaney", dtype=np.float64))
    log_mel = (filters @ spectrum.abs().square() + 2.0**-24).log()
    valid = log_mel if pad_mode == "reflect" else log_mel[:, : len(x) // 160]
    mean, deviation = valid.mean(1, keepdim=True), valid.std(1, keepdim=True)
    return ((valid - mean) / (deviation + 1e-5)).T


def dali_formula(waveform: Tensor) -> Tensor:
    """Its spectrogram, mel_filter_bank(normalize=True) and to_decibels(reference=1, cutoff_db=-100) in float64."""
    window = torch.sin(torch.pi * (torch.arange(400, dtype=torch.float64) + 0.5) / 400).square()
    spectrum = torch.stft(waveform.double(), 512, 160, 400, window, pad_mode="reflect", return_complex=True)
    filters = torch.from_numpy(librosa.filters.mel(sr=16_000, n_fft=512, n_mels=80, norm="slaney", dtype=np.float64))
    return 10 * (filters @ spectrum.abs().square()).clamp(min=1e-10).log10().T


PEERS = {
    "torchaudio": torchaudio_log_mel,
    "whisper": whisper_log_mel,
    "librosa": librosa_log_mel,
    "kaldi": kaldi_formula,
}


@pytest.mark.parametrize("preset", PEERS)
@pytest.mark.parametrize("samples", SAMPLES, ids=lambda n: f"S{n}")
@pytest.mark.parametrize("name", ["speech", "syllables", "noise"])
def test_preset_equals_its_peer(preset: str, samples: int, name: str) -> None:
    waveform = sound(name, samples)
    features = log_mel(waveform, LogMelConfig.preset(preset), backend="cpp")
    torch.testing.assert_close(features, PEERS[preset](waveform).float(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("preset", PEERS)
@pytest.mark.parametrize("case", sorted(hard_cases(8)))
def test_preset_equals_its_peer_on_hard_signals(preset: str, case: str) -> None:
    waveform = hard_cases(4000)[case]
    features = log_mel(waveform, LogMelConfig.preset(preset), backend="cpp")
    torch.testing.assert_close(features, PEERS[preset](waveform).float(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("preset", PEERS)
def test_reference_backend_equals_the_peer(preset: str) -> None:
    waveform = real_speech(18_560).double()
    features = log_mel(waveform, LogMelConfig.preset(preset), backend="reference")
    torch.testing.assert_close(features, PEERS[preset](waveform), atol=TOLERANCE, rtol=0, check_dtype=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["speech", "syllables", "noise"])
def test_settings_for_nemo_equal_its_formula(name: str, backend: str) -> None:
    waveform = sound(name, 18_560 + 77)
    for config, pad_mode in ((NEMO, "constant"), (NEMO_2_4, "reflect")):
        features = log_mel(waveform, config, backend=backend)
        torch.testing.assert_close(features, nemo_features(waveform, pad_mode).float(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["speech", "syllables", "noise"])
def test_settings_for_dali_equal_its_formula(name: str) -> None:
    waveform = sound(name, 18_560)
    features = log_mel(waveform, DALI, backend="cpp")
    torch.testing.assert_close(features, dali_formula(waveform).float(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["speech", "syllables", "noise"])
def test_settings_for_dali_equal_dali(name: str) -> None:
    pipelines: Any = pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install avppc[dali]")
    fn, waveform = pipelines.fn, sound(name, 18_560)

    @pipelines.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline() -> Any:
        audio = fn.external_source(source=lambda: [waveform.numpy()], dtype=pipelines.types.FLOAT, ndim=1)
        power = fn.spectrogram(audio, nfft=512, window_length=400, window_step=160)
        mel = fn.mel_filter_bank(power, sample_rate=16_000, nfilter=80, freq_high=8000.0, normalize=True)
        return fn.to_decibels(mel, reference=1.0, cutoff_db=-100.0)

    built = pipeline()
    built.build()
    expected = torch.from_numpy(built.run()[0].as_array()[0]).T
    features = log_mel(waveform, DALI, backend="cpp")
    rounding_of_the_peer = (expected - dali_formula(waveform)).abs().max()  # it has float32
    assert (features - expected).abs().max() <= rounding_of_the_peer + 2e-5


def test_mfcc_equal_those_of_librosa() -> None:
    waveform = real_speech(18_560)
    expected = librosa.feature.mfcc(y=waveform.double().numpy(), sr=16_000, n_mfcc=13, n_fft=512, win_length=400,
                                    hop_length=160, n_mels=80)  # fmt: skip
    features = log_mel(waveform, dataclasses.replace(LogMelConfig.preset("librosa"), mfcc=13), backend="cpp")
    torch.testing.assert_close(features, torch.from_numpy(expected).float().T, atol=1e-3, rtol=0)


@pytest.mark.parametrize("samples", SAMPLES, ids=lambda n: f"S{n}")
@pytest.mark.parametrize("name", ["speech", "syllables", "noise"])
def test_kaldi_preset_equals_kaldi_native_fbank(samples: int, name: str) -> None:
    """Its own float32 rounding (see kaldi_formula) shows in the quietest bands of loud frames: seldom, and little."""
    waveform = sound(name, samples)
    expected = kaldi_fbank(waveform)
    features = log_mel(waveform, LogMelConfig.preset("kaldi"), backend="cpp")
    assert features.shape == expected.shape
    error = (features - expected).abs()
    assert (error <= TOLERANCE).double().mean() >= 0.999
    rounding_of_the_peer = (expected - kaldi_formula(waveform)).abs().max()
    assert error.max() <= rounding_of_the_peer + 2e-6


def test_kaldi_preset_equals_kaldi_native_fbank_on_the_scale_of_int16() -> None:
    """As Kaldi itself reads a wav file: integers as they are."""
    integers = (real_speech(18_560) * 32767).round().to(torch.int16)
    scaled = integers.float()
    error = (log_mel(scaled, LogMelConfig.preset("kaldi"), backend="cpp") - kaldi_fbank(scaled)).abs()
    assert error.max() < 0.003
    assert (error <= TOLERANCE).double().mean() >= 0.999


@pytest.mark.parametrize("case", ["silence", "constant", "denormals", "click"])
def test_kaldi_preset_equals_kaldi_native_fbank_on_hard_signals(case: str) -> None:
    waveform = hard_cases(4000)[case]
    features = log_mel(waveform, LogMelConfig.preset("kaldi"), backend="cpp")
    torch.testing.assert_close(features, kaldi_fbank(waveform), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", PEERS)
def test_int16_means_x_over_32768(preset: str, backend: str) -> None:
    config = LogMelConfig.preset(preset)
    integers = (real_speech(18_560) * 32767).round().to(torch.int16)
    features = log_mel(integers, config, backend=backend)
    assert torch.equal(features, log_mel(integers.float() / 32768, config, backend=backend))
