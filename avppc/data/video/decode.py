"""Decodes talking-face video with PyAV into clips of 25 frames and 16,000 samples a second.

What a file cannot give is refused with its reason, never filled in silently: frames that are missing or damaged, sound
that is missing inside a clip or for most of it. What can be converted is converted, and said in the clip's notes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

from avppc.checks import check_choice, check_integer, check_number, check_path
from avppc.clip import CLIP_FRAMES, VIDEO_FPS, Clip
from avppc.data.video.crop import Crop
from avppc.data.video.reader import ClipError, DecodedClip, StreamReader
from avppc.data.video.source import DecodeError, Source, check_container, damage_as_decode_error, open_video

Backend = Literal["pyav", "torchcodec"]
Others = Literal["none", "rest", "all"]
OnRefused = Callable[[int, str], None]
TOO_SHORT = "too short"  # begins the reason of a video that ends before its clip
_MAX_FRAMES = 100_000  # of a clip
_FRAMES_AT_ONCE = 250  # decoded on the way to a clip far away
SEEK_BEYOND_FRAMES = 100  # below this, decoding from the start is quicker


def decode_clip(
    source: Source,
    *,
    start_frame: int = 0,
    num_frames: int = CLIP_FRAMES,
    crop: Crop | None = None,
    backend: Backend = "pyav",
    may_seek: bool = True,
) -> DecodedClip:
    """One clip of a video, read no further than needed.

    Args:
        source: a file, or the bytes of one.
        start_frame: in frames of 1/25 s from the first frame of the video, at least 0.
        num_frames: length of the clip in frames of 1/25 s, 1 to 100,000.
        crop: which part of each frame is kept, and its size; None: Crop(), LRW's window or the middle square.
        backend: "pyav" reads the luma where the decoder left it; "torchcodec" (an extra) computes it from the colours,
            which may differ by a few units; the sound is the same.
        may_seek: whether a clip far from the start may be looked up instead of decoding all before it. Its sound may
            then differ by a unit from what decode_clips gives, and where a file's index is wrong its pictures, too.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
        ImportError: backend "torchcodec" where it cannot be loaded.
        DecodeError: not a video, damaged, too short, without sound, or of a size the crop does not fit into.
    """
    check_integer("start_frame", start_frame, 0)
    check_integer("num_frames", num_frames, 1, _MAX_FRAMES)
    check_choice("backend", backend, get_args(Backend))
    if backend == "torchcodec":
        from avppc.data.video.picked import decode_clip_torchcodec  # only here: it is an extra

        return decode_clip_torchcodec(source, start_frame, num_frames, crop or Crop())
    if may_seek and start_frame > SEEK_BEYOND_FRAMES:
        try:
            return next(_clips(source, num_frames, None, crop or Crop(), None, start_frame, seek=True))
        except DecodeError:
            pass  # a container that cannot seek exactly: read it from the start
    return next(_clips(source, num_frames, None, crop or Crop(), None, start_frame))


def load_clip(
    path: str | os.PathLike[str],
    *,
    start_seconds: float = 0.0,
    num_frames: int = CLIP_FRAMES,
    crop: Crop | None = None,
) -> Clip:
    """One clip of a video as a Clip: picture and sound, as `avppc prepare` cuts them.

    The features of its frames are encoder(crop_video(clip.video[None], crop_pixels, input_pixels)).

    Args:
        path: a file.
        start_seconds: where the clip starts in the video, at least 0; rounded to a frame of 1/25 s.
        num_frames: its length in frames of 1/25 s.
        crop: as for decode_clip: which part of each frame is kept, the middle square unless the video is of LRW's size.

    Raises:
        DecodeError, TypeError, ValueError: as for decode_clip.
    """
    check_path("path", path)
    check_number("start_seconds", start_seconds, 0)
    start = round(start_seconds * VIDEO_FPS)
    decoded = decode_clip(Path(path), start_frame=start, num_frames=num_frames, crop=crop)
    return Clip(decoded.video, decoded.audio)


def decode_clips(
    source: Source,
    *,
    num_frames: int = CLIP_FRAMES,
    stride: int | None = CLIP_FRAMES,
    crop: Crop | None = None,
    on_refused: OnRefused | None = None,
    needs_sound: bool = True,
    backend: Backend = "pyav",
) -> Iterator[DecodedClip]:
    """The clips of a video of any length, in order, in bounded memory; the tail that fills no clip is left out.

    Args:
        source, num_frames, crop, backend: as for decode_clip; all but "pyav" open the file anew for each clip.
        stride: frames of 1/25 s between the starts of clips; None: only the clip at the start.
        on_refused: called with (start_frame, reason) for a clip with missing frames or sound, then the next one
            follows; without it such a clip raises.
        needs_sound: False: a video without sound, or with missing sound, gives clips with silence.

    Raises:
        DecodeError: as for decode_clip. Clips before the damage have been yielded by then.
    """
    if stride is not None:
        check_integer("stride", stride, 1)
    check_choice("backend", backend, get_args(Backend))
    if backend != "pyav":
        return _one_by_one(source, num_frames, stride, crop or Crop(), on_refused, backend)
    return _clips(source, num_frames, stride, crop or Crop(), on_refused, needs_sound=needs_sound)


def _one_by_one(
    source: Source, num_frames: int, stride: int | None, crop: Crop, on_refused: OnRefused | None, backend: Backend
) -> Iterator[DecodedClip]:
    """As decode_clips, each clip by decode_clip."""
    start = 0
    while True:
        try:
            yield decode_clip(source, start_frame=start, num_frames=num_frames, crop=crop, backend=backend)
        except DecodeError as error:
            if start and error.reason.startswith(TOO_SHORT):
                return
            if on_refused is None or not isinstance(error.__cause__, ClipError):
                raise
            on_refused(start, error.reason)
        if stride is None:
            return
        start += stride


def decode_clips_at(
    source: Source,
    starts: Sequence[int],
    *,
    num_frames: int = CLIP_FRAMES,
    others: Others = "none",
    stride: int = CLIP_FRAMES,
    crop: Crop | None = None,
    on_refused: OnRefused | None = None,
    alive: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int | None, DecodedClip]]:
    """Clips at given places of a video, decoded once for all of them, in order and in bounded memory.

    A clip that would go on after the video's end begins earlier, so that it ends there.

    Args:
        source, num_frames, crop: as for decode_clip.
        starts: frames of 1/25 s from the video's first, at least 0 and growing (equal ones may follow each other).
        others: further clips, `stride` frames apart: "all": from the video's start on; "rest": where none of the given
            clips lies; "none": none, and what comes after the last given clip is not read.
        stride: as for decode_clips; 0: of the other clips only the first.
        on_refused: as for decode_clips; a start is then the one that was asked for.
        alive: called now and then while no clip comes.

    Yields:
        Which of the starts it is, None for other clips; and the clip.

    Raises:
        DecodeError: as for decode_clip; too short for a single clip. Clips before the damage have been yielded by then.
    """
    check_integer("num_frames", num_frames, 1, _MAX_FRAMES)
    check_integer("stride", stride, 0)
    check_choice("others", others, get_args(Others))
    for before, start in pairwise((0, *starts)):
        check_integer("starts", start, before)
    with damage_as_decode_error(source) as name, open_video(source) as container:
        reader = StreamReader(container, crop or Crop(), 0, False, check_container(source))
        yield from _Cutter(reader, name, num_frames, on_refused, alive).cut_at(starts, others, stride)


class _Cutter:
    """Cuts clips at growing places out of what a reader decodes."""

    def __init__(
        self,
        reader: StreamReader,
        name: str,
        num_frames: int,
        on_refused: OnRefused | None,
        alive: Callable[[], None],
    ) -> None:
        self._reader = reader
        self._name = name
        self._num_frames = num_frames
        self._on_refused = on_refused
        self._alive = alive

    def cut_at(self, starts: Sequence[int], others: Others, stride: int) -> Iterator[tuple[int | None, DecodedClip]]:
        """As decode_clips_at."""
        count = self._num_frames
        place, more = 0, others != "none"  # where the next of the other clips begins, if there is one
        for number, start in enumerate(starts):
            while more and place + (0 if others == "all" else count) <= start and self._reach(place):
                yield from self._clip(place, None)
                place, more = place + stride, stride > 0
            self._reach(start)
            end = self._reader.end_frame
            if end < count:
                raise DecodeError(self._name, f"{TOO_SHORT}: {end} frames of 1/25 s, {count} are needed")
            yield from self._clip(min(start, end - count), number)
            if others == "rest":
                place = max(place, start + count)
        while more and self._reach(place):
            yield from self._clip(place, None)
            place, more = place + stride, stride > 0

    def _clip(self, start: int, number: int | None) -> Iterator[tuple[int | None, DecodedClip]]:
        """The clip at a frame, unless it is refused."""
        try:
            yield number, self._reader.clip(start, self._num_frames)
        except ClipError as error:
            if self._on_refused is None:
                raise DecodeError(self._name, str(error)) from error
            self._on_refused(start, str(error))

    def _reach(self, start: int) -> bool:
        """Decodes a clip's frames from `start` on, and forgets those before; False where the video ends earlier.

        So many frames as a clip has are kept in any case, should they turn out to be the last ones.
        """
        reader, count = self._reader, self._num_frames
        while True:
            target = min(start + count, reader.end_frame + _FRAMES_AT_ONCE)
            there = reader.fill(target)
            reader.drop_before(min(start, max(0, reader.end_frame - count)))
            if not there:
                reader.check_declared_end()
            if not there or target == start + count:
                return there
            self._alive()


def _clips(
    source: Source,
    num_frames: int,
    stride: int | None,
    crop: Crop,
    on_refused: OnRefused | None,
    start_frame: int = 0,
    *,
    seek: bool = False,
    needs_sound: bool = True,
) -> Iterator[DecodedClip]:
    check_integer("num_frames", num_frames, 1, _MAX_FRAMES)
    with damage_as_decode_error(source) as name, open_video(source) as container:
        notes = check_container(source)
        reader = StreamReader(container, crop, start_frame, seek, notes, needs_sound=needs_sound)
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
        raise DecodeError(name, f"{TOO_SHORT}: {reader.total_frames} frames of 1/25 s, {needed} are needed")
