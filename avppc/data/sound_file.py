"""The sound of a video that lies in a file of its own beside it: a.mp4 without sound, and a.wav."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from heapq import merge
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.stream import Stream
from av.video.stream import VideoStream

SOUND_SUFFIXES = (".wav", ".flac", ".aif", ".aiff", ".m4a", ".mka", ".opus", ".oga", ".aac", ".ac3", ".mp3", ".wma")
"""The first that there is beside a video is taken."""
SOUND_FORMATS = (
    "wav,w64,flac,mp3,aac,ac3,eac3,amr,ape,dts,tta,wv,voc,nistsphere,ogg,aiff,au,caf,mov,mp4,m4a,3gp,matroska,webm,avi,"
    "mpeg,mpegts,flv,asf,mxf,dv"
)
SOUND_FILE = "sound from another file"  # begins the note on such a video
_STREAMED = 0x7FFF_0000  # a program that writes into a pipe leaves a size from here on
_MAX_CHUNKS = 1000  # of a WAVE file before its samples


def sound_names(stem: str) -> Iterator[str]:
    """Names that the sound of a video may have, the preferred ones first."""
    for suffix in SOUND_SUFFIXES:
        yield stem + suffix
        yield stem + suffix.upper()


def sound_beside(video: str | os.PathLike[str]) -> Path | None:
    """The sound file beside a video that has the same name but for its ending; no link, which may lead anywhere."""
    path = Path(video)
    for name in sound_names(path.stem):
        candidate = path.with_name(name)
        if candidate.is_file() and not candidate.is_symlink():
            return candidate
    return None


def missing_of_wave(file: BinaryIO) -> int:
    """How many bytes of its samples a WAVE file lacks; 0 for other files, and for a header without length (a stream's).

    It is the length of the chunk of samples that counts: recorders in browsers write a wrong one for the whole file.
    """
    size = os.fstat(file.fileno()).st_size
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


class JoinedStreams:
    """Stands for `streams` of a PyAV container: the pictures of one file and the sound of another."""

    def __init__(self, video: InputContainer, sound: InputContainer) -> None:
        self.video = video.streams.video
        self.audio = sound.streams.audio
        self.best = video.streams.best

    def __iter__(self) -> Iterator[Stream]:
        return iter([*self.video, *self.audio])


class JoinedContainer:
    """A video without sound and the file of its sound, read as if one container held both.

    Both begin together: the time stamps of the sound are moved by what the two files' first ones differ.
    """

    def __init__(self, video: InputContainer, sound: InputContainer) -> None:
        self._video, self._sound = video, sound
        self._shift = Fraction((video.start_time or 0) - (sound.start_time or 0), av.time_base)  # seconds
        self.streams = JoinedStreams(video, sound)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._video, name)

    def demux(self, *streams: Stream) -> Iterator[av.Packet[Any]]:
        """Packets of both files in the order of their times; at the end of each stream one that drains its decoder."""
        of_video = [stream for stream in streams if isinstance(stream, VideoStream)]
        of_sound = [stream for stream in streams if isinstance(stream, AudioStream)]
        parts = []
        if of_video:
            parts.append(_timed(self._video.demux(*of_video)))
        if of_sound:
            parts.append(_timed(self._moved(self._sound.demux(*of_sound))))
        return (packet for _, packet in merge(*parts, key=itemgetter(0)))

    def decode(self, stream: Stream) -> Iterator[Any]:
        """The frames of one stream."""
        for packet in self.demux(stream):
            yield from packet.decode()

    def seek(self, offset: int, **options: Any) -> None:
        """Goes to a time, in microseconds, in both files."""
        self._video.seek(offset, **options)
        self._sound.seek(max(0, offset - round(self._shift * av.time_base)), **options)

    def close(self) -> None:
        """Closes both files."""
        self._video.close()
        self._sound.close()

    def __enter__(self) -> JoinedContainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _moved(self, packets: Iterable[av.Packet[Any]]) -> Iterator[av.Packet[Any]]:
        for packet in packets:
            if packet.time_base is not None:
                ticks = round(self._shift / packet.time_base)
                packet.pts = None if packet.pts is None else packet.pts + ticks
                packet.dts = None if packet.dts is None else packet.dts + ticks
            yield packet


def _timed(packets: Iterable[av.Packet[Any]]) -> Iterator[tuple[Fraction, av.Packet[Any]]]:
    """Packets with their times in seconds; a packet without a time has that of the one before."""
    seconds = Fraction(-1 << 40)
    for packet in packets:
        if packet.dts is not None and packet.time_base is not None:
            seconds = packet.dts * packet.time_base
        yield seconds, packet


def sound_notes(video: VideoStream, audio: AudioStream) -> list[str]:
    """A note where the sound of a video comes from another file."""
    if audio.container is video.container:
        return []
    return [f"{SOUND_FILE}: {os.path.basename(audio.container.name)}, both begin together"]
