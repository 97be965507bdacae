"""Decodes talking-face video with PyAV into clips of 25 frames and 16,000 samples a second.

What a file cannot give is refused with its reason, never filled in silently: frames that are missing or damaged, sound
that is missing inside a clip or for most of it. What can be converted is converted, and said in the clip's notes.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, cast, get_args

import av
from av.container import InputContainer

from avppc.checks import check_choice, check_integer
from avppc.clip import CLIP_FRAMES
from avppc.data.limits import FILE_MEMORY_BYTES
from avppc.data.sound_file import SOUND_FORMATS, JoinedContainer, missing_of_wave, sound_beside
from avppc.data.video.crop import Crop
from avppc.data.video.mp4_boxes import check_mp4
from avppc.data.video.mp4_boxes_mp4_claims import check_claims
from avppc.data.video.reader import ClipError, DecodedClip, StreamReader

Source = str | os.PathLike[str] | bytes
Backend = Literal["pyav", "torchcodec"]
OnRefused = Callable[[int, str], None]

UNREADABLE = "cannot be read"  # the one reason that another try may mend
_MAX_FRAMES = 100_000  # of a clip
_MAX_STREAMS = 100  # each costs a decoder, though only two are used
SEEK_BEYOND_FRAMES = 100  # below this, decoding from the start is quicker
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,flv,asf,mxf,dv"


class DecodeError(ValueError):
    """A video, or a clip of it, cannot be used; `path` names the file and `reason` says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return DecodeError, (self.path, self.reason)


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


@contextlib.contextmanager
def damage_as_decode_error(source: Source, damage: str = "damaged or not a video") -> Iterator[str]:
    """Whatever goes wrong with a file inside becomes a DecodeError; gives the name the file has in messages."""
    name = "<bytes>" if isinstance(source, bytes) else os.fspath(source)
    try:
        yield name
    except (DecodeError, GeneratorExit):
        raise
    except MemoryError as error:  # FFmpeg's is one, too
        raise DecodeError(name, f"no memory for it: a file may take {FILE_MEMORY_BYTES >> 30} GiB") from error
    except av.FFmpegError as error:
        raise DecodeError(name, f"{damage}: {error.strerror}") from error
    except OSError as error:
        raise DecodeError(name, f"{UNREADABLE}: {error.strerror}") from error
    # A damaged file makes PyAV raise anything, from UnicodeDecodeError to MemoryError: nothing of it may get past here.
    except Exception as error:
        raise DecodeError(name, str(error) or type(error).__name__) from error


def open_options(formats: str) -> dict[str, str]:
    """FFmpeg's options for files of these formats, whose demuxers must read nothing but the file itself: no play lists,
    no image sequences; and they must not make up time stamps."""
    return {
        "format_whitelist": formats,
        "protocol_whitelist": "file",
        "max_streams": str(_MAX_STREAMS),
        "fflags": "-genpts",
    }


def open_media(path: str | os.PathLike[str], formats: str) -> InputContainer:
    """Opens a file of one of these formats; ValueError where it claims more than it can hold."""
    with open(path, "rb") as file:  # the system's own word on permissions; FFmpeg's may also be about what is in it
        check_claims(file)
    # An absolute path is never taken for a protocol such as "concat:".
    return _open(str(Path(path).absolute()), formats)


def _open(file: str | io.BytesIO, formats: str) -> InputContainer:
    try:
        return av.open(file, "r", options=open_options(formats), metadata_errors="replace")
    except av.ArgumentError as error:  # what FFmpeg says of a format that is not on the list
        raise ValueError(f"damaged, or of none of the known formats ({formats})") from error


def open_video(source: Source) -> InputContainer:
    """Opens a file for reading: itself only, no play list, no address; where it has no sound, with that beside it."""
    if isinstance(source, bytes):
        if not source:
            raise ValueError("the file is empty")
        check_claims(io.BytesIO(source))
        return _open(io.BytesIO(source), _FORMATS)
    status = os.stat(source)
    if not stat.S_ISREG(status.st_mode):  # a pipe would block
        raise ValueError("not a regular file")
    if status.st_size == 0:
        raise ValueError("the file is empty")
    container = open_media(source, _FORMATS)
    if container.streams.audio or not container.streams.video or (beside := sound_beside(source)) is None:
        return container
    try:
        return _join(container, beside)
    except BaseException:
        container.close()
        raise


def _join(video: InputContainer, beside: Path) -> InputContainer:
    """The video with the sound of another file; ValueError that names that file where it is of no use."""
    try:
        check_container(beside)
        with open(beside, "rb") as file:
            missing = missing_of_wave(file)
        sound = open_media(beside, SOUND_FORMATS)
    except av.FFmpegError as error:
        raise ValueError(f"no audio stream, and {beside.name} is damaged or no sound: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"no audio stream, and {beside.name} is of no use: {error}") from error
    if missing or not sound.streams.audio:
        sound.close()
        problem = f"is truncated: {missing} bytes are missing" if missing else "has no sound"
        raise ValueError(f"no audio stream, and {beside.name} {problem}")
    return cast(InputContainer, JoinedContainer(video, sound))  # it has all of one that readers use


def check_container(source: Source) -> list[str]:
    """Notes on what of an mp4 file is ignored; ValueError where it claims too much or contradicts itself."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        check_claims(file)
        return check_mp4(file)


def _cut(
    reader: StreamReader, name: str, num_frames: int, stride: int | None, on_refused: OnRefused | None
) -> Iterator[DecodedClip]:
    """Clips out of what the reader has decoded, as soon as it has it."""
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
