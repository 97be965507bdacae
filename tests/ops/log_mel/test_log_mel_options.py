"""Windows, transform lengths, framings and paddings: against torch.stft, numpy, librosa and kaldi-native-fbank."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import kaldi_native_fbank
import librosa
import numpy as np
import pytest
import scipy.signal
import torch
from log_mel_configs import tolerance_of
from make_audio import real_speech, speech_like
from torch import Tensor

from avppc import LogMelConfig, log_mel
from avppc.ops.log_mel.reference import log_mel_reference, mel_filter_bank_reference, window_reference
from avppc.settings import config_from_dict, config_to_dict

KALDI = LogMelConfig.preset("kaldi")
TORCH_WINDOWS = {
    "hann": torch.hann_window,
    "hamming": torch.hamming_window,
    "blackman": torch.blackman_window,
}
NUMPY_PADDINGS = {
    "reflect": "reflect",
    "constant": "constant",
    "replicate": "edge",
    "circular": "wrap",
    "symmetric": "symmetric",
}
KALDI_WINDOWS = {
    "povey": "povey",
    "hanning": "hann_symmetric",
    "hann": "hann",
    "hamming": "hamming_symmetric",
    "blackman": "blackman_symmetric",
    "rectangular": "rectangular",
    "sine": tuple(np.sin(np.pi * np.arange(400) / 399)),
}


def check(waveform: Tensor, config: LogMelConfig, expected: Tensor) -> None:
    """The C++ features and the definition equal float64 features from elsewhere."""
    for backend in ("cpp", "reference"):
        features = log_mel(waveform if backend == "cpp" else waveform.double(), config, backend=backend)
        torch.testing.assert_close(features.double(), expected, atol=tolerance_of(config, waveform.double()), rtol=1e-6)


def log_mel_of(frames: Tensor, config: LogMelConfig) -> Tensor:
    """ln(mel power + 1e-6) of frames [F, fft_size] that are already windowed."""
    power = torch.fft.rfft(frames).abs().square()
    return (power @ mel_filter_bank_reference(config) + config.log_offset).log()


@pytest.mark.parametrize("periodic", [True, False])
@pytest.mark.parametrize("name", TORCH_WINDOWS)
@pytest.mark.parametrize("points", [2, 5, 400])
def test_windows_of_torch(name: str, points: int, periodic: bool) -> None:
    config = LogMelConfig(window=name if periodic else f"{name}_symmetric", window_samples=points)
    expected = TORCH_WINDOWS[name](points, periodic=periodic, dtype=torch.float64)
    torch.testing.assert_close(window_reference(config), expected, atol=1e-15, rtol=0)


def test_a_rectangular_window_is_all_ones() -> None:
    assert (window_reference(LogMelConfig(window="rectangular")) == 1).all()


@pytest.mark.parametrize("name", ["hamming", "blackman_symmetric", "rectangular", "given"])
def test_features_with_a_window_equal_those_of_torch_stft(name: str) -> None:
    window = torch.kaiser_window(400, True, 14.0, dtype=torch.float64) if name == "given" else None
    config = LogMelConfig(window=name if window is None else window, drop_last_frame=False)
    window = window_reference(config) if window is None else window
    waveform = speech_like(8000)
    spectrum = torch.stft(waveform.double(), 512, 160, 400, window, return_complex=True)
    expected = (spectrum.abs().square().T @ mel_filter_bank_reference(config) + 1e-6).log()
    check(waveform, config, expected)


@pytest.mark.parametrize("make", [list, tuple, np.asarray, torch.tensor, lambda x: np.asarray(x, dtype=np.float32)],
                         ids=["list", "tuple", "array", "tensor", "float32"])  # fmt: skip
def test_a_window_of_ones_own_is_kept_as_numbers(make: Any) -> None:
    values = scipy.signal.get_window(("tukey", 0.3), 400).tolist()
    config = LogMelConfig(window=make(values))
    assert isinstance(config.window, tuple)
    assert config.window == pytest.approx(values, abs=1e-7)
    assert hash(config) == hash(dataclasses.replace(config))
    assert LogMelConfig.from_text(config.to_text()) == config
    assert config_from_dict(LogMelConfig, json.loads(json.dumps(config_to_dict(config))), "config.json") == config
    assert log_mel(speech_like(1600), config).isfinite().all()


@pytest.mark.parametrize(
    ("window", "error", "text"),
    [
        ("kaiser", ValueError, "window must be one of 'hann', .*'rectangular'; got 'kaiser'"),
        (torch.ones(399), ValueError, r"window must have window_samples \(400\) numbers, got 399"),
        (torch.ones(1, 400), ValueError, r"window_samples numbers, got a Tensor of shape \(1, 400\)"),
        (torch.ones(400, device="meta"), ValueError, "window_samples numbers, got a Tensor"),
        ([*[1.0] * 399, float("nan")], ValueError, r"window\[399\] must be finite, got nan"),
        (["a"] * 400, TypeError, r"window\[0\] must be a number, got str"),
        (torch.ones(400, dtype=torch.complex64), TypeError, r"window\[0\] must be a number, got complex"),
        (np.full(400, 1e9), ValueError, r"window\[0\] must be from -1000000.0 to 1000000.0"),
        (None, TypeError, "window must be one of .* or window_samples numbers, got NoneType"),
    ],
)
def test_a_window_that_cannot_be_is_refused(window: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        LogMelConfig(window=window)


@pytest.mark.parametrize("fft_size", [2, 4, 6, 8, 10, 14, 22, 98, 882, 1102, 1764, 2014, 4006, 8190, 8192])
@pytest.mark.parametrize("power", [1, 2])
def test_any_even_transform_equals_that_of_torch(fft_size: int, power: int) -> None:
    """4006 is twice a prime; 8190 needs the longest chirp."""
    config = LogMelConfig(fft_size=fft_size, window_samples=fft_size, hop_samples=max(1, fft_size // 3), bands=1,
                          power=power, sample_rate_hz=44_100, drop_last_frame=False)  # fmt: skip
    waveform = speech_like(3 * fft_size + 40)
    window = torch.hann_window(fft_size, dtype=torch.float64)
    spectrum = torch.stft(waveform.double(), fft_size, config.hop_samples, window=window, return_complex=True)
    expected = (spectrum.abs().pow(power).T @ mel_filter_bank_reference(config) + 1e-6).log()
    check(waveform, config, expected)


@pytest.mark.parametrize("fft_size", [882, 1102, 1764])
def test_transforms_of_music_rates_equal_those_of_librosa(fft_size: int) -> None:
    rate = {882: 44_100, 1102: 22_050, 1764: 44_100}[fft_size]  # windows of 20, 50 and 40 ms
    config = dataclasses.replace(LogMelConfig.preset("librosa"), sample_rate_hz=rate, fft_size=fft_size,
                                 window_samples=fft_size, hop_samples=fft_size // 2, bands=40)  # fmt: skip
    waveform = real_speech(18_560)
    mel = librosa.feature.melspectrogram(y=waveform.double().numpy(), sr=rate, n_fft=fft_size, n_mels=40,
                                         hop_length=fft_size // 2)  # fmt: skip
    expected = torch.from_numpy(librosa.power_to_db(mel, ref=1.0, amin=1e-10, top_db=80.0)).T
    torch.testing.assert_close(log_mel(waveform, config, backend="cpp"), expected.float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", [1, 2, 5, 300, 1601])
@pytest.mark.parametrize("padding", NUMPY_PADDINGS)
@pytest.mark.parametrize("framing", ["center", "exact", "mid_hop"])
def test_paddings_equal_those_of_numpy(framing: str, padding: str, samples: int) -> None:
    config = LogMelConfig(framing=framing, padding=padding, drop_last_frame=False, window_samples=300, bands=40)
    if config.num_frames(samples) == 0:
        assert framing != "center"
        return
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    first = {"center": -256, "exact": -(512 - 160) // 2, "mid_hop": 80 - 150}[framing]
    margin = 0 if framing == "mid_hop" else 106  # mid_hop has its window at the start of the transform
    padded = torch.from_numpy(np.pad(waveform.double().numpy(), (-first, 2000), mode=NUMPY_PADDINGS[padding]))
    window = torch.nn.functional.pad(torch.hann_window(300, dtype=torch.float64), (margin, 212 - margin))
    frames = padded.unfold(0, 512, 160)[: config.num_frames(samples)]
    check(waveform, config, log_mel_of(frames * window, config))


@pytest.mark.parametrize("hop", [160, 161])
@pytest.mark.parametrize("samples", [160, 161, 511, 1600, 1611])
def test_exact_framing_makes_as_many_frames_as_padding_by_hand(samples: int, hop: int) -> None:
    """As vocoders frame: (fft_size - hop_samples) / 2 reflected samples on both sides, then only whole frames."""
    config = LogMelConfig(framing="exact", drop_last_frame=False, hop_samples=hop)
    padding = (512 - hop) // 2
    if samples + 2 * padding < 512:
        assert config.num_frames(samples) == 0
        return
    padded = np.pad(speech_like(samples).double().numpy(), padding, mode="reflect")
    window = torch.hann_window(400, dtype=torch.float64)
    spectrum = torch.stft(torch.from_numpy(padded), 512, hop, 400, window, center=False, return_complex=True)
    if samples % hop == 0 and hop % 2 == 0:
        assert spectrum.shape[-1] == samples // hop
    check(speech_like(samples), config, (spectrum.abs().square().T @ mel_filter_bank_reference(config) + 1e-6).log())


def kaldi_options(**changes: Any) -> Any:
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 80
    for name, value in changes.items():
        setattr(options.frame_opts, name, value)
    return options


def kaldi_fbank(waveform: Tensor, options: Any) -> Tensor:
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(options.frame_opts.samp_freq, waveform.tolist())
    fbank.input_finished()
    return torch.from_numpy(np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)]))


def assert_equals_kaldi(waveform: Tensor, config: LogMelConfig, options: Any) -> None:
    """Kaldi's float32 rounding shows in the quietest bands of loud frames: seldom, and little."""
    expected = kaldi_fbank(waveform, options)
    features = log_mel(waveform, config, backend="cpp")
    assert features.shape == expected.shape
    error = (features - expected).abs()
    assert error.max() < 0.01
    assert (error > 1e-4).sum() <= max(1, error.numel() // 100)
    check(waveform, config, log_mel_reference(waveform.double(), config))


@pytest.mark.parametrize("window", KALDI_WINDOWS)
@pytest.mark.parametrize("snip_edges", [True, False])
def test_windows_of_kaldi_native_fbank(window: str, snip_edges: bool) -> None:
    config = dataclasses.replace(KALDI, window=KALDI_WINDOWS[window], framing="snip_edges" if snip_edges else "mid_hop")
    assert_equals_kaldi(real_speech(8000), config, kaldi_options(window_type=window, snip_edges=snip_edges))


@pytest.mark.parametrize("samples", [79, 80, 239, 240, 401, 1601, 1680, 18_560])
def test_kaldi_without_snip_edges_has_a_frame_a_hop(samples: int) -> None:
    config = dataclasses.replace(KALDI, framing="mid_hop")
    if samples < 80:
        assert config.num_frames(samples) == 0
        return
    assert config.num_frames(samples) == (samples + 80) // 160
    assert_equals_kaldi(real_speech(18_560)[-samples:], config, kaldi_options(snip_edges=False))


@pytest.mark.parametrize("snip_edges", [True, False])
@pytest.mark.parametrize(("rate", "milliseconds"), [(44_100, 20.0), (22_050, 40.0), (8000, 25.0)])
def test_kaldi_without_rounding_to_a_power_of_two(rate: int, milliseconds: float, snip_edges: bool) -> None:
    window, hop = int(rate * milliseconds / 1000), rate // 100
    config = dataclasses.replace(KALDI, sample_rate_hz=rate, window_samples=window, fft_size=window, hop_samples=hop,
                                 bands=23, framing="snip_edges" if snip_edges else "mid_hop")  # fmt: skip
    options = kaldi_options(samp_freq=rate, frame_length_ms=milliseconds, round_to_power_of_two=False,
                            snip_edges=snip_edges)  # fmt: skip
    options.mel_opts.num_bins = 23
    assert_equals_kaldi(real_speech(18_560), config, options)


def test_exact_framing_refuses_hops_beyond_the_transform() -> None:
    with pytest.raises(ValueError, match=r'hop_samples must be at most fft_size with framing="exact", got 513'):
        LogMelConfig(framing="exact", hop_samples=513)


def test_bands_without_a_point_of_the_transform_are_warned_of_once() -> None:
    config = LogMelConfig(bands=128, window_samples=399, fft_size=400)  # torchaudio's defaults, but for the window
    with pytest.warns(UserWarning, match=r"of 128 mel bands \(the first: band \d+\) lie between two points") as caught:
        features = log_mel(speech_like(1600), config)
    assert caught[0].filename == __file__
    assert int(str(caught[0].message).split()[0]) == (features == features.min()).all(0).sum()
    log_mel(speech_like(1600), config)  # a second warning would be an error here
    for preset in ("torchaudio", "librosa", "whisper", "kaldi"):
        log_mel(speech_like(1600), LogMelConfig.preset(preset))
