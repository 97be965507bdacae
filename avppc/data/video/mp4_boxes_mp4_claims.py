"""How much an mp4 file claims to hold, asked before a decoder makes room for it.

A table of sample sizes may say "20 million samples of one byte" in twelve bytes, and so may a fragment; FFmpeg then
allocates some 36 bytes for each sample. Only counts that no file of this size can hold are refused here; whether the
boxes agree with each other is the question of `mp4_boxes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

_FIRST = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid", b"styp", b"sidx", b"moof")
_INSIDE = (b"trak", b"mdia", b"minf", b"stbl", b"traf")  # boxes that lead to the counts
_SAMPLES_PER_BYTE = 8  # QuickTime counts the sound samples before compression: 6 a byte with MACE 6:1
_MAX_TRACKS = 100
_SAMPLE_FIELDS = 0xF00  # flags of a fragment's run: each sample has a duration, a size, flags, an offset


def check_claims(file: BinaryIO) -> None:
    """Reads the counts in a file, from its beginning; files of other kinds are left alone.

    Raises:
        ValueError: it claims more samples than its bytes can hold, or more than 100 tracks.
    """
    file_bytes = file.seek(0, 2)
    samples = tracks = 0
    for name, content in _tables(file, file_bytes):
        for inner, table in _walk(content):
            tracks += inner == b"trak"
            samples += _count(inner, table)
        if tracks > _MAX_TRACKS:
            raise ValueError(f"it has {tracks} tracks, at most {_MAX_TRACKS} are read")
        if samples > _SAMPLES_PER_BYTE * file_bytes:
            kind = "table of contents (moov)" if name == b"moov" else "fragment (moof)"
            raise ValueError(f"damaged: a {kind} claims {samples:,} samples, in a file of {file_bytes:,} bytes")


def _tables(file: BinaryIO, file_bytes: int) -> Iterator[tuple[bytes, memoryview]]:
    """Name and content of each box at the top that has counts."""
    start = 0
    while start + 8 <= file_bytes:
        file.seek(start)
        header = file.read(16)
        size, name, header_bytes = int.from_bytes(header[:4], "big"), header[4:8], 8
        if start == 0 and name not in _FIRST:
            return
        if size == 1:
            size, header_bytes = int.from_bytes(header[8:], "big"), 16
        elif size == 0:
            size = file_bytes - start
        if size < header_bytes:
            return
        if name in (b"moov", b"moof"):
            file.seek(start + header_bytes)
            yield name, memoryview(file.read(min(size, file_bytes - start) - header_bytes))
        start += size


def _walk(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The boxes in a box and in those of them that lead to counts; what does not fit is passed over."""
    start = 0
    while start + 8 <= len(content):
        size, name = int.from_bytes(content[start : start + 4], "big"), bytes(content[start + 4 : start + 8])
        inner = content[start + 8 : start + size]
        yield name, inner
        if name in _INSIDE:
            yield from _walk(inner)
        if size < 8:
            return
        start += size


def _count(name: bytes, table: memoryview) -> int:
    """Samples that a table claims without an entry for each, which would take room in the file."""
    if name == b"stsz":
        samples, fields = _integer(table, 8), int(_integer(table, 4) == 0)
    elif name == b"trun":
        samples, fields = _integer(table, 4), (_integer(table, 0) & _SAMPLE_FIELDS).bit_count()
    else:
        return 0
    return samples if 4 * fields * samples > len(table) or fields == 0 else 0


def _integer(content: memoryview, place: int) -> int:
    return int.from_bytes(content[place : place + 4], "big")
