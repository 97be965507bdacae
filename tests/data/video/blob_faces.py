"""Faces for tests: a bright square with a dark bar for a mouth, and a finder that knows where to look."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from make_videos import write_video

from avppc.data.prepare.worker import DecodeJob
from avppc.data.video.track import FaceFinder, Found

SIDE = 40.0  # of the square face, pixels at zoom 1
REFERENCE = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])  # the crop is the face


def paint_face(image: np.ndarray, x: float, y: float, degrees: float = 0.0, zoom: float = 1.0) -> None:
    """Paints a face of luma 200 with a mouth of 60 in its lower half, centred on (x, y)."""
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    angle = np.radians(degrees)
    across = ((columns - x) * np.cos(angle) + (rows - y) * np.sin(angle)) / (SIDE * zoom)
    down = (-(columns - x) * np.sin(angle) + (rows - y) * np.cos(angle)) / (SIDE * zoom)
    image[(abs(across) < 0.5) & (abs(down) < 0.5)] = 200
    image[(abs(across) < 0.25) & (abs(down - 0.25) < 0.08)] = 60


class BlobFinder(FaceFinder):
    """Finds the face by its brightness, if it fills at least `least` of the picture's width."""

    reference = REFERENCE

    def __init__(self, least: float = 0.0) -> None:
        self.least = least
        self.calls = 0

    def find(self, rgb: np.ndarray) -> Found | None:
        self.calls += 1
        rows, columns = np.nonzero(rgb[..., 1] > 150)
        if len(rows) < 50:
            return None
        # Two corners that lie across from each other tell a square that may be turned.
        points = np.stack([columns, rows], -1).astype(float)
        centre = (points.min(0) + points.max(0)) / 2
        mouth_rows, mouth_columns = np.nonzero((rgb[..., 1] < 75) & (rgb[..., 1] > 45))
        down = np.array([mouth_columns.mean(), mouth_rows.mean()]) - centre
        side = np.hypot(*down) * 4
        if side < self.least * rgb.shape[1]:
            return None
        down *= side / np.hypot(*down)
        turned = np.stack([np.array([down[1], -down[0]]), down])
        return Found(centre + REFERENCE @ turned, centre)


class BlobJob(DecodeJob):
    """prepare with the finder above."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self._finder = BlobFinder()


def write_face_video(path: Path, places: list[tuple | None], **options) -> Path:
    """A video whose frame n shows a face at places[n] = (x, y, degrees, zoom), or none."""

    def picture(number: int, height: int, width: int, seed: int = 0) -> np.ndarray:
        image = np.full((height, width), 20, np.uint8)
        if places[number] is not None:
            paint_face(image, *places[number])
        return image

    settings = {"size": (120, 160), "options": {"qp": "0", "preset": "ultrafast"}} | options
    return write_video(path, frames=len(places), pattern=picture, **settings)
