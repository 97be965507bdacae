"""Files and directories that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_fcntl: Any = importlib.import_module("fcntl") if importlib.util.find_spec("fcntl") else None  # not on Windows


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or the next run after a crash, finds the old content or the new, never a part."""
    with replace_file(path) as temporary, temporary.open("xb") as file:
        file.write(data)


def check_writable(path: Path) -> None:
    """OSError, with the folder's name, unless a file can be written at `path`: before hours of work, not after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    trial = temporary_name(path)
    try:
        trial.touch()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    trial.unlink()


@contextlib.contextmanager
def sole_use(directory: Path) -> Iterator[None]:
    """Keeps a directory to this process while the block lasts; it is free again when the process ends, however it ends.

    Where the file system knows no locks (some network ones), nothing is kept.

    Raises:
        ValueError: another process uses it.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            if _fcntl is not None:
                _fcntl.flock(handle, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{directory} is in use: another process works there") from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A name to write a file under, which takes the place of `path` when the block ends; a failed block leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error  # which file does not fit on a full disk
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which appears at `path` when the block ends; if the block fails, nothing is left.

    Raises:
        FileExistsError: there is something at `path` already.
    """
    _refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _refuse_existing(path)  # a rename would replace an empty directory
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already: give another name, or remove it first")


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process takes."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; a NaN is an error, since JSON has none."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """The content of a JSON file; a NaN is an error, since JSON has none."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The JSON value in a file; ValueError that names the file where it is not JSON."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def parse_json(content: bytes | str) -> Any:
    """The JSON value in a content; a plain ValueError for whatever is wrong with it: bytes, syntax, depth, digits."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(str(error)) from error


def real_path(path: Path) -> Path:
    """Where a path leads, links followed; one that leads back to itself is left as it is.

    Path.resolve raises a RuntimeError there in Python 3.11 and 3.12.
    """
    return Path(os.path.realpath(path))


def sync_directory(directory: Path) -> None:
    """Makes renames in a directory last through a power cut, where the system can."""
    _sync(directory)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
