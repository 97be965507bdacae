"""Settings of `avppc features`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from avppc.checks import check_choice, check_types
from avppc.ops.log_mel.config import PRESETS, Framing, LogMelConfig, Padding, Preset, Window


@dataclass(frozen=True)
class FeaturesConfig:
    """Log-mel features or MFCC of the sound of one file."""

    source: Path
    """The file: wav, flac, mp3, ogg, NIST SPHERE, mp4, mkv, ...; its first audio stream is mixed to mono at 16 kHz. It
    may be given first, without the flag: avppc features FILE."""
    preset: Preset = "torchaudio"
    """Whose features: torchaudio, librosa, whisper or kaldi."""
    mfcc: int = 0
    """Cepstral coefficients to give instead of the 80 bands, 1 to 80; 0: the bands."""
    window: Window | None = None
    """Another window than the preset's. LogMelConfig says what this and the next five mean."""
    window_samples: int | None = None
    """Another length of the window, at most fft_size."""
    fft_size: int | None = None
    """Another length of the Fourier transform, even, 2 to 8192."""
    hop_samples: int | None = None
    """Another distance between frames."""
    framing: Framing | None = None
    """Other places of the frames."""
    padding: Padding | None = None
    """Another padding at the ends."""
    plot: Path | None = None
    """Where to write a picture of the waveform and the features: .png, .svg or .pdf."""
    out: Path | None = None
    """Where to write the features: .npy, float32 [frames, features]."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("preset", self.preset, PRESETS)
        _ = self.settings  # checks what changes the preset
        for name, allowed in (("plot", (".png", ".svg", ".pdf")), ("out", (".npy",))):
            path = getattr(self, name)
            if path is not None and path.suffix not in allowed:
                raise ValueError(f"{name} must end in {' or '.join(allowed)}, got {path}")

    @property
    def settings(self) -> LogMelConfig:
        """The preset with what is asked for in place of its own."""
        names = ("window", "window_samples", "fft_size", "hop_samples", "framing", "padding")
        changes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(LogMelConfig.preset(self.preset), mfcc=self.mfcc, **changes)
