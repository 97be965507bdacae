"""Decodes the sound of a file with PyAV: 16 kHz, mono, int16, whatever the file holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from numpy.typing import NDArray

from avppc.data.clock import AudioTimeline
from avppc.data.decode import DecodeError, damage_as_decode_error, open_options
from avppc.data.reader import decode_packet

_STREAMED = 0x7FFF_0000  # a program that writes into a pipe leaves a size from here on
_MAX_CHUNKS = 1000  # of a WAVE file before its samples
_FORMATS = (
    "wav,w64,flac,mp3,aac,ac3,eac3,amr,ape,dts,tta,wv,voc,nistsphere,ogg,aiff,au,caf,mov,mp4,m4a,3gp,matroska,webm,avi,"
    "mpeg,mpegts,flv,asf,mxf,dv"
)


def read_sound(path: str | os.PathLike[str]) -> NDArray[np.int16]:  # [S]
    """The samples of the file's first audio stream from its first one on, at 16 kHz; channels are mixed.

    Samples stand where their time stamps say; a hole between them is silence.

    Raises:
        DecodeError: not a sound or video file, damaged, or without sound.
    """
    with damage_as_decode_error(path, f"damaged, or neither sound nor video of a known format ({_FORMATS})") as name:
        with open(path, "rb") as file:  # the system's own word on what is missing or not allowed
            missing = _missing_of_wave(file, os.fstat(file.fileno()).st_size)
        samples = _decode(name)
        if missing > 0:
            raise DecodeError(name, f"truncated: {missing} bytes are missing")
        return samples


def _missing_of_wave(file: BinaryIO, size: int) -> int:
    """How many bytes of its samples a WAVE file lacks; 0 where its header does not tell, as that of a stream, and for
    other files.

    The chunk of the samples is asked: recorders in browsers write a wrong length of the whole.
    """
    start = file.read(12)
    if start[:4] not in (b"RIFF", b"RF64", b"BW64") or start[8:] != b"WAVE":
        return 0
    long_size = None  # of the samples, where 32 bits do not hold it
    for _ in range(_MAX_CHUNKS):
        header = file.read(8)
        if len(header) < 8:
            break
        name, length = header[:4], int.from_bytes(header[4:], "little")
        begin = file.tell()
        if name == b"data":
            if length >= _STREAMED:
                length = long_size or 0
            return max(0, begin + length - size)
        if name == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        file.seek(begin + length + length % 2)
    return 0


def _decode(name: str) -> NDArray[np.int16]:
    timeline = None
    with av.open(
        str(Path(name).absolute()), "r", options=open_options(_FORMATS), metadata_errors="replace"
    ) as container:
        if not container.streams.audio:
            raise DecodeError(name, "has no sound")
        for packet in container.demux(container.streams.audio[0]):
            for frame in decode_packet(packet):
                assert isinstance(frame, av.AudioFrame)
                if timeline is None:
                    if frame.pts is None or frame.time_base is None:
                        raise DecodeError(name, "the audio has frames without time stamps")
                    timeline = AudioTimeline(frame.pts * frame.time_base)
                timeline.push(frame)
    if timeline is None:
        raise DecodeError(name, "its audio stream is empty")
    timeline.finish()
    return timeline.take(0, timeline.end)[0]
