"""What the boxes of an mp4 file say: whether they agree with each other, and how much they claim to hold.

Decoders skip boxes that contradict each other, and say nothing. A table of sample sizes may say "20 million samples of
one byte" in twelve bytes, and so may a fragment; FFmpeg then allocates some 36 bytes for each sample. Only counts that
no file of this size can hold are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

# What may stand first in a file of this kind; anything else is another kind.
_FIRST = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"uuid")
_MAX_MOOV_BYTES = 1 << 30  # a damaged size must not make us read a whole film
_TRACKS = (b"vide", b"soun")
_SIZES = {b"mvhd": (108, 120), b"tkhd": (92, 104), b"mdhd": (32, 44)}  # of versions 0 and 1
# What a box may hold, as far as it decides what is decoded: "1" exactly one, "?" at most one.
_MOVIE = {b"mvhd": "1"}
_TRACK = {b"tkhd": "1", b"mdia": "1", b"edts": "?"}
_MEDIA = {b"mdhd": "1", b"hdlr": "1", b"minf": "1"}
_INFORMATION = {b"stbl": "1"}
_SAMPLES = {b"stsd": "1", b"stts": "1", b"ctts": "?", b"stsc": "1", b"stsz stz2": "1", b"stco co64": "1", b"stss": "?"}
_EDITS = {b"elst": "1"}
_OTHERS = b"""
    free skip uuid udta meta iods trak mvex drm cmov rmra clip ctab prfl tref trgr load matt kmat imap txas
    tapt strk ludt sgpd sbgp subs saiz saio cslg stps sdtp stdp padb stsh elng extr gmhd dinf vmhd smhd hmhd
    nmhd sthd hdlr gmin sdpt
""".split()

Boxes = list[tuple[bytes, memoryview]]

_FIRST_CLAIMS = (*_FIRST, b"styp", b"sidx", b"moof")
_INSIDE = (b"trak", b"mdia", b"minf", b"stbl", b"traf")  # boxes that lead to the counts
_SAMPLES_PER_BYTE = 8  # QuickTime counts the sound samples before compression: 6 a byte with MACE 6:1
_MAX_TRACKS = 100
_SAMPLE_FIELDS = 0xF00  # flags of the box trun: each sample has a duration, a size, flags, an offset


def check_mp4(file: BinaryIO) -> list[str]:
    """Reads the boxes of a file, from its beginning; files of other kinds are left alone.

    Returns:
        Notes on boxes that are ignored, since their kind is unknown.

    Raises:
        ValueError: the boxes contradict each other.
    """
    movie = _find_movie(file)
    notes: list[str] = []
    if movie is not None:
        children = _children(b"moov", movie, _MOVIE, notes)
        fragmented = any(name == b"mvex" for name, _ in children)
        for name, content in children:
            if name == b"trak":
                _check_track(content, notes, fragmented)
    return notes


def _find_movie(file: BinaryIO) -> memoryview | None:
    """Content of the first moov box; None where there is none, which the decoder notices too."""
    file_bytes = file.seek(0, 2)
    for name, start, header_bytes, size in _top_boxes(file, file_bytes, _FIRST):
        if name != b"moov":
            continue
        if size > file_bytes - start:
            missing = size - (file_bytes - start)
            raise ValueError(f"damaged: its table of contents (moov) lacks {missing} bytes")
        if not header_bytes <= size <= _MAX_MOOV_BYTES:
            raise ValueError(f"damaged: its table of contents (moov) would have {size} bytes")
        file.seek(start + header_bytes)
        return memoryview(file.read(size - header_bytes))
    return None


def _top_boxes(file: BinaryIO, file_bytes: int, first: tuple[bytes, ...]) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, place, bytes of the header and bytes in all of each box that lies in no other; what follows one that is
    too small for its own header cannot be found.

    Args:
        first: kinds of boxes of which a file begins with one; there are none in other files.
    """
    start = 0
    while start + 8 <= file_bytes:
        file.seek(start)
        header = file.read(16)
        size, name, header_bytes = int.from_bytes(header[:4], "big"), header[4:8], 8
        if start == 0 and name not in first:
            return
        if size == 1 and len(header) == 16:
            size, header_bytes = int.from_bytes(header[8:], "big"), 16
        elif size == 0:
            size = file_bytes - start
        yield name, start, header_bytes, size
        if size < header_bytes:
            return
        start += size


def _children(parent: bytes, content: memoryview, rules: dict[bytes, str], notes: list[str]) -> Boxes:
    """The boxes in a box, after checking that they fill it and are those that must be there."""
    found: Boxes = []
    start = 0
    while start + 8 <= len(content):
        size, name = int.from_bytes(content[start : start + 4], "big"), bytes(content[start + 4 : start + 8])
        if size == 0 and not any(content[start:]):  # zeros at the end are allowed
            return _checked(parent, found, rules, notes)
        header_bytes = 8
        if size == 1:
            size, header_bytes = int.from_bytes(content[start + 8 : start + 16], "big"), 16
        if not header_bytes <= size <= len(content) - start:
            left = len(content) - start
            raise ValueError(f"damaged: box {_text(name)} in {_text(parent)} claims {size} of {left} bytes")
        if name in _SIZES and size not in _SIZES[name]:
            raise ValueError(f"damaged: box {_text(name)} has {size} bytes, it must have {_either(_SIZES[name])}")
        found.append((name, content[start + header_bytes : start + size]))
        start += size
    if any(content[start:]):
        raise ValueError(f"damaged: {len(content) - start} bytes too many at the end of box {_text(parent)}")
    return _checked(parent, found, rules, notes)


def _checked(parent: bytes, found: Boxes, rules: dict[bytes, str], notes: list[str]) -> Boxes:
    for names, rule in rules.items():
        count = sum(name in names.split() for name, _ in found)
        if count > 1 or (rule == "1" and count == 0):
            raise ValueError(f"damaged: {count} boxes {_either(names.decode().split())} in {_text(parent)}")
    known = {name for names in rules for name in names.split()}.union(_OTHERS)
    for name in sorted({name for name, _ in found} - known):
        notes.append(f"unknown box: {_text(name)} in {_text(parent)} is ignored")
    return found


def _check_track(track: memoryview, notes: list[str], fragmented: bool) -> None:
    own: list[str] = []
    boxes = dict(_children(b"trak", track, _TRACK, own))
    media = dict(_children(b"mdia", boxes[b"mdia"], _MEDIA, own))
    if bytes(media[b"hdlr"][8:12]) not in _TRACKS:
        return
    if b"edts" in boxes:
        _check_edits(dict(_children(b"edts", boxes[b"edts"], _EDITS, own))[b"elst"])
    information = dict(_children(b"minf", media[b"minf"], _INFORMATION, own))
    tables = dict(_children(b"stbl", information[b"stbl"], _SAMPLES, own))
    notes += own
    if not fragmented:
        _check_tables(tables)


def _check_edits(content: memoryview) -> None:
    version, count = content[0] if len(content) else 0, _integer(content, 4)
    expected = 8 + count * (20 if version == 1 else 12)
    if len(content) != expected:
        raise ValueError(f"damaged: the edit list has {len(content)} bytes, {count} edits need {expected}")


def _check_tables(tables: dict[bytes, memoryview]) -> None:
    """All tables of a track must speak of the same number of samples."""
    if b"stsz" in tables:
        samples = _integer(tables[b"stsz"], 8)
        if _integer(tables[b"stsz"], 4) == 0:
            _rows(b"stsz", tables[b"stsz"][8:], 1)
    else:
        samples = _integer(tables[b"stz2"], 8)
    for name in (b"stts", b"ctts"):
        if name in tables:
            counted = int(_rows(name, tables[name][4:], 2)[:, 0].sum())
            if counted != samples:
                raise ValueError(f"damaged: box {_text(name)} tells the times of {counted} of {samples} samples")
    if b"stss" in tables:
        keys = _rows(b"stss", tables[b"stss"][4:], 1)[:, 0]
        if len(keys) and not (keys[0] >= 1 and keys[-1] <= samples and (np.diff(keys) > 0).all()):
            raise ValueError("damaged: the list of key frames (stss) is not in order")
    chunks = _integer(tables.get(b"stco", tables.get(b"co64", memoryview(b""))), 4)
    placed = _count_placed(_rows(b"stsc", tables[b"stsc"][4:], 3), chunks)
    if placed != samples:
        raise ValueError(f"damaged: the chunks hold {placed} samples, the sizes of {samples} are told")


def _count_placed(
    entries: NDArray[np.int64],  # [n, 3] first chunk, from 1, samples a chunk, description
    chunks: int,
) -> int:
    """Samples in all chunks: each entry lasts to the next one's first chunk."""
    if not len(entries):
        return 0
    firsts = np.append(entries[:, 0], chunks + 1)
    lengths = np.diff(firsts)
    if firsts[0] != 1 or (lengths < 0).any():
        raise ValueError("damaged: the table of chunks (stsc) is not in order")
    return int((lengths * entries[:, 1]).sum())


def _rows(name: bytes, content: memoryview, columns: int) -> NDArray[np.int64]:
    """[n, columns] of a table that begins with n."""
    count = _integer(content, 0)
    if len(content) < 4 + 4 * columns * count:
        raise ValueError(f"damaged: box {_text(name)} has no room for its {count} entries")
    values = np.frombuffer(content, ">u4", columns * count, 4)
    return values.astype(np.int64).reshape(count, columns)


def _integer(content: memoryview, place: int) -> int:
    if len(content) < place + 4:
        raise ValueError("damaged: a box of the table of contents is too short")
    return int(struct.unpack_from(">I", content, place)[0])


def _text(name: bytes) -> str:
    return repr(name.decode("latin-1"))


def _either(values: tuple[int, ...] | list[str]) -> str:
    return " or ".join(map(str, values))


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
    for name, start, header_bytes, size in _top_boxes(file, file_bytes, _FIRST_CLAIMS):
        if name in (b"moov", b"moof") and size >= header_bytes:
            file.seek(start + header_bytes)
            yield name, memoryview(file.read(min(size, file_bytes - start) - header_bytes))


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
        samples, fields = _claimed(table, 8), int(_claimed(table, 4) == 0)
    elif name == b"trun":
        samples, fields = _claimed(table, 4), (_claimed(table, 0) & _SAMPLE_FIELDS).bit_count()
    else:
        return 0
    return samples if 4 * fields * samples > len(table) or fields == 0 else 0


def _claimed(content: memoryview, place: int) -> int:
    return int.from_bytes(content[place : place + 4], "big")
