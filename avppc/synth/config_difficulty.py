"""How hard the clips are to read: one set of amounts a level."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Difficulty:
    """Amounts of everything that varies between clips without changing what is said."""

    pose: float
    """Head position, tilt, size and their drift; 1 is about 3 pixels and 4 degrees."""
    light: float
    """Strength and slant of the directional light."""
    blur: float
    """Largest standard deviation of the camera's blur, pixels."""
    noise: float
    """Camera noise; 1 draws a standard deviation from 1 to 5 gray levels."""
    target_noise: float
    """Standard deviation of the lips' aim around a phoneme's ideal shape."""
    reverb: float
    """Probability of a reverberant room."""
    snr_db: tuple[float, float]
    """Range of the speech-to-noise ratio, dB."""
    context: float
    """Probability of words before, and likewise after, the labelled word."""
    jitter_seconds: float
    """Standard deviation of the word's centre around the clip's centre."""
    identity: float
    """Spread of faces and voices; 0 makes everyone the average person."""


DIFFICULTIES: dict[str, Difficulty] = {
    "easy": Difficulty(
        pose=0.4,
        light=0.5,
        blur=0.3,
        noise=0.4,
        target_noise=0.03,
        reverb=0.3,
        snr_db=(10.0, 30.0),
        context=0.0,
        jitter_seconds=0.02,
        identity=0.6,
    ),
    "medium": Difficulty(
        pose=1.0,
        light=1.0,
        blur=1.0,
        noise=1.0,
        target_noise=0.07,
        reverb=0.5,
        snr_db=(0.0, 20.0),
        context=0.5,
        jitter_seconds=0.05,
        identity=1.0,
    ),
    "hard": Difficulty(
        pose=1.6,
        light=1.3,
        blur=1.6,
        noise=1.8,
        target_noise=0.12,
        reverb=0.7,
        snr_db=(-5.0, 15.0),
        context=1.0,
        jitter_seconds=0.08,
        identity=1.0,
    ),
}
