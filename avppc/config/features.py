"""What audio features are made of: every convention in which the field's log-mel implementations differ is a field."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields
from typing import Any

import torch

from avppc.config.checks import check_bool, check_choice, check_integer, check_number

MEL_SCALES = ("htk", "slaney", "kaldi")
MEL_NORMS = ("none", "slaney")
FRAMINGS = ("center", "left", "snip_edges")
PADDINGS = ("reflect", "constant")
WINDOWS = ("hann", "hann_symmetric", "hann_half_sample", "povey")
PREEMPHASIS_SCOPES = ("signal", "frame")
LOGS = ("none", "ln", "log10", "db")
NORMALIZATIONS = ("none", "per_feature")
PRESETS = ("torchaudio", "librosa", "whisper", "kaldi")

MAX_FFT_SIZE = 8192
MAX_BANDS = 512
SMALLEST_FLOOR = 1e-30  # far above float32's smallest normal number, so that the logarithm is always finite


@dataclass(frozen=True)
class LogMelConfig:
    """Log-mel (or MFCC) features: framing, window, spectrum, mel bands, logarithm, scaling, in this order.

    The default is the "torchaudio" preset: 4 feature frames for each video frame at 16 kHz and 25 frames a second.
    """

    sample_rate_hz: int = 16_000
    """Samples a second; only the mel bands depend on it."""
    window_samples: int = 400
    """Length of the window, at most fft_size."""
    fft_size: int = 512
    """Points of the Fourier transform, 16 to 8192; even, with no prime factor above 5."""
    hop_samples: int = 160
    """Samples from one frame to the next."""
    bands: int = 80
    """Number of mel bands, 1 to 512."""
    mel_scale: str = "htk"
    """"htk" or "slaney": triangles over Hz; "kaldi": the HTK scale, triangles over mel, without the Nyquist bin."""
    mel_norm: str = "none"
    """"none": triangles of height 1; "slaney": of area 1 over Hz."""
    min_hz: float = 0.0
    """Lower edge of the first band."""
    max_hz: float | None = None
    """Upper edge of the last band; None: half the sample rate."""
    power: int = 2
    """Exponent of the magnitude spectrum: 1 or 2."""
    framing: str = "center"
    """Frame t reads, from sample h = t * hop_samples on: "center": fft_size samples around h, the ends padded; "left":
    fft_size samples from h on, the window in their middle; "snip_edges": window_samples samples from h on."""
    padding: str = "reflect"
    """What is beyond the ends if framing is "center": "reflect" (again and again in short clips) or "constant", 0."""
    drop_last_frame: bool = True
    """Leaves out the last frame: a centred clip of n * hop_samples samples then has n frames, not n + 1."""
    window: str = "hann"
    """"hann" (periodic), "hann_symmetric", "hann_half_sample" (sampled between the points), or "povey" (Kaldi's)."""
    preemphasis: float = 0.0
    """The factor p of x[i] - p x[i - 1], 0 to 1."""
    preemphasis_scope: str = "signal"
    """"signal": before framing, the first sample kept; "frame": in each frame, the first sample times 1 - p."""
    remove_dc: bool = False
    """Subtracts each frame's mean before anything else is done to the frame."""
    log: str = "ln"
    """"none", "ln", "log10" or "db" (10 log10)."""
    log_offset: float = 1e-6
    """Added before the logarithm."""
    log_floor: float = 0.0
    """Smaller values are raised to this before the logarithm, after log_offset is added."""
    relative_to_max: bool = False
    """Subtracts the clip's largest value after the logarithm."""
    dynamic_range: float | None = None
    """Values are raised to at least the clip's maximum less this, in units of the logarithm; None: no limit."""
    output_scale: float = 1.0
    """The result is output_scale * value + output_shift."""
    output_shift: float = 0.0
    """See output_scale."""
    mfcc: int = 0
    """Cepstral coefficients (orthonormal DCT-II over the bands) to give instead of the bands; 0: the bands."""
    normalize: str = "none"
    """"per_feature": each feature less its mean over the clip, divided by its standard deviation (n - 1) plus 1e-5."""

    def __post_init__(self) -> None:
        check_integer("sample_rate_hz", self.sample_rate_hz, 1, 10_000_000)
        check_integer("fft_size", self.fft_size, 16, MAX_FFT_SIZE)
        if self.fft_size % 2 or not _has_only_factors_2_3_5(self.fft_size):
            raise ValueError(f"fft_size must be even and have no prime factor above 5, got {self.fft_size}")
        check_integer("window_samples", self.window_samples, 2, self.fft_size)
        check_integer("hop_samples", self.hop_samples, 1, 1_000_000)
        check_integer("bands", self.bands, 1, MAX_BANDS)
        check_integer("mfcc", self.mfcc, 0, self.bands)
        check_integer("power", self.power, 1, 2)
        check_choice("mel_scale", self.mel_scale, MEL_SCALES)
        check_choice("mel_norm", self.mel_norm, MEL_NORMS)
        check_choice("framing", self.framing, FRAMINGS)
        check_choice("padding", self.padding, PADDINGS)
        check_choice("window", self.window, WINDOWS)
        check_choice("preemphasis_scope", self.preemphasis_scope, PREEMPHASIS_SCOPES)
        check_choice("log", self.log, LOGS)
        check_choice("normalize", self.normalize, NORMALIZATIONS)
        for name in ("drop_last_frame", "remove_dc", "relative_to_max"):
            check_bool(name, getattr(self, name))
        self._check_numbers()
        text = ";".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
        self.__dict__["_text"] = text  # not a field; made here because torch.compile cannot trace the making

    def _check_numbers(self) -> None:
        nyquist_hz = self.sample_rate_hz / 2
        check_number("min_hz", self.min_hz, 0.0)
        if self.max_hz is not None:
            check_number("max_hz", self.max_hz, 0.0, nyquist_hz)
        if self.min_hz >= self.upper_hz:
            raise ValueError(f"min_hz must be below max_hz ({self.upper_hz}), got {self.min_hz}")
        check_number("preemphasis", self.preemphasis, 0.0, 1.0)
        check_number("log_offset", self.log_offset, 0.0, 1e30)
        check_number("log_floor", self.log_floor, 0.0, 1e30)
        if self.log != "none" and max(self.log_offset, self.log_floor) < SMALLEST_FLOOR:
            raise ValueError(
                f"log_offset or log_floor must be at least {SMALLEST_FLOOR} or silence has no logarithm; "
                f"got {self.log_offset} and {self.log_floor}"
            )
        if self.dynamic_range is not None:
            check_number("dynamic_range", self.dynamic_range, 0.0, 1e30)
        check_number("output_scale", self.output_scale, -1e30, 1e30)
        check_number("output_shift", self.output_shift, -1e30, 1e30)
        for field in fields(self):  # torch takes no int beyond 64 bits, and 20 and 20.0 are the same features
            value = getattr(self, field.name)
            if "float" in str(field.type) and isinstance(value, int):
                object.__setattr__(self, field.name, float(value))

    @property
    def upper_hz(self) -> float:
        """Upper edge of the last band: max_hz, or half the sample rate."""
        return self.sample_rate_hz / 2 if self.max_hz is None else float(self.max_hz)

    @property
    def features(self) -> int:
        """Values a frame: mfcc where it is set, else bands."""
        return self.mfcc or self.bands

    @property
    def first_sample(self) -> int:
        """Where the window of frame 0 begins; negative with framing "center"."""
        if self.framing == "snip_edges":
            return 0
        margin = (self.fft_size - self.window_samples) // 2
        return margin if self.framing == "left" else margin - self.fft_size // 2

    def num_frames(self, num_samples: int) -> int:
        """Number of frames of a clip of num_samples samples; 0 where the clip is too short for one."""
        if isinstance(num_samples, bool) or not isinstance(num_samples, (int, torch.SymInt)):
            raise TypeError(f"num_samples must be an int, got {type(num_samples).__name__}")
        if self.framing == "center":
            frames = 1 + num_samples // self.hop_samples
        else:
            needed = self.fft_size if self.framing == "left" else self.window_samples
            frames = 1 + (num_samples - needed) // self.hop_samples
        return max(0, frames - 1 if self.drop_last_frame else frames) if num_samples > 0 else 0

    def to_text(self) -> str:
        """All fields as "name=value;...", which is how the compiled operators take them; numbers keep every bit."""
        return str(self.__dict__["_text"])

    @classmethod
    def from_text(cls, text: str) -> LogMelConfig:
        """The configuration whose `to_text` is text.

        Raises:
            TypeError, ValueError: text is not of that form, lacks a field or names an unknown one.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        parts = dict(part.partition("=")[::2] for part in text.split(";"))
        names = [field.name for field in fields(cls)]
        if list(parts) != names:
            raise ValueError(f'text must be "name=value;..." with {", ".join(names)}; got {text!r}')
        return cls(**{name: _plain_value(value) for name, value in parts.items()})

    @classmethod
    def preset(cls, name: str) -> LogMelConfig:
        """The features of "torchaudio" (the default), "librosa", "whisper" or "kaldi"; 16 kHz, 80 bands.

        Raises:
            ValueError: the name is none of these.
        """
        check_choice("name", name, PRESETS)
        if name == "librosa":
            return cls(
                mel_scale="slaney",
                mel_norm="slaney",
                padding="constant",
                drop_last_frame=False,
                log="db",
                log_offset=0.0,
                log_floor=1e-10,
                dynamic_range=80.0,
            )
        if name == "whisper":
            return cls(
                fft_size=400,
                mel_scale="slaney",
                mel_norm="slaney",
                log="log10",
                log_offset=0.0,
                log_floor=1e-10,
                dynamic_range=8.0,
                output_scale=0.25,
                output_shift=1.0,
            )
        if name == "kaldi":
            return cls(
                mel_scale="kaldi",
                min_hz=20.0,
                framing="snip_edges",
                drop_last_frame=False,
                window="povey",
                preemphasis=0.97,
                preemphasis_scope="frame",
                remove_dc=True,
                log_offset=0.0,
                log_floor=2.0**-23,  # float32's epsilon
            )
        return cls()


def _plain_value(text: str) -> Any:
    """None, a truth value or a number; a name, such as "hann", stays a string."""
    words = {"None": None, "True": True, "False": False}
    if text in words:
        return words[text]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _has_only_factors_2_3_5(number: int) -> bool:
    for factor in (2, 3, 5):
        while number % factor == 0:
            number //= factor
    return number == 1
