"""One picture to judge a data set by: a row a clip, its frames from left to right."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from avppc.checks import check_integer
from avppc.clip import CLIP_FRAMES, CROP_SIZE, LRW_COLUMNS, LRW_ROWS
from avppc.files import read_bytes, write_atomically

_HEADER_PIXELS = 14


def write_contact_sheet(
    root: Path, path: Path, names: Sequence[str] = (), *, clips: int = 10, frames: int = 15, faces: int = 2
) -> None:
    """Writes a PNG: of clips spread over the data set, whole faces, then mouth crops of frames spread over the clip.

    Args:
        root: folder of the data set.
        path: of the PNG file.
        names: the videos, as paths below root; none: every .mp4 there.
        clips: rows, 1 to 10,000.
        frames: mouth crops a row, 1 to 29.
        faces: whole faces before them, 0 to 29.

    Raises:
        TypeError, ValueError: an argument is no integer or out of range, or there is no .mp4 below root.
    """
    check_integer("clips", clips, 1, 10_000)
    check_integer("frames", frames, 1, CLIP_FRAMES)
    check_integer("faces", faces, 0, CLIP_FRAMES)
    videos = sorted(root / name for name in names) or sorted(root.rglob("*.mp4"))
    if not videos:
        raise ValueError(f"root must hold .mp4 files, found none in {root}")
    chosen = [videos[index] for index in np.linspace(0, len(videos) - 1, min(clips, len(videos))).astype(int)]
    sheet = np.concatenate([_row(video, str(video.relative_to(root)), frames, faces) for video in chosen])
    encoded, data = cv2.imencode(".png", sheet)
    if not encoded:
        raise OSError(f"OpenCV could not encode the picture for {path}")
    write_atomically(path, data.tobytes())


def _row(video: Path, title: str, frames: int, faces: int) -> NDArray[np.uint8]:
    images = _decode(video)  # [T, 256, 256, 3]
    whole = [
        cv2.resize(images[index], (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA)
        for index in np.linspace(0, len(images) - 1, faces + 2).astype(int)[1:-1]
    ]
    rows, columns = slice(*LRW_ROWS), slice(*LRW_COLUMNS)
    mouths = [images[index, rows, columns] for index in np.linspace(0, len(images) - 1, frames).astype(int)]
    strip = np.concatenate([*whole, *mouths], axis=1)
    header = np.zeros((_HEADER_PIXELS, strip.shape[1], 3), np.uint8)
    cv2.putText(header, title, (2, 10), cv2.FONT_HERSHEY_SIMPLEX, 0.35, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([header, strip]).astype(np.uint8)


def _decode(video: Path) -> NDArray[np.uint8]:
    with av.open(io.BytesIO(read_bytes(video)), "r") as container:  # the decoder does not say that a disk fails
        return np.stack([frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]).astype(np.uint8)
