"""Log-mel features in plain torch: the definition, the fallback without compiled code, and what tests compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from avppc.ops.log_mel.config import LogMelConfig

INT16_SCALE = 1.0 / 32768.0
NORMALIZE_EPSILON = 1e-5

_SYMMETRIC_WINDOWS = ("hann_symmetric", "hamming_symmetric", "blackman_symmetric", "povey")
_LOG_SCALE = {"none": 1.0, "ln": 1.0, "log10": 1.0 / math.log(10.0), "db": 10.0 / math.log(10.0)}


def log_mel_reference(
    waveform: Tensor,  # [..., S] float32, float64 or int16
    config: LogMelConfig,
    lengths: Tensor | None = None,  # [...] integers
) -> Tensor:
    """Features [..., F, features] as `LogMelConfig` describes them; differentiable; float64 for a float64 waveform.

    Tables are computed in float64. With lengths, clip i is waveform[i, :lengths[i]]; frames past its end hold the
    features of a silent frame (zero after normalize="per_feature").
    """
    samples = waveform.shape[-1]
    x = waveform.to(torch.float32) * INT16_SCALE if waveform.dtype == torch.int16 else waveform
    lengths = torch.full(x.shape[:-1], samples, device=x.device) if lengths is None else lengths.clamp(0, samples)
    if config.preemphasis and config.preemphasis_scope == "signal":
        x = torch.cat([x[..., :1], x[..., 1:] - config.preemphasis * x[..., :-1]], dim=-1)

    spectrum = torch.fft.rfft(_frames(x, config, lengths), n=config.fft_size)  # [..., F, fft_size / 2 + 1]
    power = spectrum.real.square() + spectrum.imag.square()
    if config.power == 1:
        power = _sqrt(power)
    mel = power @ mel_filter_bank_reference(config).to(power)  # [..., F, B]

    in_clip = _in_clip(config, lengths, mel.shape[-2])
    mel = torch.where(in_clip, mel, 0.0)
    return _scaled(mel, config, in_clip)


def _sqrt(x: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0: its own is infinite there and makes that of a silent sample NaN."""
    zero = x == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def window_reference(config: LogMelConfig) -> Tensor:
    """The window, [window_samples] float64."""
    if not isinstance(config.window, str):
        return torch.tensor(config.window, dtype=torch.float64)
    points = config.window_samples
    n = torch.arange(points, dtype=torch.float64)
    if config.window == "rectangular":
        return torch.ones_like(n)
    if config.window == "hann_half_sample":
        return 0.5 - 0.5 * torch.cos(2 * math.pi * (n + 0.5) / points)
    angle = 2 * math.pi * n / (points - 1 if config.window in _SYMMETRIC_WINDOWS else points)
    if config.window in ("hamming", "hamming_symmetric"):
        return 0.54 - 0.46 * torch.cos(angle)
    if config.window in ("blackman", "blackman_symmetric"):
        return 0.42 - 0.5 * torch.cos(angle) + 0.08 * torch.cos(2 * angle)
    hann = 0.5 - 0.5 * torch.cos(angle)
    return hann.clamp(min=0.0) ** 0.85 if config.window == "povey" else hann


def mel_filter_bank_reference(config: LogMelConfig) -> Tensor:
    """Weight of each frequency bin in each band, [fft_size / 2 + 1, bands] float64."""
    bins = torch.arange(config.fft_size // 2 + 1, dtype=torch.float64)
    bin_hz = bins * (config.sample_rate_hz / config.fft_size)
    edges_mel = _band_edges_mel(config)
    edges_hz = _mel_to_hz(edges_mel, config.mel_scale)

    if config.mel_scale == "kaldi":
        place, edges = _hz_to_mel(bin_hz, "kaldi")[:, None], edges_mel
    else:
        place, edges = bin_hz[:, None], edges_hz
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (place - left) / (center - left)
    falling = (right - place) / (right - center)
    weights = torch.minimum(rising, falling).clamp(min=0.0)
    if config.mel_scale == "kaldi":
        weights = torch.where(bins[:, None] == config.fft_size // 2, 0.0, weights)
    if config.mel_norm == "slaney":
        weights = weights * (2.0 / (edges_hz[2:] - edges_hz[:-2]))
    return weights


def band_centers_hz(config: LogMelConfig) -> Tensor:
    """Where each band weighs most, [bands] float64."""
    return _mel_to_hz(_band_edges_mel(config), config.mel_scale)[1:-1]


def _band_edges_mel(config: LogMelConfig) -> Tensor:
    limits = _hz_to_mel(torch.tensor([config.min_hz, config.upper_hz], dtype=torch.float64), config.mel_scale)
    steps = torch.arange(config.bands + 2, dtype=torch.float64) / (config.bands + 1)
    return limits[0] + (limits[1] - limits[0]) * steps


def _hz_to_mel(hz: Tensor, scale: str) -> Tensor:
    if scale == "slaney":  # linear up to 1000 Hz = 15 mel, then 27 mel for a factor of 6.4
        return torch.where(
            hz < 1000.0, hz * (3 / 200), 15.0 + (hz.clamp(min=1.0) / 1000.0).log() * (27 / math.log(6.4))
        )
    return 2595.0 * torch.log10(1.0 + hz / 700.0) if scale == "htk" else 1127.0 * torch.log(1.0 + hz / 700.0)


def _mel_to_hz(mel: Tensor, scale: str) -> Tensor:
    if scale == "slaney":
        return torch.where(mel < 15.0, mel * (200 / 3), 1000.0 * torch.exp((mel - 15.0) * (math.log(6.4) / 27)))
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0) if scale == "htk" else 700.0 * (torch.exp(mel / 1127.0) - 1.0)


def _frames(x: Tensor, config: LogMelConfig, lengths: Tensor) -> Tensor:
    """[..., S] -> windowed frames [..., F, window_samples]."""
    frames = config.num_frames(x.shape[-1])
    span = (frames - 1) * config.hop_samples + config.window_samples
    place = torch.arange(span, device=x.device) + config.first_sample  # of the samples that frames read
    source = _source_samples(place, lengths[..., None], config.padding)
    padded = torch.where(source >= 0, x.gather(-1, source.clamp(0, x.shape[-1] - 1)), 0.0)
    framed = padded.unfold(-1, config.window_samples, config.hop_samples)
    if config.remove_dc:
        framed = framed - framed.mean(-1, keepdim=True)
    if config.preemphasis and config.preemphasis_scope == "frame":
        framed = framed - config.preemphasis * torch.cat([framed[..., :1], framed[..., :-1]], dim=-1)
    return framed * window_reference(config).to(x)


def _source_samples(
    place: Tensor,  # [P]
    length: Tensor,  # [..., 1]
    padding: str,
) -> Tensor:
    """Which sample stands at each place of a clip, -1 for zero: [..., P]."""
    last = length - 1
    if padding == "reflect":
        period = (2 * last).clamp(min=1)
        source = torch.minimum(place % period, period - place % period)
    elif padding == "symmetric":
        period = (2 * length).clamp(min=1)
        source = torch.minimum(place % period, period - 1 - place % period)
    elif padding == "circular":
        source = place % length.clamp(min=1)
    elif padding == "replicate":
        source = torch.minimum(place.clamp(min=0), last)
    else:
        source = torch.where((place >= 0) & (place < length), place, -1)
    return torch.where(length > 0, source, -1)


def _in_clip(config: LogMelConfig, lengths: Tensor, frames: int) -> Tensor:
    """[...] -> [..., F, 1]: whether a frame belongs to its clip."""
    count = 1 + torch.div(lengths - config.least_samples, config.hop_samples, rounding_mode="floor")
    count = torch.where(lengths > 0, count - int(config.drop_last_frame), 0)
    return (torch.arange(frames, device=lengths.device) < count[..., None])[..., None]


def _scaled(mel: Tensor, config: LogMelConfig, in_clip: Tensor) -> Tensor:
    """Everything after the mel bands: [..., F, B] -> [..., F, features]."""
    value = mel
    if config.log != "none":
        value = (mel + config.log_offset).clamp(min=config.log_floor).log() * _LOG_SCALE[config.log]
    if config.relative_to_max or config.dynamic_range is not None:
        largest = torch.where(in_clip, value, -math.inf).amax((-2, -1), keepdim=True)
        largest = torch.where(in_clip.any(-2, keepdim=True), largest, value.amin((-2, -1), keepdim=True))
        if config.dynamic_range is not None:
            value = torch.maximum(value, largest - config.dynamic_range)
        if config.relative_to_max:
            value = value - largest
    value = value * config.output_scale + config.output_shift
    if config.mfcc:
        value = value @ dct_reference(config).to(value)
    if config.normalize == "per_feature":
        count = in_clip.sum(-2, keepdim=True)
        mean = torch.where(in_clip, value, 0.0).sum(-2, keepdim=True) / count.clamp(min=1)
        centred = torch.where(in_clip, value - mean, 0.0)
        deviation = _sqrt(centred.square().sum(-2, keepdim=True) / (count - 1).clamp(min=1))
        value = centred / (deviation + NORMALIZE_EPSILON)
    return value


def dct_reference(config: LogMelConfig) -> Tensor:
    """Orthonormal DCT-II from bands to the first mfcc coefficients, [bands, mfcc] float64."""
    band = torch.arange(config.bands, dtype=torch.float64)[:, None]
    coefficient = torch.arange(config.mfcc, dtype=torch.float64)
    dct = torch.cos(math.pi / config.bands * (band + 0.5) * coefficient) * math.sqrt(2.0 / config.bands)
    return torch.where(coefficient == 0, dct * math.sqrt(0.5), dct)
