"""Decodes the pictures of a video stream, each with its time stamp.

Some containers (AVI, Matroska's "VFW" tracks, H.264 in ASF) have no time stamps of presentation. What FFmpeg could make
up for them is wrong by a frame or more, so it is asked not to (see open_options): pictures then take the packets' times
in order, the first picture shown the first packet's time. In ASF, whose times of decoding are on one clock with the
sound, a picture takes the time of the packet that brings it out of the decoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from avppc.data.video.clock import FrameGrid

HIDDEN_FRAMES = "hidden frames"  # begins a note
_ANY_DEPTH = 16  # most pictures a decoder holds back, of any codec
_MIN_CHUNK_SECONDS = Fraction(1, 1000)


class PacketClock:
    """When the pictures of a stream's packets are shown."""

    def __init__(self) -> None:
        self.in_order: bool | None = None
        """Whether the stream tells only when its packets are decoded; known from its first packet on."""

    def stamp(self, packet: Packet[Any]) -> int | None:
        """When the packet's picture is shown, in ticks.

        Where the stream tells only when packets are decoded, that: all of them, sorted, are the times of its pictures.
        """
        if self.in_order is None and packet.size:
            self.in_order = packet.pts is None and packet.dts is not None
        return packet.dts if self.in_order else packet.pts


class PictureDecoder:
    """Decodes packet by packet; `pts` of each picture is set, in ticks of the stream's time base."""

    def __init__(self, container: InputContainer, stream: VideoStream) -> None:
        self._stream = stream
        self._decoding_clock = container.format.name == "asf"
        self._clock = PacketClock()
        self._times: deque[int] = deque()  # of packets whose pictures have not come yet
        self._next: int | None = None  # when the last picture ends

    def decode(self, packet: Packet[Any]) -> list[av.VideoFrame]:
        """The pictures that a packet of the stream brings out, in the order in which they are shown.

        Raises:
            ValueError: a picture has no time stamp, and none can be derived.
        """
        stamp = self._clock.stamp(packet)
        if self._clock.in_order and stamp is not None and packet.size:
            self._times.append(stamp)
        frames = [frame for frame in decode_packet(packet) if isinstance(frame, av.VideoFrame)]
        for frame in frames:
            if self._clock.in_order and self._decoding_clock:
                frame.pts = self._next if frame.dts is None else frame.dts
            elif self._clock.in_order:
                frame.pts = self._times.popleft() if self._times else None
            elif frame.pts is None:
                frame.pts = self._next
            if frame.pts is None:
                raise ValueError("the video has frames without time stamps")
            self._next = frame.pts + frame.duration if frame.duration else None
        depth = getattr(self._stream.codec_context, "reorder_depth", _ANY_DEPTH)  # PyAV 14 does not tell
        if not frames and packet.size and len(self._times) > depth:
            self._times.pop()  # the packet says that nothing has changed: it has no picture
        return frames


def decode_pictures(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """All pictures of a stream, with their time stamps."""
    decoder = PictureDecoder(container, stream)
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def shows_again(container: InputContainer, time_base: Fraction) -> bool:
    """Whether each picture lasts until the next one, however long: AVI counts its chunks, and an empty one says that
    the last picture is shown again."""
    return container.format.name == "avi" and time_base >= _MIN_CHUNK_SECONDS


def frame_grid(container: InputContainer, time_base: Fraction, origin: int, first: int = 0) -> FrameGrid[Any]:
    """The grid of instants for the pictures of a file."""
    return FrameGrid(time_base, origin, first, repeats=shows_again(container, time_base))


def ends_stream(packet: Packet[Any]) -> bool:
    """Whether a packet is not the file's: demuxing gives one at the end of each stream, which drains its decoder."""
    return packet.size == 0 and packet.dts is None and packet.buffer_ptr == 0


def decode_packet(packet: Packet[Any]) -> list[av.VideoFrame | av.AudioFrame]:
    """The frames that a packet completes; those that the decoder still held, where it ends the stream.

    A packet of the file without content is left out: it says at most "show the last frame again", as the time stamps
    around it do, but decoders take it for the end of the stream or for damage.
    """
    if packet.size == 0 and not ends_stream(packet):
        return []
    return [frame for frame in packet.decode() if isinstance(frame, (av.VideoFrame, av.AudioFrame))]
