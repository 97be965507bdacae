"""The mouth crop: which part of a video frame is stored, as 8-bit luma, and how the picture is shown.

The luma plane is read where the decoder left it; colour is never computed. Values follow the usual video range (16
black, 235 white), whatever the file uses, so that clips of different sources have the same contrast. A picture is
turned, mirrored and its pixels are made square as the file says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from av import VideoFrame
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from avppc.checks import check_choice, check_integer, check_number
from avppc.clip import CROP_SIZE, LRW_COLUMNS, LRW_ROWS, LUMA_BLACK

LRW_SIZE = 256  # pixels a side, frames of LRW
_LUMA_WEIGHTS = (65.481 / 255, 128.553 / 255, 24.966 / 255)  # ITU-R BT.601, of red, green and blue

# Formats whose first plane is the luma alone, one value after another, in the low bits.
_LUMA_FIRST = re.compile(r"(?:yuva?j?4\d\dp|nv\d\d|gray)(?:(\d+)le)?")
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG
_TO_VIDEO_RANGE = np.rint(16 + np.arange(256) * (219 / 255)).astype(np.uint8)

NO_FACE: NDArray[np.uint8] = np.zeros((0, 0), np.uint8)
"""Stands for the crop of a frame in which no face was found."""

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


class Track(Protocol):
    """Where the mouth is, frame by frame."""

    def warp(self, luma: NDArray[Any], stamp: int, size: int) -> NDArray[np.uint8] | None:
        """The crop [size, size] of the frame with this time stamp; None where no face was found."""


@dataclass(frozen=True)
class Crop:
    """Which part of the frame is kept; scaled to size x size where it is not of that size."""

    mode: str = "auto"
    """"window": the rows and columns below; "box": the smallest square around these, within the frame; "centre": the
    middle square; "auto": the window for 256 x 256 video (LRW's frame), the middle square for all other; "track": what
    the track says."""
    rows: tuple[int, int] = LRW_ROWS
    """First row and the one after the last, in square pixels of the picture as it is shown."""
    columns: tuple[int, int] = LRW_COLUMNS
    """First column and the one after the last, in square pixels of the picture as it is shown."""
    centre_fraction: float = 1.0
    """Side of the middle square as a part of the frame's shorter side, above 0 to 1."""
    size: int = CROP_SIZE
    """Side of what is stored, pixels."""
    track: Track | None = None
    """For mode "track"."""

    def __post_init__(self) -> None:
        check_choice("crop mode", self.mode, ("auto", "window", "box", "centre", "track"))
        if (self.mode == "track") != (self.track is not None):
            raise ValueError(f"a track is for crop mode 'track' and needed there, mode is {self.mode!r}")
        for name, (first, last) in (("rows", self.rows), ("columns", self.columns)):
            check_integer(f"crop {name} start", first, 0)
            check_integer(f"crop {name} end", last, first + 1)
        check_number("centre_fraction", self.centre_fraction, 0.01, 1.0)
        check_integer("crop size", self.size, 8, 4096)

    def box(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns kept of a frame; ValueError where the window does not fit into it."""
        if self.mode == "track":
            return slice(0, height), slice(0, width)
        if self.mode == "box":
            return self._square(height, width)
        if self.mode == "window" or (self.mode == "auto" and height == width == LRW_SIZE):
            if self.rows[1] > height or self.columns[1] > width:
                raise ValueError(
                    f"the window of rows {self.rows[0]}:{self.rows[1]}, columns {self.columns[0]}:{self.columns[1]} "
                    f"does not fit into a frame of {height} x {width}"
                )
            return slice(*self.rows), slice(*self.columns)
        side = max(1, round(min(height, width) * self.centre_fraction))
        top, left = (height - side) // 2, (width - side) // 2
        return slice(top, top + side), slice(left, left + side)

    def _square(self, height: int, width: int) -> tuple[slice, slice]:
        """The smallest square around rows and columns, moved into the frame where it would stick out."""
        side = max(self.rows[1] - self.rows[0], self.columns[1] - self.columns[0])
        if self.rows[1] > height or self.columns[1] > width or side > min(height, width):
            raise ValueError(
                f"the box of rows {self.rows[0]}:{self.rows[1]}, columns {self.columns[0]}:{self.columns[1]}, made "
                f"square, does not fit into a frame of {height} x {width}"
            )
        top, left = (
            min(max((first + last - side) // 2, 0), length - side)
            for (first, last), length in ((self.rows, height), (self.columns, width))
        )
        return slice(top, top + side), slice(left, left + side)

    def resize(
        self,
        image: NDArray[np.uint8],  # [h, w]
    ) -> NDArray[np.uint8]:  # [size, size]
        """A copy of the image at the stored size: bilinear, each pixel an average of all it covers."""
        if image.shape == (self.size, self.size):
            return image.copy()
        return scale(image, (self.size, self.size))


class LumaReader:
    """Crops frame after frame of one video; remembers what had to be converted.

    Raises:
        ValueError: the window does not fit, or a frame differs in size or format from the first.
    """

    def __init__(self, crop: Crop, aspect: Fraction | None = None) -> None:
        """
        Args:
            aspect: width of a stored pixel divided by its height; None: square.
        """
        self.crop = crop
        self._aspect = aspect
        self._geometry = Geometry()
        self.notes: list[str] = []
        self._kind: tuple[int, int, str] | None = None
        self._box = (slice(0), slice(0))
        self._direct = False
        self._shift = 0  # bits of luma beyond 8
        self._dtype: np.dtype[Any] = np.dtype(np.uint8)
        self._full_range = False

    def read(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """The crop of a frame, [size, size] uint8; NO_FACE where the track has none."""
        kind = (frame.height, frame.width, frame.format.name)
        if kind != self._kind:
            if self._kind is not None:
                raise ValueError(f"frames change from {_describe(self._kind)} to {_describe(kind)} within the video")
            self._begin(frame, *kind)
            self._kind = kind
        if not self._direct:
            frame = frame.reformat(format="yuv420p", dst_color_range="MPEG")
        plane = frame.planes[0]
        luma: NDArray[Any] = np.frombuffer(memoryview(plane), self._dtype)
        luma = luma.reshape(-1, plane.line_size // self._dtype.itemsize)
        luma = luma[: kind[0], : kind[1]]
        if self._geometry.aspect == 1:  # the crop first: it is less to convert
            luma = self._geometry.turn(luma)[self._box]
        if self._shift:
            luma = (luma >> self._shift).astype(np.uint8)
        if self._full_range:
            luma = _TO_VIDEO_RANGE[luma]
        if self._geometry.aspect != 1:
            luma = self._geometry.show(luma)[self._box]
        if self.crop.track is not None:
            assert frame.pts is not None
            warped = self.crop.track.warp(luma, frame.pts, self.crop.size)
            return NO_FACE if warped is None else warped
        return self.crop.resize(luma)

    def _begin(self, frame: VideoFrame, height: int, width: int, name: str) -> None:
        match = _LUMA_FIRST.fullmatch(name)
        self._direct = match is not None
        if match is None:
            self.notes.append(f"pixel format {name}: converted by swscale")
        else:
            bits = int(match[1] or 8)
            self._shift = bits - 8
            if self._shift:
                self._dtype = np.dtype("<u2")
                self.notes.append(f"{bits}-bit luma: the upper 8 bits are kept")
            self._full_range = "yuvj" in name or int(frame.color_range) == _FULL_RANGE
            if self._full_range:
                self.notes.append("full-range luma: scaled to video range")
        self._geometry = geometry_of(frame, self._aspect)
        self.notes += self._geometry.notes
        self._box = self.crop.box(*self._geometry.shown_size(height, width))


def _describe(kind: tuple[int, int, str]) -> str:
    return f"{kind[1]} x {kind[0]} {kind[2]}"


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


def luma_of(
    colours: Tensor,  # [..., 3] uint8 red, green, blue
) -> Tensor:  # [...] uint8
    """The luma of colours, in video range: 16 black to 235 white."""
    weights = torch.tensor(_LUMA_WEIGHTS, device=colours.device)
    return (colours.to(torch.float32) @ weights + LUMA_BLACK).round_().clamp_(0, 255).to(torch.uint8)


def scale(
    image: NDArray[np.uint8],  # [h, w]
    size: tuple[int, int],
) -> NDArray[np.uint8]:
    """The image at another size (height, width): bilinear, each pixel an average of all it covers."""
    tensor = torch.from_numpy(np.ascontiguousarray(image))[None, None]
    return np.asarray(interpolate(tensor, size=size, mode="bilinear", antialias=True)[0, 0].numpy())
