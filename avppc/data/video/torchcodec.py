"""Decodes the pictures of clips with torchcodec; sound and clock are PyAV's, so that both give the same cut.

torchcodec gives colours: the luma is computed back from them, in video range, so it differs from the stored one by what
the two roundings lose. It needs FFmpeg's shared libraries and a build for the installed torch.
"""

from __future__ import annotations

import functools
import io
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from avppc.data.video.crop import Crop, Geometry, luma_of
from avppc.data.video.picked import read_sound_and_frames
from avppc.data.video.reader import DecodedClip
from avppc.data.video.source import DecodeError, Source, damage_as_decode_error
from avppc.printing import one_line

_SAME_SECONDS = 1e-3  # time stamps of one picture as two decoders tell them


@functools.cache
def load_torchcodec() -> Any:
    """torchcodec.decoders; ImportError that says what it lacks where it cannot be loaded."""
    try:
        import torchcodec.decoders as decoders
    except (ImportError, OSError, RuntimeError) as error:
        cause = error.__cause__
        detail = one_line(error) + (f" ({cause})" if cause is not None else "")
        raise ImportError(
            "backend 'torchcodec' cannot be loaded: pip install 'avppc[codec]', in a version built for torch "
            f"{torch.__version__} and with FFmpeg's shared libraries where the system finds them; it says: {detail}"
        ) from error
    return decoders


def decode_clip_torchcodec(source: Source, start_frame: int, num_frames: int, crop: Crop) -> DecodedClip:
    """One clip, as decode_clip gives it.

    Raises:
        ImportError: torchcodec cannot be loaded.
        DecodeError: as for decode_clip; also for crops that follow the mouth, and for files whose pictures torchcodec
            cannot place (they have no time stamps, say): PyAV does both.
    """
    decoders = load_torchcodec()
    with damage_as_decode_error(source) as name:
        if crop.track is not None:
            raise DecodeError(name, "torchcodec does not follow mouths: decode it with PyAV")
        parts = read_sound_and_frames(source, start_frame, num_frames, hidden=True)
        readable = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
        video = decoders.VideoDecoder(
            readable, stream_index=parts.stream, num_ffmpeg_threads=1, seek_mode="exact", dimension_order="NHWC"
        )
        try:
            shown = video.get_frames_at(parts.frames.tolist())
        except (RuntimeError, IndexError) as error:  # it cannot go to the start of most transport streams, say
            raise DecodeError(name, f"torchcodec cannot decode it ({one_line(error)}): decode it with PyAV") from error
        if np.abs(shown.pts_seconds.numpy() - parts.seconds).max() > _SAME_SECONDS:
            raise DecodeError(name, "torchcodec counts its pictures otherwise: decode it with PyAV")
        turned = round((getattr(video.metadata, "rotation", None) or 0) / 90)  # quarters, by torchcodec itself
        images = [_cropped(np.rot90(colours, -turned), parts.geometry, crop) for colours in shown.data.numpy()]
    return DecodedClip(torch.from_numpy(np.stack(images)), torch.from_numpy(parts.audio), start_frame, parts.notes)


def _cropped(
    colours: NDArray[np.uint8],  # [H, W, 3], as stored
    geometry: Geometry,
    crop: Crop,
) -> NDArray[np.uint8]:  # [size, size] luma
    box = crop.box(*geometry.shown_size(*colours.shape[:2]))
    if geometry.aspect == 1:  # the crop first: it is less to convert
        return crop.resize(_luma(geometry.turn(colours)[box]))
    return crop.resize(geometry.show(_luma(colours))[box])


def _luma(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(luma_of(torch.from_numpy(np.ascontiguousarray(colours))).numpy())
