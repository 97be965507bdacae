"""Finders of faces, the face mesh and OpenCV's cascade, both optional; and the crop of a video by them.

Neither model is part of this package: each comes with the wheel of its own project.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avppc.data.config import TRACKED_CROPS, CropSettings
from avppc.data.manifest import Box
from avppc.data.video.crop import Crop
from avppc.data.video.mesh import MeshFinder
from avppc.data.video.source import DecodeError, Source
from avppc.data.video.track import Alive, FaceFinder, Found, track_mouth

_CROP_CASCADE = 0.94  # side of the crop in sides of the cascade's box
_MOUTH_IN_BOX = (0.5, 0.79)  # of the box's sides: where the mouth lies in what the cascade finds


class CascadeFinder(FaceFinder):
    """OpenCV's Haar cascade "alt2": upright frontal faces; it misses many others, but rarely sees one where none is."""

    def __init__(self) -> None:
        needed = "crop 'cascade' needs OpenCV 4: pip install 'avppc[cascade]'"
        try:
            import cv2
        except ImportError as error:
            raise ImportError(f"{needed} ({error})") from error
        if not hasattr(cv2, "CascadeClassifier"):
            raise ImportError(f"{needed}; version {cv2.__version__}, which is installed, has no cascades any more")
        self._cv2: Any = cv2
        self._faces, self._eyes = (self._load(name) for name in ("frontalface_alt2", "eye_tree_eyeglasses"))
        if self._faces.empty() or self._eyes.empty():
            raise ImportError(f"{needed}; its cascades are missing or damaged in {self._cv2.data.haarcascades}")
        corners = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
        self.reference: NDArray[np.float64] = corners / _CROP_CASCADE
        self._corners = corners

    def _load(self, name: str) -> Any:
        return self._cv2.CascadeClassifier(os.path.join(self._cv2.data.haarcascades, f"haarcascade_{name}.xml"))

    def find(self, rgb: NDArray[np.uint8]) -> Found | None:
        """The largest face with an eye in [H, W, 3], or None."""
        grey = self._cv2.cvtColor(rgb, self._cv2.COLOR_RGB2GRAY)
        least = max(24, min(grey.shape) // 12)
        boxes = self._faces.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=3, minSize=(least, least))
        for left, top, width, height in sorted(np.array(boxes).reshape(-1, 4).tolist(), key=lambda box: -box[2]):
            if not self._has_eye(grey[top : top + height * 6 // 10, left : left + width]):
                continue
            corner, sides = np.array([left, top], np.float64), np.array([width, height], np.float64)
            return Found(corner + self._corners * sides, corner + np.array(_MOUTH_IN_BOX) * sides)
        return None

    def _has_eye(self, grey: NDArray[np.uint8]) -> bool:
        """Lettering and furniture pass for faces, but rarely for faces with eyes."""
        zoom = max(1, round(160 / grey.shape[1]))  # the eyes' cascade wants them at 20 pixels or more
        enlarged = self._cv2.resize(grey, None, fx=zoom, fy=zoom, interpolation=self._cv2.INTER_LINEAR)
        return len(self._eyes.detectMultiScale(enlarged, scaleFactor=1.1, minNeighbors=2)) > 0


def make_finder(name: str) -> FaceFinder:
    """The finder of a crop mode, "mesh" or "cascade"; ImportError that says what to install where it is not there."""
    return MeshFinder() if name == "mesh" else CascadeFinder()


def make_crop(
    settings: CropSettings,
    source: Source,
    finder: FaceFinder | None,
    *,
    box: Box | None = None,
    until_seconds: float | None = None,
    alive: Alive = lambda: None,
) -> Crop:
    """The crop of one video by the settings of `avppc prepare`; to follow a mouth, the video is decoded once for it.

    Args:
        finder: of make_finder(settings.crop), for the crops "mesh" and "cascade".
        box: of the mouth, left, top, right and bottom in pixels, for the crop "box".
        until_seconds: of the video that are looked through; None: all.
        alive: called after each frame that was looked at.

    Raises:
        DecodeError: crop "box" without a box, or a mouth is to be followed and there is no face.
    """
    if settings.crop == "box":
        if box is None:
            name = "<bytes>" if isinstance(source, bytes) else os.fspath(source)
            raise DecodeError(name, "no box: crop 'box' needs one in the manifest")
        left, top, right, bottom = box
        return Crop("box", (top, bottom), (left, right))
    if settings.crop not in TRACKED_CROPS:
        return Crop(settings.crop, settings.crop_rows, settings.crop_columns, settings.centre_fraction)
    assert finder is not None
    return Crop("track", track=track_mouth(source, finder, until_seconds=until_seconds, alive=alive))
