"""Settings of `avppc features`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from avppc.config.checks import check_choice, check_integer, check_types
from avppc.config.features import PRESETS, LogMelConfig, Preset


@dataclass(frozen=True)
class FeaturesConfig:
    """Log-mel features or MFCC of the sound of one file."""

    source: Path
    """The file: wav, flac, mp3, ogg, mp4, mkv, ...; its first audio stream is mixed to mono at 16 kHz. It may be given
    first, without the flag: avppc features FILE."""
    preset: Preset = "torchaudio"
    """Whose features: torchaudio, librosa, whisper or kaldi."""
    mfcc: int = 0
    """Cepstral coefficients to give instead of the 80 bands, 1 to 80; 0: the bands."""
    plot: Path | None = None
    """Where to write a picture of the waveform and the features: .png, .svg or .pdf."""
    out: Path | None = None
    """Where to write the features: .npy, float32 [frames, features]."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("preset", self.preset, PRESETS)
        check_integer("mfcc", self.mfcc, 0, LogMelConfig.preset(self.preset).bands)
        for name, allowed in (("plot", (".png", ".svg", ".pdf")), ("out", (".npy",))):
            path = getattr(self, name)
            if path is not None and path.suffix not in allowed:
                raise ValueError(f"{name} must end in {' or '.join(allowed)}, got {path}")
