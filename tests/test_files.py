"""Files that are whole or absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from avppc.files import check_writable, new_directory, read_json, sha256_of, sole_use, write_atomically, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "value.json"
    write_json(path, {"a": 1})

    def disk_is_full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    with pytest.raises(OSError, match=r"No space left on device: '.*value\.json'"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["value.json"]


def test_a_directory_is_no_place_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"Is a directory: '.*'"):
        check_writable(tmp_path)
    check_writable(tmp_path / "deep" / "file")
    assert list((tmp_path / "deep").iterdir()) == []


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "page.html", b"page")
    finally:
        os.umask(old)
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o640


def test_a_new_directory_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "new"

    def stop_halfway() -> None:
        with new_directory(path) as directory:
            (directory / "part").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_halfway()
    assert list(path.parent.iterdir()) == []
    old = os.umask(0o027)
    try:
        with new_directory(path) as directory:
            (directory / "part").write_text("whole")
            assert not path.exists()
    finally:
        os.umask(old)
    assert [file.name for file in path.parent.iterdir()] == ["new"]
    assert (path / "part").read_text() == "whole"
    assert path.stat().st_mode & 0o777 == 0o750


def test_a_new_directory_takes_no_others_place(tmp_path: Path) -> None:
    path = tmp_path / "new"
    with pytest.raises(FileExistsError, match="new exists already"), new_directory(path):
        path.mkdir()  # somebody else was quicker
    assert [file.name for file in tmp_path.iterdir()] == ["new"]
    with pytest.raises(FileExistsError, match="new exists already"), new_directory(path):
        raise AssertionError("nothing is written where something is")


def test_a_directory_is_one_process_s_at_a_time(tmp_path: Path) -> None:
    code = "import sys, pathlib; from avppc.files import sole_use\nwith sole_use(pathlib.Path(sys.argv[1])): input()"
    other = [sys.executable, "-c", code, str(tmp_path)]
    with sole_use(tmp_path):
        refused = subprocess.run(other, input="\n", capture_output=True, text=True, timeout=60)
        assert f"ValueError: {tmp_path} is in use: another process works there" in refused.stderr
    with pytest.raises(KeyError), sole_use(tmp_path):
        raise KeyError
    assert subprocess.run(other, input="\n", text=True, timeout=60).returncode == 0  # free again
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_nan_and_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", float("nan"))
    (tmp_path / "value.json").write_bytes(b"{\xff")
    with pytest.raises(ValueError, match=r"value\.json is not valid JSON"):
        read_json(tmp_path / "value.json")
    (tmp_path / "value.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"value\.json is not valid JSON"):
        read_json(tmp_path / "value.json")


def test_checksum_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
