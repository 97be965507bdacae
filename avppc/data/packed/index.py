"""index.json of a packed data set: which clips lie in which shards, and the checksum of each.

`avppc prepare` writes it; what `avppc index` writes, about a folder of videos, is a manifest (../prepare/index.py).
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from avppc.clip import SAMPLE_RATE_HZ, SPLITS, VIDEO_FPS
from avppc.data.config import CropSettings
from avppc.data.packed.shard import ClipShape, ShardRecord
from avppc.files import json_bytes, read_bytes
from avppc.settings import config_from_dict, is_version, parse_checked_json, read_checked_json, write_checked_json

FORMAT = "avppc-packed"
VERSION = 1
INDEX_NAME = "index.json"
SHARD_FOLDER = "shards"
UNIT_FOLDER = "units"  # of the records of what `avppc prepare` has done
CLAIM_NAME = "prepare.json"  # what it is doing, and of how many units
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.safetensors")


@dataclass(frozen=True)
class PackedIndex:
    """What a packed data set holds; the content of its index.json."""

    shape: ClipShape
    words: tuple[str, ...]
    """The words in the order of their labels."""
    splits: dict[str, tuple[ShardRecord, ...]]
    """Shards of "train", "val" and "test", as far as there are clips."""

    def write(self, directory: Path) -> None:
        """Writes index.json, atomically."""
        write_checked_json(directory / INDEX_NAME, self._content())

    def sha256(self) -> str:
        """SHA-256 of its values, not of its file's spelling: equal for equal sets."""
        return hashlib.sha256(json_bytes(self._content())).hexdigest()

    def _content(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "format": FORMAT,
            "version": VERSION,
            "frames": shape.frames,
            "height": shape.height,
            "width": shape.width,
            "samples": shape.samples,
            "fps": VIDEO_FPS,
            "sample_rate_hz": SAMPLE_RATE_HZ,
            "words": list(self.words),
            "splits": {split: [asdict(record) for record in records] for split, records in self.splits.items()},
        }

    def shards_of(self, split: str, data: str | os.PathLike[str]) -> tuple[ShardRecord, ...]:
        """The split's shards, one at least; ValueError where it has none, which names the data set as `data`."""
        records = self.splits.get(split, ())
        if not records:
            available = ", ".join(repr(name) for name, found in self.splits.items() if found)
            hint = (
                "; folders named val or test are not trained on: prepare such a folder by itself to do so"
                if split == "train"
                else f"; it is made of the videos in folders named {split}, VIDEOS/WORD/{split} for words"
            )
            raise ValueError(
                f"split {split!r} of {data} has no clips; available: {available or 'none'}{hint if available else ''}"
            )
        return records

    @classmethod
    def read(cls, directory: Path) -> PackedIndex:
        """Reads and checks index.json; ValueError that names the file and what is wrong with it."""
        path = index_file(directory)
        try:
            return cls.parse(read_bytes(path))
        except ValueError as error:
            raise ValueError(f"{path}{error}") from error

    @classmethod
    def parse(cls, content: bytes) -> PackedIndex:
        """The index in an index.json's content; the text of its ValueError is for putting behind the file's name."""
        values = parse_checked_json(content)
        try:
            return _parse_index(values)
        except (KeyError, TypeError) as error:
            raise ValueError(f" is damaged: {type(error).__name__} {error}") from error
        except ValueError as error:
            raise ValueError(f": {error}") from error


def index_file(directory: Path) -> Path:
    """The index.json of a packed data set; ValueError where there is none."""
    path = directory / INDEX_NAME
    if not path.is_file():
        raise ValueError(f"{directory} is not a packed data set: it has no {INDEX_NAME}; {_advice(directory)}")
    return path


def _advice(directory: Path) -> str:
    """What to do about a missing index."""
    try:
        units = read_checked_json(directory / CLAIM_NAME)["units"]
        total = sum(units.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "`avppc prepare` makes one"
    done = len(list((directory / UNIT_FOLDER).glob("[!.]*.json")))
    return f"it is half prepared, {total - done} of {total} units are missing: the same `avppc prepare` command goes on"


def _parse_index(content: Any) -> PackedIndex:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'"format" must be "{FORMAT}"')
    if not is_version(content["version"], VERSION):
        raise ValueError(f"version {content['version']} is not supported, this avppc reads version {VERSION}")
    for name, expected in (("fps", VIDEO_FPS), ("sample_rate_hz", SAMPLE_RATE_HZ)):
        if content[name] != expected:
            raise ValueError(f"{name} must be {expected}, got {content[name]}")
    sides = {name: _integer(content[name], name, 1, 1 << 20) for name in ("frames", "height", "width")}
    shape = ClipShape(**sides)
    if content["samples"] != shape.samples:
        raise ValueError(f"samples must be {shape.samples} for {shape.frames} frames, got {content['samples']}")
    words = _strings(content["words"], "words")
    if not isinstance(content["splits"], dict) or not content["splits"].keys() <= set(SPLITS):
        raise ValueError(f"splits must be among {', '.join(SPLITS)}")
    splits = {split: tuple(map(parse_record, records)) for split, records in content["splits"].items()}
    names = [record.file for records in splits.values() for record in records]
    if len(set(names)) < len(names):
        raise ValueError("a shard is listed twice")
    return PackedIndex(shape, words, splits)


def parse_record(entry: Any) -> ShardRecord:
    """A shard's record from JSON values; ValueError, KeyError or TypeError where it is damaged."""
    record = ShardRecord(
        file=str(entry["file"]),
        clips=_integer(entry["clips"], "clips", 1, 1 << 32),
        bytes=_integer(entry["bytes"], "bytes", 1, 1 << 50),
        sha256=str(entry["sha256"]),
        sources=_strings(entry["sources"], "sources"),
    )
    if not _SHARD_NAME.fullmatch(record.file):
        raise ValueError(f"{record.file!r} is not a shard's name: letters, digits, '.', '-', '_', no folders")
    if len(record.sources) != record.clips:
        raise ValueError(f"{record.file} has {record.clips} clips but {len(record.sources)} sources")
    return record


def _integer(value: Any, name: str, minimum: int, maximum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be an integer from {minimum} to {maximum}, got {value!r}")
    return value


def _strings(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} must be a list of strings")
    return tuple(value)


def prepared_crop(directory: Path) -> CropSettings:
    """How `avppc prepare` has cropped the clips of a set; the defaults where nothing tells.

    Raises:
        ValueError: prepare.json is damaged. OSError: it cannot be read.
    """
    path = directory / CLAIM_NAME
    if not path.is_file():
        return CropSettings()
    known = read_checked_json(path)
    names = {field.name for field in fields(CropSettings)} & known.keys() if isinstance(known, dict) else set()
    return config_from_dict(CropSettings, {name: known[name] for name in names}, str(path))
