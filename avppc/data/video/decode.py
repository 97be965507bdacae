"""Decodes talking-face video with PyAV into clips of 25 frames and 16,000 samples a second.

What a file cannot give is refused with its reason, never filled in silently: frames that are missing or damaged, sound
that is missing inside a clip or for most of it. What can be converted is converted, and said in the clip's notes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

from avppc.checks import check_choice, check_integer
from avppc.clip import CLIP_FRAMES
from avppc.data.video.crop import Crop
from avppc.data.video.reader import ClipError, DecodedClip, StreamReader
from avppc.data.video.source import DecodeError, Source, check_container, damage_as_decode_error, open_video

Backend = Literal["pyav", "torchcodec"]
OnRefused = Callable[[int, str], None]
_MAX_FRAMES = 100_000  # of a clip
SEEK_BEYOND_FRAMES = 100  # below this, decoding from the start is quicker


def decode_clip(
    source: Source,
    *,
    start_frame: int = 0,
    num_frames: int = CLIP_FRAMES,
    crop: Crop | None = None,
    backend: Backend = "pyav",
) -> DecodedClip:
    """One clip of a video, read no further than needed.

    Args:
        source: a file, or the bytes of one.
        start_frame: in frames of 1/25 s from the first frame of the video, at least 0.
        num_frames: length of the clip in frames of 1/25 s, 1 to 100,000.
        crop: which part of each frame is kept, and its size; None: Crop(), LRW's window or the middle square.
        backend: "pyav" reads the luma where the decoder left it; "torchcodec" (an extra) computes it from the colours,
            which may differ by a few units; the sound is the same.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
        ImportError: backend "torchcodec" where it cannot be loaded.
        DecodeError: not a video, damaged, too short, without sound, or of a size the crop does not fit into.
    """
    check_integer("start_frame", start_frame, 0)
    check_integer("num_frames", num_frames, 1, _MAX_FRAMES)
    check_choice("backend", backend, get_args(Backend))
    if backend == "torchcodec":
        from avppc.data.video.torchcodec import decode_clip_torchcodec  # only here: it is an extra

        return decode_clip_torchcodec(source, start_frame, num_frames, crop or Crop())
    if start_frame > SEEK_BEYOND_FRAMES:
        try:
            return next(_clips(source, num_frames, None, crop or Crop(), None, start_frame, seek=True))
        except DecodeError:
            pass  # a container that cannot seek exactly: read it from the start
    return next(_clips(source, num_frames, None, crop or Crop(), None, start_frame))


def decode_clips(
    source: Source,
    *,
    num_frames: int = CLIP_FRAMES,
    stride: int | None = CLIP_FRAMES,
    crop: Crop | None = None,
    on_refused: OnRefused | None = None,
) -> Iterator[DecodedClip]:
    """The clips of a video of any length, in order, in bounded memory; the tail that fills no clip is left out.

    Args:
        source, num_frames, crop: as for decode_clip.
        stride: frames of 1/25 s between the starts of clips; None: only the clip at the start.
        on_refused: called with (start_frame, reason) for a clip with missing frames or sound, then the next one
            follows; without it such a clip raises.

    Raises:
        DecodeError: as for decode_clip. Clips before the damage have been yielded by then.
    """
    if stride is not None:
        check_integer("stride", stride, 1)
    return _clips(source, num_frames, stride, crop or Crop(), on_refused)


def _clips(
    source: Source,
    num_frames: int,
    stride: int | None,
    crop: Crop,
    on_refused: OnRefused | None,
    start_frame: int = 0,
    *,
    seek: bool = False,
) -> Iterator[DecodedClip]:
    check_integer("num_frames", num_frames, 1, _MAX_FRAMES)
    with damage_as_decode_error(source) as name, open_video(source) as container:
        reader = StreamReader(container, crop, start_frame, seek, check_container(source))
        yield from _cut(reader, name, num_frames, stride, on_refused)


def _cut(
    reader: StreamReader, name: str, num_frames: int, stride: int | None, on_refused: OnRefused | None
) -> Iterator[DecodedClip]:
    """Cuts clips out of what the reader decodes, and yields each as soon as it is complete."""
    start, found = reader.first_frame, False
    if stride is None:
        reader.note_length(start + num_frames)
    while reader.fill(start + num_frames):
        found = True
        try:
            clip = reader.clip(start, num_frames)
        except ClipError as error:
            if on_refused is None:
                raise DecodeError(name, str(error)) from error
            on_refused(start, str(error))
        else:
            yield clip
        if stride is None:
            return
        start += stride
        reader.drop_before(start)
    reader.check_declared_end()
    if not found:
        needed = start + num_frames
        raise DecodeError(name, f"too short: {reader.total_frames} frames of 1/25 s, {needed} are needed")
