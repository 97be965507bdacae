"""JSON files that decide what is done next: each holds a checksum of its own content, which a flipped bit betrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avppc.files import parse_json, read_bytes, write_json

CHECKSUM = "checksum"
"""The member that holds the checksum; nothing else in such a file may have its name."""
_KIND = "sha256:"


def write_checked_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically, with the checksum of the rest as its last member."""
    write_json(path, with_checksum(content))


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of its members as one more."""
    read_back = parse_json(json.dumps(content, allow_nan=False))  # where keys are texts and tuples are lists
    return {**read_back, CHECKSUM: _checksum(read_back)}


def read_checked_json(path: Path) -> Any:
    """The JSON value in a file, without its checksum; one that has none was written by an earlier version.

    Raises:
        ValueError: the file is not JSON, or its checksum is not that of its content; the text names the file.
        OSError: it cannot be read.
    """
    try:
        return parse_checked_json(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}{error}") from error


def parse_checked_json(data: bytes) -> Any:
    """As read_checked_json; the text of a ValueError is to be read after the file's name."""
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ValueError(f" is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        return value
    found = value.pop(CHECKSUM, None)
    # The flipped bit may lie in the member's name: its value is then found under another one.
    renamed = any(isinstance(item, str) and item.startswith(_KIND) for item in value.values())
    if renamed or (found is not None and found != _checksum(value)):
        raise ValueError(
            ": its checksum is not that of its content: the file is damaged, or was changed by hand (then take its "
            f'member "{CHECKSUM}" out)'
        )
    return value


def is_version(found: Any, version: int) -> bool:
    """Whether a file's "version" is that number: true, which Python takes for 1, is none."""
    return type(found) is int and found == version


def _checksum(content: Mapping[str, Any]) -> str:
    return _KIND + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
