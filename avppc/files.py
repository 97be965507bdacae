"""Files and directories that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<machine>[0-9a-f]{8})-(?P<process>\d{1,9})-[0-9a-f]{8}", re.DOTALL)
_MACHINE = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_in_use: set[str] = set()
"""Temporary names in use here; others with this process's number are from an earlier process of the same number."""
_fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None  # not on Windows


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, also one after a crash, finds the old content or the new, never a part."""
    with replace_file(path) as temporary, temporary.open("xb") as file:
        file.write(data)


def check_writable(path: Path) -> None:
    """Raises OSError unless a file can be written at `path`: to be asked before hours of work, not after them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with temporary_place(path) as trial:
        trial.touch()


def check_apart(out: Path, data: Path) -> None:
    """Raises ValueError where two folders are the same or one lies in the other; links are followed."""
    for inner, outer in ((out, data), (data, out)):
        place = real_path(inner)
        if any(_same(parent, outer) for parent in (place, *place.parents)):
            raise ValueError(
                f"out must be a folder apart from data: {out} is, lies in or contains {data}; give another --out"
            )


def _same(first: Path, second: Path) -> bool:
    if first == real_path(second):
        return True
    with contextlib.suppress(OSError):  # one of them may not be there
        return os.path.samefile(first, second)
    return False


def check_vacant(folder: Path, allowed: str) -> None:
    """Raises ValueError unless a folder is empty or missing; hidden files and lost+found do not count.

    Args:
        allowed: what the folder may be instead of empty, for the message.
    """
    if not _is_there(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {folder}")
    foreign = sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "lost+found")
    if foreign:
        some = ", ".join(map(repr, foreign[:3])) + (" ..." if len(foreign) > 3 else "")
        raise ValueError(f"out must be an empty or missing folder, or {allowed}; {folder} holds {some}")


def _is_there(path: Path) -> bool:
    """Whether there is anything at a path, a link to nothing too; OSError where a broken disk does not tell."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Removes files below a folder, and the folders among them that this leaves empty: the one way things are deleted.

    Whatever else is there stays, and so does what a link leads to.

    Args:
        names: paths below `folder`, with "/", as a record of our own names them; they need not exist.

    Raises:
        ValueError: a name leads out of the folder.
        OSError: a file cannot be removed.
    """
    inside = real_path(folder)
    parents = set()
    for name in names:
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise ValueError(f"{name!r} is not a path below {folder}: it is not removed")
        path = folder / relative
        if not real_path(path.parent).is_relative_to(inside) or (path.is_dir() and not path.is_symlink()):
            continue
        with contextlib.suppress(NotADirectoryError):  # what was its folder is a file now: it is gone
            path.unlink(missing_ok=True)
        parents |= set(relative.parents[:-1])
    for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            (folder / parent).rmdir()


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes the half-written files that processes of this machine have left in a folder when they ended.

    Args:
        name: of the file or directory that it was to become; None: any.
    """
    wanted = None if name is None else _short(name)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _TEMPORARY.fullmatch(entry.name)
            if found is None or wanted not in (None, found["name"]) or not _has_ended(entry.name, found):
                continue
            _remove_temporary(Path(entry.path))


def _has_ended(name: str, found: re.Match[str]) -> bool:
    """Whether the process that wrote under this temporary name runs no more."""
    process = int(found["process"])
    if found["machine"] != _MACHINE or os.name != "posix":  # signal 0 is a question on POSIX alone
        return False
    if process == os.getpid():
        return name not in _in_use
    with contextlib.suppress(PermissionError):  # it is another user's, and alive
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return True
    return _is_zombie(process)


def _is_zombie(process: int) -> bool:
    """Whether a process has ended, but its number stays until its parent asks how: in a container perhaps for good."""
    with contextlib.suppress(OSError):  # no /proc: not Linux
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    return False


def _remove_temporary(path: Path) -> None:
    """Removes a temporary file or folder; where that fails, the next process that writes the same file tries again."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


class InUse(ValueError):
    """Another process works in a directory."""


@contextlib.contextmanager
def sole_use(directory: Path, *, wait: bool = False) -> Iterator[None]:
    """Locks a directory for this process while the block lasts; the lock goes with the process, however that ends.

    Where the file system knows no locks (some network ones), others are not kept out.

    Raises:
        InUse: another process uses it; with `wait` it is waited for.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            if _fcntl is not None:
                _fcntl.flock(handle, _fcntl.LOCK_EX | (0 if wait else _fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise InUse(f"{directory} is in use: another process works there") from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary name to write a file under, which then replaces `path`; if the block fails, the file is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_place(path) as temporary:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    sync_file(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary directory to fill, which becomes `path` when the block ends, and goes if it fails.

    Raises:
        FileExistsError: there is something at `path` already.
    """
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_place(path) as temporary:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            sync_file(file)
        _refuse_existing(path)  # a rename would replace an empty directory
        os.rename(temporary, path)
    sync_file(path.parent)


@contextlib.contextmanager
def temporary_place(path: Path) -> Iterator[Path]:
    """Gives a temporary name for what is to be renamed to `path`; what still has that name at the end is removed.

    Half-written files that earlier processes have left beside `path` are removed, too. Errors name `path`.
    """
    remove_leftovers(path.parent, path.name)
    temporary = temporary_name(path)
    try:
        with name_in_errors(path, temporary):
            yield temporary
    finally:
        _remove_temporary(temporary)
        _in_use.discard(temporary.name)


def _refuse_existing(path: Path) -> None:
    if _is_there(path):
        raise FileExistsError(f"{path} exists already: give another name, or remove it first")


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process takes, and that tells which process took it."""
    name = f".{_short(path.name)}.{_MACHINE}-{os.getpid()}-{secrets.token_hex(4)}"
    _in_use.add(name)
    return path.with_name(name)


def _short(name: str) -> str:
    """The name, or its SHA-256 where it is too long to take a suffix: file systems allow 255 bytes."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= 200 else hashlib.sha256(encoded).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; a NaN is an error, since JSON has none."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The content of a JSON file; a NaN is an error, since JSON has none."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes a file of JSON values, one a line, atomically."""
    write_atomically(path, "".join(json.dumps(value) + "\n" for value in values).encode())


class LineFile:
    """A file to which lines are added: what a full or failing disk does not take waits for the next line or the end.

    No line is joined to a part of another.
    """

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path, "r+", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))
        self._end = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, self._end - 1))
        try:
            with name_in_errors(path):
                last = self._file.read(1)
        except OSError:
            self._file.close()
            raise
        self._waiting = b"" if last in (b"", b"\n") else b"\n"  # a kill may have cut the last line short

    def add(self, line: str) -> None:
        """Adds a line behind those that wait; OSError where the disk does not take it for now."""
        self._waiting += f"{line}\n".encode()
        self._write()

    def close(self) -> None:
        """Writes what waits, and closes the file; OSError where the disk does not take it: nothing of it is left."""
        try:
            if self._waiting:
                self._write()
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            raise
        finally:
            self._file.close()

    def _write(self) -> None:
        self._file.seek(self._end)  # over what a write that failed has left
        rest = self._waiting
        while rest:
            rest = rest[self._file.write(rest) or 0 :]
        self._end += len(self._waiting)
        self._waiting = b""


def read_json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON values, one a line; a line that is none (cut short by a kill, say) is left out."""
    for line in read_bytes(path).splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            value = parse_json(line)
            if isinstance(value, dict):
                yield value


def read_json(path: Path) -> Any:
    """The JSON value in a file; ValueError that names the file where it is not JSON."""
    try:
        return parse_json(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def parse_json(content: bytes | str) -> Any:
    """The JSON value in bytes or text; ValueError for whatever is wrong with it: encoding, syntax, depth, digits."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error)) from error


def real_path(path: Path) -> Path:
    """Where a path leads, links followed; one that leads back to itself is left as it is.

    Path.resolve raises a RuntimeError there in Python 3.11 and 3.12.
    """
    return Path(os.path.realpath(path))


def sync_file(path: Path) -> None:
    """Makes what is written in a file last through a power cut; of a directory, the renames in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with name_in_errors(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def copies_folder(what: str) -> Path:
    """The folder for copies of what lies elsewhere: AVPPC_CACHE, else ~/.cache/avppc.

    Args:
        what: of which a copy is kept, for the message.

    Raises:
        ValueError: there is neither AVPPC_CACHE nor a home.
    """
    root = os.environ.get("AVPPC_CACHE")
    try:
        return Path(root) if root else Path.home() / ".cache" / "avppc"
    except RuntimeError as error:
        raise ValueError(f"{what} needs a folder for its copy, and there is no home: set AVPPC_CACHE to one") from error


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with name_in_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(path: Path) -> bytes:
    """A file's content; an OSError names the file."""
    with name_in_errors(path):
        return path.read_bytes()


@contextlib.contextmanager
def name_in_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Puts a file's name into an OSError that has none, as the errors of reading and writing an open file have not.

    Args:
        temporary: the name under which `path` is being written; errors that name it are changed to name `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        named = path if error.filename is None else None
        if temporary is not None and isinstance(error.filename, str):
            with contextlib.suppress(ValueError):  # something else
                named = path / Path(error.filename).relative_to(temporary)
        if named is None:
            raise
        raise OSError(error.errno, error.strerror, str(named)) from error
