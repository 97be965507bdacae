"""Decodes the sound of a file with PyAV: 16 kHz, mono, int16, whatever the file holds."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from avppc.data.clock import AudioTimeline
from avppc.data.decode import DecodeError, damage_as_decode_error, open_options

_STREAMED = 0x7FFF_0000  # a program that writes into a pipe leaves a size from here on
_FORMATS = "wav,w64,flac,mp3,aac,ogg,aiff,au,caf,mov,mp4,m4a,3gp,matroska,webm,avi,mpeg,mpegts,flv,asf"


def read_sound(path: str | os.PathLike[str]) -> NDArray[np.int16]:  # [S]
    """The samples of the file's first audio stream from its first one on, at 16 kHz; channels are mixed.

    Samples stand where their time stamps say; a hole between them is silence.

    Raises:
        DecodeError: not a sound or video file, damaged, or without sound.
    """
    with damage_as_decode_error(path, "damaged, or neither sound nor video") as name:
        with open(path, "rb") as file:  # the system's own word on what is missing or not allowed
            missing = _missing_of_wave(file.read(12), os.fstat(file.fileno()).st_size)
        samples = _decode(name)
        if missing > 1:  # one byte of padding may be left out
            raise DecodeError(name, f"truncated: {missing} bytes are missing")
        return samples


def _missing_of_wave(start: bytes, size: int) -> int:
    """How many bytes a WAVE file lacks of what its header says; 0 where it says nothing, as that of a stream does."""
    if len(start) < 12 or start[:4] != b"RIFF" or start[8:] != b"WAVE":
        return 0
    said = int.from_bytes(start[4:8], "little")
    return max(0, said + 8 - size) if said < _STREAMED else 0


def _decode(name: str) -> NDArray[np.int16]:
    timeline = None
    with av.open(
        str(Path(name).absolute()), "r", options=open_options(_FORMATS), metadata_errors="replace"
    ) as container:
        if not container.streams.audio:
            raise DecodeError(name, "has no sound")
        for frame in container.decode(audio=0):
            if timeline is None:
                if frame.pts is None or frame.time_base is None:
                    raise DecodeError(name, "the audio has frames without time stamps")
                timeline = AudioTimeline(frame.pts * frame.time_base)
            timeline.push(frame)
    if timeline is None:
        raise DecodeError(name, "its audio stream is empty")
    timeline.finish()
    return timeline.take(0, timeline.end)[0]
