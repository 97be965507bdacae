"""Files that decide what is done next are not believed where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from avppc.settings import is_version, parse_checked_json, read_checked_json, write_checked_json

CONTENT = {"steps": 120, "rate": 0.1, "names": ("a", "b"), "counts": {1: 2, 10: 3, 2: 4}, "note": None}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_checked_json(path, CONTENT)
    assert read_checked_json(path) == json.loads(json.dumps(CONTENT))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_checked_json(path, {"loss": float("nan")})


def test_no_flipped_bit_changes_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_checked_json(path, CONTENT)
    whole, known = path.read_bytes(), json.loads(json.dumps(CONTENT))
    refused = []
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        try:
            assert parse_checked_json(bytes(content)) == known  # another kind of white space
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 7 * len(whole)
    path.write_bytes(whole.replace(b"120", b"121"))
    with pytest.raises(ValueError, match=r"value\.json: its checksum is not that of its content"):
        read_checked_json(path)


def test_files_of_before_have_no_checksum() -> None:
    assert parse_checked_json(b'{"steps": 120}') == {"steps": 120}
    assert parse_checked_json(b"[120]") == [120]


@pytest.mark.parametrize("found", [True, 1.0, "1", None, 2])
def test_a_version_is_a_whole_number(found: object) -> None:
    assert is_version(1, 1)
    assert not is_version(found, 1)
