"""Settings of the augmentation; every draw is made anew for each clip and each element."""

from __future__ import annotations

from dataclasses import dataclass

from avppc.checks import check_integer, check_number, check_types


@dataclass(frozen=True)
class AugmentConfig:
    """How the training clips are varied; past and future of a clip never share a draw."""

    shift_pixels: int = 6
    """Largest shift of the crop's centre, in pixels of the stored crop."""
    flip_probability: float = 0.5
    """Probability of mirroring left and right."""
    gamma_range: float = 0.0
    """Exponents of the luma are drawn from 1/(1+x) to 1+x; 0 leaves it as it is."""
    contrast_range: float = 0.0
    """Contrast factors are drawn from 1-x to 1+x."""
    brightness_range: float = 0.0
    """Luma offsets are drawn from -x to x, on the scale of 0 to 1."""
    pixel_noise: float = 0.0
    """Largest standard deviation of the noise added to the luma, on the scale of 0 to 1."""
    time_jitter_frames: int = 2
    """An element is cut this many frames shorter, from a start drawn at random; sound follows the picture."""
    time_mask_frames: int = 0
    """Up to this many consecutive frames are replaced by the element's mean frame."""
    mel_shift_frames: int = 2
    """Largest circular shift of the log-mel features, in mel frames of 10 ms."""
    mel_noise_floor: bool = True
    """Adds a noise floor with a tilt to the log-mel features, at a level from 8 to 1 (in ln) below their mean."""
    mel_mask_bands: int = 4
    """Up to this many neighbouring mel bands are replaced by the mean."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("shift_pixels", self.shift_pixels, 0)
        check_number("flip_probability", self.flip_probability, 0, 1)
        check_number("gamma_range", self.gamma_range, 0)
        check_number("contrast_range", self.contrast_range, 0, 1)
        check_number("brightness_range", self.brightness_range, 0, 1)
        check_number("pixel_noise", self.pixel_noise, 0, 1)
        check_integer("time_jitter_frames", self.time_jitter_frames, 0)
        check_integer("time_mask_frames", self.time_mask_frames, 0)
        check_integer("mel_shift_frames", self.mel_shift_frames, 0)
        check_integer("mel_mask_bands", self.mel_mask_bands, 0)
