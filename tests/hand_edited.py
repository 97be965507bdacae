"""JSON files without their checksum: as written before there were any, or as changed by hand on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def without_checksum(content: bytes) -> bytes:
    """The content of a JSON file without its checksum."""
    return json.dumps(_members(content)).encode()


def read_plain(path: Path) -> dict[str, Any]:
    """The members of a JSON file, without its checksum."""
    return _members(path.read_bytes())


def _members(content: bytes) -> dict[str, Any]:
    members: dict[str, Any] = json.loads(content)
    members.pop("checksum", None)
    return members


def change_json(path: Path, **changes: object) -> None:
    """Changes members of a JSON file, and takes its checksum out."""
    path.write_text(json.dumps(read_plain(path) | changes))
