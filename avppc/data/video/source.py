"""A video as it is given, a path or bytes: opened for reading itself only, and what is wrong with it as DecodeError."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import av
from av.container import InputContainer

from avppc.data.sound_file import SOUND_FORMATS, JoinedContainer, missing_of_wave, sound_beside
from avppc.data.video.mp4_boxes import check_claims, check_mp4
from avppc.files import name_in_errors
from avppc.processes import FILE_MEMORY_BYTES

Source = str | os.PathLike[str] | bytes

UNREADABLE = "cannot be read"  # the one reason that another try may mend
_MAX_STREAMS = 100  # each costs a decoder, though only two are used
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,ogg,flv,asf,mxf,dv"


class DecodeError(ValueError):
    """A video, or a clip of it, cannot be used; `path` names the file and `reason` says why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return DecodeError, (self.path, self.reason)


@contextlib.contextmanager
def damage_as_decode_error(source: Source, damage: str = "damaged or not a video") -> Iterator[str]:
    """Turns any error inside, while the file is read, into a DecodeError; gives the file's name for messages.

    Args:
        damage: what is said of the file where FFmpeg cannot read it.
    """
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
    """FFmpeg's options: only these formats, and no file but this one, as a play list or an image sequence would open;
    and no time stamps that FFmpeg makes up."""
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
    return _open(_MediaFile(Path(path).absolute()), formats)


class _MediaFile:
    """A file that FFmpeg reads through Python: by itself it takes a part that the disk cannot read for damage."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)  # an absolute path is never taken for a protocol such as "concat:"
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:  # with the container, which closes no file that it is given
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, size: int) -> bytes:
        with name_in_errors(Path(self.name)):
            return os.read(self._descriptor, size)

    def seek(self, offset: int, origin: int = os.SEEK_SET) -> int:
        return os.lseek(self._descriptor, offset, origin)

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)


def _open(file: _MediaFile | io.BytesIO, formats: str) -> InputContainer:
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
