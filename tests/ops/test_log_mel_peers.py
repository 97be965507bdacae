"""The presets against the implementations that they name: librosa and kaldi-native-fbank themselves, torchaudio's and
Whisper's formulas written out."""

from __future__ import annotations

import kaldi_native_fbank
import librosa
import numpy as np
import pytest
import torch
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
