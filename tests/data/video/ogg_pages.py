"""Puts packets without content into Ogg files, as some encoders of Vorbis do."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_HEADER = 27  # bytes before the lengths of a page's segments


def add_empty_packets(path: Path, header_pages: int, codec: bytes = b"vorbis") -> int:
    """Adds one after the first packet that ends in a page, in each page of the stream after its first pages.

    Returns:
        how many were added.
    """
    pages = list(_pages(path.read_bytes()))
    serial = next(header[14:18] for header, _, body in pages if codec in body[:16])
    content, seen, added = b"", 0, 0
    for header, lengths, body in pages:
        if header[14:18] == serial:
            seen += 1
            end = next((number for number, length in enumerate(lengths, 1) if length < 255), 0)
            if seen > header_pages and 0 < end < len(lengths) < 255:
                lengths = lengths[:end] + b"\0" + lengths[end:]
                added += 1
        header = header[:22] + bytes(4) + bytes([len(lengths)])
        checksum = struct.pack("<I", _checksum(header + lengths + body))
        content += header[:22] + checksum + header[26:] + lengths + body
    path.write_bytes(content)
    return added


def _pages(content: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Header, lengths of the segments, and the segments of each page."""
    while content:
        assert content.startswith(b"OggS")
        header, rest = content[:_HEADER], content[_HEADER:]
        lengths, rest = rest[: header[26]], rest[header[26] :]
        body, content = rest[: sum(lengths)], rest[sum(lengths) :]
        yield header, lengths, body


def _table_entry(byte: int) -> int:
    remainder = byte << 24
    for _ in range(8):
        remainder = (remainder << 1 & 0xFFFFFFFF) ^ (0x04C11DB7 if remainder >> 31 else 0)
    return remainder


_TABLE = [_table_entry(byte) for byte in range(256)]


def _checksum(page: bytes) -> int:
    remainder = 0
    for byte in page:
        remainder = (remainder << 8 & 0xFFFFFFFF) ^ _TABLE[remainder >> 24 ^ byte]
    return remainder
