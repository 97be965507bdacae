"""How a picture is to be shown: turned, mirrored, and with pixels that are not square, as the file says."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import torch
from av import VideoFrame
from numpy.typing import NDArray
from torch.nn.functional import interpolate

MAX_SIDE_PIXELS = 8192
SHOWN_OTHERWISE = ("pixel shape", "mirror image", "rotation")
"""Kinds of notes on pictures that are not shown as they are stored."""
_MAX_SLANT = 0.02  # of a matrix's axes; about 1 degree
_MAX_ASPECT_ERROR = 0.01  # pixels this close to square are taken as they are: nobody sees the difference

# By whether it is mirrored before, then by transpose and flip_rows: anticlockwise.
_DEGREES = (
    {(False, False): 0, (False, True): 180, (True, True): 90, (True, False): -90},
    {(False, False): 0, (False, True): 180, (True, True): -90, (True, False): 90},
)

Pixel = TypeVar("Pixel", bound=np.generic)


@dataclass(frozen=True)
class Geometry:
    """What to do with each picture of a video before it is cropped, in this order: scale, transpose, mirror."""

    aspect: Fraction = Fraction(1)
    """Width of a stored pixel divided by its height; 1 where it is as good as square."""
    transpose: bool = False
    """Rows become columns."""
    flip_rows: bool = False
    """After that: upside down."""
    flip_columns: bool = False
    """After that: left and right change places."""

    @property
    def is_plain(self) -> bool:
        """Whether pictures are shown as they are stored."""
        return self == Geometry()

    @property
    def notes(self) -> list[str]:
        """What is done, as "kind: details"."""
        notes = []
        if self.aspect != 1:
            notes.append(f"pixel shape: {self.aspect.numerator}:{self.aspect.denominator}, scaled to square pixels")
        mirrored = self.transpose ^ self.flip_rows ^ self.flip_columns
        degrees = _DEGREES[mirrored][self.transpose, self.flip_rows]
        if mirrored:
            turned = f", then turned by {degrees} degrees" if degrees else ""
            notes.append(f"mirror image: left and right change places{turned} as the file asks")
        elif degrees:
            notes.append(f"rotation: turned by {degrees} degrees as the file asks")
        return notes

    def square_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, in pixels, of a stored picture scaled to square pixels; ValueError where too large."""
        width = max(1, round(width * self.aspect))
        if width > MAX_SIDE_PIXELS:
            raise ValueError(
                f"pixels of shape {self.aspect.numerator}:{self.aspect.denominator} make frames of {width} x {height}, "
                f"at most {MAX_SIDE_PIXELS} pixels a side are allowed"
            )
        return height, width

    def shown_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, in square pixels, as shown."""
        height, width = self.square_size(height, width)
        return (width, height) if self.transpose else (height, width)

    def turn(
        self,
        image: NDArray[Pixel],  # [H, W, ...] in square pixels
    ) -> NDArray[Pixel]:  # a view
        """The picture transposed and mirrored."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        if self.flip_rows:
            image = image[::-1]
        return image[:, ::-1] if self.flip_columns else image

    def show(
        self,
        image: NDArray[np.uint8],  # [H, W], as stored
    ) -> NDArray[np.uint8]:  # [shown height, shown width]
        """The picture as it is to be shown; a view where it need not be scaled."""
        size = self.square_size(*image.shape)
        return self.turn(image if size == image.shape else scale(image, size))


def geometry_of(frame: VideoFrame, aspect: Fraction | None) -> Geometry:
    """How a decoded picture is to be shown.

    Args:
        aspect: of a stored pixel, as the stream has it; None or 0: unknown, that is square.

    Raises:
        ValueError: turned by an angle that is no quarter turn, or slanted.
    """
    if aspect is None or aspect <= 0 or abs(aspect - 1) < _MAX_ASPECT_ERROR:
        aspect = Fraction(1)
    side_data: Any = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return Geometry(aspect)
    values = np.frombuffer(side_data, np.int32, 9).reshape(3, 3)
    return Geometry(aspect, *_quarter_turn(values[:2, :2].astype(np.float64) / 65536))


def _quarter_turn(
    matrix: NDArray[np.float64],  # [2, 2] rows: where the picture's axes to the right and down point, x and y
) -> tuple[bool, bool, bool]:
    """Whether to transpose, then to flip rows, then to flip columns. A matrix that leaves nothing of the picture is
    ignored, as players do; its scale is, too: FFmpeg makes it part of the pixels' aspect ratio."""
    lengths = np.hypot(matrix[:, 0], matrix[:, 1])
    if not lengths.all():
        return False, False, False
    axes = matrix / lengths[:, None]
    nearest = np.rint(axes).astype(int)
    if np.abs(axes - nearest).max() > _MAX_SLANT or abs(round(float(np.linalg.det(nearest)))) != 1:
        degrees = float(np.degrees(np.arctan2(-matrix[0, 1], matrix[0, 0])))
        raise ValueError(
            f"the video is to be shown turned by {degrees:.1f} degrees or slanted (matrix {matrix.tolist()}); only "
            "quarter turns and mirror images are possible"
        )
    transpose = nearest[0, 0] == 0
    (right_x, right_y), (down_x, down_y) = nearest.tolist()
    return (True, right_y < 0, down_x < 0) if transpose else (False, down_y < 0, right_x < 0)


def scale(
    image: NDArray[np.uint8],  # [h, w]
    size: tuple[int, int],
) -> NDArray[np.uint8]:
    """The image at another size (height, width): bilinear, each pixel an average of all it covers."""
    tensor = torch.from_numpy(np.ascontiguousarray(image))[None, None]
    return np.asarray(interpolate(tensor, size=size, mode="bilinear", antialias=True)[0, 0].numpy())
