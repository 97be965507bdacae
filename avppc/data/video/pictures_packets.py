"""Decodes packets of a file one by one."""

from __future__ import annotations

from typing import Any

import av
from av.packet import Packet


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
