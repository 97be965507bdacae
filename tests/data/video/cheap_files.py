"""Small files that claim much: what a reader must not believe."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av

_UNITY = struct.pack(">9I", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


def box(name: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), name) + content


def full_box(name: bytes, *parts: bytes, flags: int = 0) -> bytes:
    """A box that begins with its version, 0, and flags."""
    return box(name, struct.pack(">I", flags), *parts)


def _track(number: int, samples: int) -> bytes:
    """A track of pictures of one byte each, all in one chunk."""
    entry = box(
        b"jpeg", bytes(6), b"\0\1", bytes(16), struct.pack(">HHIIIH", 48, 64, 72 << 16, 72 << 16, 0, 1), bytes(36)
    )
    tables = box(
        b"stbl",
        full_box(b"stsd", struct.pack(">I", 1), entry),
        full_box(b"stts", struct.pack(">III", 1, samples, 1) if samples else struct.pack(">I", 0)),
        full_box(b"stsc", struct.pack(">IIII", 1, 1, samples, 1) if samples else struct.pack(">I", 0)),
        full_box(b"stsz", struct.pack(">II", 1, samples)),
        full_box(b"stco", struct.pack(">II", 1, 40) if samples else struct.pack(">I", 0)),
    )
    return box(
        b"trak",
        full_box(b"tkhd", struct.pack(">5I", 0, 0, number, 0, 100), bytes(16), _UNITY, bytes(8), flags=7),
        box(
            b"mdia",
            full_box(b"mdhd", struct.pack(">4I", 0, 0, 25, 100), bytes(4)),
            full_box(b"hdlr", bytes(4), b"vide", bytes(13)),
            box(b"minf", full_box(b"vmhd", bytes(8)), tables),
        ),
    )


def _movie(*tracks: bytes) -> bytes:
    header = full_box(b"mvhd", struct.pack(">4I", 0, 0, 25, 100), bytes(80))
    return box(b"ftyp", b"isom", bytes(4), b"isom") + box(b"moov", header, *tracks)


def many_samples(samples: int = 20_000_000) -> bytes:
    """An mp4 file of less than 1 KiB whose one table counts so many pictures."""
    return _movie(_track(1, samples))


def many_fragment_samples(samples: int = 20_000_000) -> bytes:
    """The same in a fragment, where no table of sizes is needed."""
    defaults = box(b"mvex", full_box(b"trex", struct.pack(">5I", 1, 1, 1, 1, 0)))
    run = box(
        b"traf",
        full_box(b"tfhd", struct.pack(">I", 1), flags=0x20000),
        full_box(b"trun", struct.pack(">I", samples)),
    )
    fragment = box(b"moof", full_box(b"mfhd", struct.pack(">I", 1)), run)
    return _movie(_track(1, 0), defaults) + fragment + box(b"mdat", bytes(100))


def many_tracks(tracks: int = 900) -> bytes:
    return _movie(*(_track(number, 1) for number in range(1, tracks + 1)))


def write_many_streams(path: Path, streams: int) -> Path:
    """A Matroska file of so many streams of sound, a packet each."""
    with av.open(str(path), "w") as output:
        added = [output.add_stream("pcm_s16le", rate=8000, layout="mono") for _ in range(streams)]
        for stream in added:
            packet = av.Packet(bytes(320))
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 8000)
            output.mux(packet)
    return path
