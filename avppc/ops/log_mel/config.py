"""What audio features are made of: every convention in which the field's log-mel implementations differ is a field."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from avppc.checks import check_bool, check_choice, check_integer, check_number

__all__ = ["LogMelConfig"]

MelScale = Literal["htk", "slaney", "kaldi"]
MelNorm = Literal["none", "slaney"]
Framing = Literal["center", "left", "snip_edges", "mid_hop", "exact"]
Padding = Literal["reflect", "constant", "replicate", "circular", "symmetric"]
Window = Literal[
    "hann", "hann_symmetric", "hann_half_sample", "povey", "hamming", "hamming_symmetric", "blackman",
    "blackman_symmetric", "rectangular",
]  # fmt: skip
PreemphasisScope = Literal["signal", "frame"]
Log = Literal["none", "ln", "log10", "db"]
Normalization = Literal["none", "per_feature"]
Preset = Literal["torchaudio", "librosa", "whisper", "kaldi"]

MEL_SCALES, MEL_NORMS, FRAMINGS, PADDINGS = map(get_args, (MelScale, MelNorm, Framing, Padding))
WINDOWS, PREEMPHASIS_SCOPES, LOGS, NORMALIZATIONS = map(get_args, (Window, PreemphasisScope, Log, Normalization))
PRESETS = get_args(Preset)

MAX_FFT_SIZE = 8192
MAX_BANDS = 512
MAX_WINDOW_VALUE = 1e6
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
    """Points of the Fourier transform, 2 to 8192, even. Sizes from 12 on without a prime factor above 5 are faster, and
    the only ones with a CUDA kernel."""
    hop_samples: int = 160
    """Samples from one frame to the next."""
    bands: int = 80
    """Number of mel bands, 1 to 512."""
    mel_scale: MelScale = "htk"
    """"htk" or "slaney": triangles over Hz; "kaldi": the HTK scale, triangles over mel, without the Nyquist bin."""
    mel_norm: MelNorm = "none"
    """"none": triangles of height 1; "slaney": of area 1 over Hz."""
    min_hz: float = 0.0
    """Lower edge of the first band."""
    max_hz: float | None = None
    """Upper edge of the last band; None: half the sample rate."""
    power: int = 2
    """Exponent of the magnitude spectrum: 1 or 2."""
    framing: Framing = "center"
    """What frame t reads, with h = t * hop_samples. "center": fft_size samples around h, the window in their middle;
    "exact": the same around h + hop_samples / 2, so that n * hop_samples samples make n frames; "mid_hop":
    window_samples samples around h + hop_samples / 2, with the clip's length in hops rounded to the number of frames
    (Kaldi without snip_edges). These three reach beyond the clip's ends. "left": fft_size samples from h on, the window
    in their middle; "snip_edges": window_samples samples from h on; only whole frames count."""
    padding: Padding = "reflect"
    """What stands beyond the ends of a clip a b c: "reflect": c b | a b c | b a, "constant": zeros, "replicate":
    a a | a b c | c c, "circular": b c | a b c | a b, "symmetric": b a | a b c | c b (Kaldi's); again and again where
    the clip is short."""
    drop_last_frame: bool = True
    """Leaves out the last frame: a centred clip of n * hop_samples samples then has n frames, not n + 1."""
    window: Window | tuple[float, ...] = "hann"
    """"hann", "hamming" or "blackman" (periodic), the same with "_symmetric", "hann_half_sample" (sampled between the
    points), "povey" (Kaldi's), "rectangular", or window_samples numbers: a list, tuple, array or tensor of one
    dimension, kept as a tuple."""
    preemphasis: float = 0.0
    """The factor p of x[i] - p x[i - 1], 0 to 1."""
    preemphasis_scope: PreemphasisScope = "signal"
    """"signal": before framing, the first sample kept; "frame": in each frame, the first sample times 1 - p."""
    remove_dc: bool = False
    """Subtracts each frame's mean before anything else is done to the frame."""
    log: Log = "ln"
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
    """Added to the value times output_scale."""
    mfcc: int = 0
    """Cepstral coefficients (orthonormal DCT-II over the bands) to give instead of the bands; 0: the bands."""
    normalize: Normalization = "none"
    """"per_feature": each feature less its mean over the clip, divided by its standard deviation (n - 1) plus 1e-5."""

    def __post_init__(self) -> None:
        check_integer("sample_rate_hz", self.sample_rate_hz, 1, 10_000_000)
        check_integer("fft_size", self.fft_size, 2, MAX_FFT_SIZE)
        if self.fft_size % 2:
            raise ValueError(f"fft_size must be even, got {self.fft_size}")
        check_integer("window_samples", self.window_samples, 2, self.fft_size)
        check_integer("hop_samples", self.hop_samples, 1, 1_000_000)
        check_integer("bands", self.bands, 1, MAX_BANDS)
        check_integer("mfcc", self.mfcc, 0, self.bands)
        check_integer("power", self.power, 1, 2)
        check_choice("mel_scale", self.mel_scale, MEL_SCALES)
        check_choice("mel_norm", self.mel_norm, MEL_NORMS)
        check_choice("framing", self.framing, FRAMINGS)
        if self.framing == "exact" and self.hop_samples > self.fft_size:
            raise ValueError(f'hop_samples must be at most fft_size with framing="exact", got {self.hop_samples}')
        check_choice("padding", self.padding, PADDINGS)
        if isinstance(self.window, str):
            check_choice("window", self.window, WINDOWS)
        else:
            object.__setattr__(self, "window", _window_values(self.window, self.window_samples))
        check_choice("preemphasis_scope", self.preemphasis_scope, PREEMPHASIS_SCOPES)
        check_choice("log", self.log, LOGS)
        check_choice("normalize", self.normalize, NORMALIZATIONS)
        for name in ("drop_last_frame", "remove_dc", "relative_to_max"):
            check_bool(name, getattr(self, name))
        self._check_numbers()
        text = ";".join(f"{field.name}={_text_of(getattr(self, field.name))}" for field in fields(self))
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
        """Where the window of frame 0 begins; negative where it reaches into the padding."""
        if self.framing == "snip_edges":
            return 0
        if self.framing == "mid_hop":
            return self.hop_samples // 2 - self.window_samples // 2
        padding = {"left": 0, "center": self.fft_size // 2, "exact": (self.fft_size - self.hop_samples) // 2}
        return (self.fft_size - self.window_samples) // 2 - padding[self.framing]

    @property
    def least_samples(self) -> int:
        """Samples of the shortest clip with a frame (0: of any); each hop_samples more make one frame more."""
        if self.framing == "exact":
            return self.fft_size - 2 * ((self.fft_size - self.hop_samples) // 2)
        lengths = {
            "center": 0,
            "left": self.fft_size,
            "snip_edges": self.window_samples,
            "mid_hop": self.hop_samples - self.hop_samples // 2,
        }
        return lengths[self.framing]

    @property
    def has_cuda_transform(self) -> bool:
        """Whether the CUDA kernel computes transforms of fft_size points."""
        rest = self.fft_size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        return rest == 1 and self.fft_size >= 12

    def num_frames(self, num_samples: int) -> int:
        """Number of frames of a clip of num_samples samples; 0 where the clip is too short for one."""
        if isinstance(num_samples, bool) or not isinstance(num_samples, (int, torch.SymInt)):
            raise TypeError(f"num_samples must be an int, got {type(num_samples).__name__}")
        frames = 1 + (num_samples - self.least_samples) // self.hop_samples
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
                padding="symmetric",  # where framing="mid_hop" takes the place of the above
                drop_last_frame=False,
                window="povey",
                preemphasis=0.97,
                preemphasis_scope="frame",
                remove_dc=True,
                log_offset=0.0,
                log_floor=2.0**-23,  # float32's epsilon
            )
        return cls()


def _window_values(window: Any, window_samples: int) -> tuple[float, ...]:
    """The values of a window as a tuple.

    Raises:
        TypeError, ValueError: window is not window_samples numbers in one dimension.
    """
    names = f"one of {', '.join(map(repr, WINDOWS))} or window_samples numbers"
    numpy = sys.modules.get("numpy")  # not imported here: an array of it can only come from who has imported it
    is_array = isinstance(window, torch.Tensor) or (numpy is not None and isinstance(window, numpy.ndarray))
    if not is_array and not isinstance(window, (list, tuple)):
        raise TypeError(f"window must be {names}, got {type(window).__name__}")
    if is_array and (window.ndim != 1 or (isinstance(window, torch.Tensor) and window.is_meta)):
        raise ValueError(f"window must be {names}, got a {type(window).__name__} of shape {tuple(window.shape)}")
    if len(window) != window_samples:
        raise ValueError(f"window must have window_samples ({window_samples}) numbers, got {len(window)}")
    values = window.tolist() if is_array else window
    for i, value in enumerate(values):
        check_number(f"window[{i}]", value, -MAX_WINDOW_VALUE, MAX_WINDOW_VALUE)
    return tuple(float(value) for value in values)


def _text_of(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _plain_value(text: str) -> Any:
    """None, a truth value, a number or numbers with commas between them; a name, such as "hann", stays a string."""
    if "," in text:
        return tuple(map(_plain_value, text.split(",")))
    words = {"None": None, "True": True, "False": False}
    if text in words:
        return words[text]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
