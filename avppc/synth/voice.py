"""The sound of a clip: the cut at 16 kHz, a room and noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avppc.clip import CLIP_SAMPLES, SAMPLE_RATE_HZ
from avppc.synth.config_difficulty import Difficulty
from avppc.synth.voice_espeak import Speech

_LEVEL = 0.07  # root mean square of the speech
_DECAY = 6.9  # -60 dB over the reverberation time, in nepers


def cut_speech(
    speech: Speech,
    start_seconds: float,  # of the clip, in the utterance; may lie outside it
) -> NDArray[np.float64]:  # [18560]
    """The clip's span of the utterance at 16 kHz, silence where there is none."""
    samples = _resample(speech.samples / 32768.0, speech.sample_rate_hz)
    start = round(start_seconds * SAMPLE_RATE_HZ)
    clip = np.zeros(CLIP_SAMPLES)
    low, high = max(0, start), min(len(samples), start + CLIP_SAMPLES)
    if high > low:
        clip[low - start : high - start] = samples[low:high]
    return clip


def _resample(samples: NDArray[np.float64], rate_hz: int) -> NDArray[np.float64]:
    """To 16 kHz by cutting the spectrum off at 8 kHz (band-limited interpolation)."""
    chunk = rate_hz // np.gcd(rate_hz, SAMPLE_RATE_HZ)  # samples that last a whole number of samples at 16 kHz
    chunks = 1 << int(np.ceil(np.log2(len(samples) / chunk + 1)))  # zeros behind; a power of two keeps the FFT fast
    target = chunks * chunk * SAMPLE_RATE_HZ // rate_hz
    spectrum = np.fft.rfft(samples, chunks * chunk)[: target // 2 + 1]
    resampled: NDArray[np.float64] = np.fft.irfft(spectrum, target) * (target / (chunks * chunk))
    return resampled[: -(-len(samples) * SAMPLE_RATE_HZ // rate_hz)]


def mix(
    speech: NDArray[np.float64],  # [S]
    rng: np.random.Generator,
    difficulty: Difficulty,
) -> tuple[NDArray[np.float32], float]:  # [S] from -1 to 1, and the speech-to-noise ratio in dB
    """Speech in a room, with white, pink or brown noise at a drawn ratio and overall level."""
    speech = speech * (_LEVEL / (_rms(speech) + 1e-6))
    if rng.random() < difficulty.reverb:
        speech = _reverberate(speech, rng)
    snr_db = float(rng.uniform(*difficulty.snr_db))
    noise = _colored_noise(len(speech), int(rng.integers(3)), rng)
    noise *= _rms(speech) / _rms(noise) * 10 ** (-snr_db / 20)
    gain = 10 ** (rng.uniform(-6, 6) / 20)
    return np.clip((speech + noise) * gain, -1, 1).astype(np.float32), snr_db


def _rms(samples: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(samples**2)))


def _reverberate(speech: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Speech plus its tail in a room of 80 to 500 ms reverberation time."""
    length = int(SAMPLE_RATE_HZ * rng.uniform(0.08, 0.5))
    response = rng.normal(size=length) * np.exp(-_DECAY * np.arange(length) / length)
    response *= rng.uniform(0.1, 0.5) / np.sqrt((response**2).sum())
    response[0] = 1.0
    size = 1 << (len(speech) + length - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(response, size), size)[: len(speech)]


def _colored_noise(length: int, color: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Noise whose power falls as 1 / frequency^color: white, pink, brown."""
    spectrum = np.fft.rfft(rng.normal(size=length))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** (color / 2)
    return np.fft.irfft(spectrum, length)
