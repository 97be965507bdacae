"""Sound for the feature tests: speech-like signals that are the same everywhere, real synthetic speech, hard cases."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

SAMPLE_RATE_HZ = 16_000


def speech_like(samples: int, seed: int = 0) -> Tensor:
    """[samples] float32: see _syllables; the beginning is the same for every length up to 4 s."""
    return torch.from_numpy(_syllables(-(-samples // 64_000) * 64_000, seed)[:samples].copy())


@functools.cache
def _syllables(samples: int, seed: int) -> NDArray[np.float32]:
    """[samples] float32: syllables (harmonics of a gliding pitch under moving formants), pauses and noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / SAMPLE_RATE_HZ
    pitch_hz = 120 + 40 * np.sin(2 * np.pi * 0.7 * time + rng.uniform(0, 6)) + 8 * np.sin(2 * np.pi * 5.3 * time)
    phase = 2 * np.pi * np.cumsum(pitch_hz) / SAMPLE_RATE_HZ
    formants_hz = [500 + 250 * np.sin(2 * np.pi * 1.9 * time), 1500 + 600 * np.sin(2 * np.pi * 1.3 * time + 1)]
    syllables = np.clip(np.sin(2 * np.pi * 3.1 * time + rng.uniform(0, 6)) + 0.4, 0, 1)
    voice = np.zeros(samples)
    for harmonic in range(1, 30):
        gain = sum(np.exp(-(((harmonic * pitch_hz - formant) / 150) ** 2)) for formant in formants_hz)
        voice += (gain + 0.02) * np.sin(harmonic * phase)
    hiss = rng.standard_normal(samples) * (0.002 + 0.02 * np.clip(np.sin(2 * np.pi * 2.3 * time), 0, 1))
    return np.clip(0.15 * syllables * voice + hiss, -1, 1).astype(np.float32)


def real_speech(samples: int) -> Tensor:
    """[samples] float32: words spoken by espeak-ng, repeated to length."""
    return torch.from_numpy(np.resize(_spoken(), samples))


@functools.cache
def _spoken() -> NDArray[np.float32]:
    pytest.importorskip("espeakng_loader", reason="real speech comes from espeak-ng: pip install 'avppc[synth]'")
    from avppc.synth.voice import Espeak

    speech = Espeak().say("The birch canoe slid on the smooth planks.", "en+m3", rate_wpm=160, pitch=45, pitch_range=50)
    seconds = np.arange(int(len(speech.samples) / speech.sample_rate_hz * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    times = np.arange(len(speech.samples)) / speech.sample_rate_hz
    return np.interp(seconds, times, speech.samples / 32768.0).astype(np.float32)


def hard_cases(samples: int) -> dict[str, Tensor]:
    """Signals [samples] float32 at the ends of what float audio can hold."""
    time = torch.arange(samples, dtype=torch.float64)
    return {
        "silence": torch.zeros(samples),
        "square_wave": torch.where((time // 20) % 2 == 0, 1.0, -1.0).float(),
        "constant": torch.full((samples,), 0.5),
        "denormals": torch.full((samples,), 1e-41) * torch.where(time % 3 == 0, 1.0, -1.0).float(),
        "click": torch.nn.functional.one_hot(torch.tensor(samples // 2), samples).float(),
        "nyquist": torch.where(time % 2 == 0, 1.0, -1.0).float(),
    }
