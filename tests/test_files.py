"""Files that are whole or absent."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from avppc.files import (
    LineFile,
    check_apart,
    check_vacant,
    check_writable,
    name_in_errors,
    new_directory,
    read_json,
    remove_files,
    remove_leftovers,
    replace_file,
    sha256_of,
    sole_use,
    sync_file,
    write_atomically,
    write_json,
)


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


def test_a_name_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250 + ".html")
    for content in (b"first", b"second"):
        write_atomically(path, content)
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


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
        assert f"InUse: {tmp_path} is in use: another process works there" in refused.stderr
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


class TestOnlyOursIsRemoved:
    def test_what_a_record_names_and_the_folders_it_leaves_empty(self, tmp_path: Path) -> None:
        for name in ("set/a/1", "set/a/2", "set/b/1", "set/b/theirs", "outside/1"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
        (tmp_path / "set" / "link").symlink_to(tmp_path / "outside")
        remove_files(tmp_path / "set", ["a/1", "a/2", "a/3", "b/1", "b", "link/1", "b/theirs/1"])
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
        assert left == ["outside", "outside/1", "set", "set/b", "set/b/theirs", "set/link"]

    @pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", ""])
    def test_a_name_that_leads_out_is_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "outside").write_text("x")
        (tmp_path / "set").mkdir()
        with pytest.raises(ValueError, match="is not a path below"):
            remove_files(tmp_path / "set", [name])
        assert (tmp_path / "outside").exists()

    def test_what_a_killed_process_left_goes_when_the_file_is_written_again(self, tmp_path: Path) -> None:
        code = """
import os, pathlib, sys
from avppc.files import new_directory, replace_file
folder = pathlib.Path(sys.argv[1])
with replace_file(folder / "page.html") as file, new_directory(folder / "export") as directory:
    file.write_text("half")
    (directory / "part").write_text("half")
    os._exit(9)
"""
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
        left = sorted(path.name for path in tmp_path.iterdir())
        assert len(left) == 2
        foreign = [".page.html", ".page.html.00000000-1-00000000", ".other.html" + left[1][len(".page.html") :]]
        for name in foreign:
            (tmp_path / name).write_text("theirs")
        write_atomically(tmp_path / "page.html", b"page")
        with new_directory(tmp_path / "export"):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*foreign, "page.html", "export"])

    def test_a_folder_around_in_or_equal_to_the_data_is_not_apart(self, tmp_path: Path) -> None:
        data = tmp_path / "data"
        data.mkdir()
        (tmp_path / "link").symlink_to(data)
        for out in (data, data / "new", tmp_path, tmp_path / "link", tmp_path / "link" / "new", data / ".." / "data"):
            with pytest.raises(ValueError, match="out must be a folder apart from data"):
                check_apart(out, data)
        check_apart(tmp_path / "data-packed", data)


def test_errors_name_the_file_that_the_user_knows(tmp_path: Path) -> None:
    def fail(name: Path | None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", *([str(name)] if name else []))

    path, hidden, other = tmp_path / "set", tmp_path / ".set.1", tmp_path / "other"
    for name, expected in ((None, path), (hidden, path), (hidden / "a" / "b", path / "a" / "b"), (other, other)):
        with pytest.raises(OSError, match="No space") as caught, name_in_errors(path, hidden):
            fail(name)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(expected))
    with pytest.raises(OSError, match=r"^of a library$"), name_in_errors(path):
        raise OSError("of a library")


def test_a_disk_that_fails_while_a_file_is_written_is_told_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"Input/output error: '{tmp_path / 'file'}'"):
        write_atomically(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=rf"Input/output error: '{tmp_path}'"):
        sync_file(tmp_path)


def test_a_disk_that_does_not_tell_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").touch()

    def fail(path: object, *arguments: object, **settings: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        is_dir = Path.is_dir
        patch.setattr(Path, "is_dir", lambda path: fail(path) if path.name.startswith(".") else is_dir(path))
        write_atomically(file, b"content")  # whole already when its temporary name is looked for
    assert file.read_bytes() == b"content"
    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", fail)
        patch.setattr(Path, "lstat", fail)
        with pytest.raises(OSError, match=rf"Input/output error: '{folder}'"):
            check_vacant(folder, "a set")
        with pytest.raises(OSError, match=rf"Input/output error: '{folder}'"), new_directory(folder):
            raise AssertionError("nothing is written where something may be")
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_lines_that_a_disk_does_not_take_wait_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntw")  # cut short by a kill
    file = LineFile(path)
    file.add("three")
    assert path.read_bytes() == b"one\ntw\nthree\n"
    whole = file._file

    class Failing:
        """A file that takes half a line, and then fails."""

        seek, truncate, close = whole.seek, whole.truncate, whole.close

        def write(self, content: bytes) -> int:
            if whole.tell() != len(b"one\ntw\nthree\n"):
                raise OSError(errno.EIO, "Input/output error")
            return whole.write(content[: len(content) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(file, "_file", Failing())
        for line in ("four", "five"):
            with pytest.raises(OSError, match="Input/output error"):
                file.add(line)
    file.add("six")
    file.close()
    assert path.read_bytes() == b"one\ntw\nthree\nfour\nfive\nsix\n"
    path.write_bytes(b"one\ntw\nthree\n")
    file = LineFile(path)
    whole = file._file
    Failing.seek, Failing.truncate, Failing.close = whole.seek, whole.truncate, whole.close
    monkeypatch.setattr(file, "_file", Failing())
    for end in (lambda: file.add("four"), file.close):
        with pytest.raises(OSError, match="Input/output error"):
            end()
    assert path.read_bytes() == b"one\ntw\nthree\n"


def test_lines_name_the_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a file that is there is read, to see whether its last line is whole."""

    class Unreadable(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "lines"
    path.write_bytes(b"one\n")
    monkeypatch.setattr(io, "FileIO", Unreadable)
    with pytest.raises(OSError, match=rf"Input/output error: '{path}'"):
        LineFile(path)
    assert path.read_bytes() == b"one\n"


def test_what_a_process_left_that_nobody_asked_for_its_exit_code_is_removed(tmp_path: Path) -> None:
    """In a container without an init process nobody ever asks: such a process keeps its number for good."""
    code = "import os; print(end='', flush=True); os.close(1); os._exit(0)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with replace_file(tmp_path / "own") as own:
            own.touch()
            name = own.name.replace("own", "other").replace(f"-{os.getpid()}-", f"-{process.pid}-")
            left = tmp_path / name
            left.write_bytes(b"half")
        process.stdout.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
        os.kill(process.pid, 0)
        remove_leftovers(tmp_path)
        assert not left.exists()
