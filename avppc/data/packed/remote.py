"""Packed data sets elsewhere: s3://, gs://, file:// and whatever else fsspec knows.

Training reads shards through a memory map, so those of a remote set are copied once to this machine, checked on the
way, and kept in AVPPC_CACHE (else ~/.cache/avppc). A copy is there whole or not at all, whatever interrupts it.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from avppc.data.packed.index import INDEX_NAME, SHARD_FOLDER, PackedIndex
from avppc.data.packed.shard import ShardRecord
from avppc.files import copies_folder, remove_files, replace_file, sole_use, write_atomically

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(?!/)(.*)|(file)://(/.*)|(memory)://(/.*)", re.DOTALL)
_BLOCK_BYTES = 1 << 22
_CONNECTIONS = 4
_MAX_INDEX_BYTES = 1 << 31


def remote_url(directory: str | os.PathLike[str]) -> str | None:
    """The address that a text or path means, "s3://bucket/set", say; None where it is a folder of this machine.

    A pathlib.Path of an address has lost one of its slashes: it is put back.
    """
    text = os.fspath(directory)
    match = _URL.fullmatch(text)
    if match is None:
        return None
    scheme, rest = next((match[n], match[n + 1]) for n in (1, 3, 5) if match[n] is not None)
    if scheme == "file" and not rest.startswith("/"):
        rest = f"/{rest}"
    return f"{scheme}://{rest.rstrip('/')}"


def cache_folder(url: str) -> Path:
    """Where copies of a remote set lie."""
    return (
        copies_folder(url)
        / f"{re.sub(r'[^A-Za-z0-9]+', '-', url)[-40:]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    )


def fetch_packed(url: str, splits: Iterable[str] | None = None) -> Path:
    """A folder of this machine with the index and the shards of a remote set.

    Args:
        splits: whose shards are wanted; None: all.

    Raises:
        ImportError: fsspec needs another package for such addresses, and says which.
        ValueError: there is no packed set, its index is damaged, or a shard is not what the index says.
        OSError: the connection or the disk fails; a half copy is removed.
    """
    files, root = _file_system(url)
    index_path = f"{root}/{INDEX_NAME}"
    if not files.exists(index_path):
        raise ValueError(f"{url} is not a packed data set: it has no {INDEX_NAME}")
    if files.info(index_path)["size"] > _MAX_INDEX_BYTES:
        raise ValueError(f"{url}/{INDEX_NAME} is larger than {_MAX_INDEX_BYTES} bytes")
    folder = cache_folder(url)
    shards = folder / SHARD_FOLDER
    shards.mkdir(parents=True, exist_ok=True)
    with sole_use(folder, wait=True):  # the processes of a machine copy each shard once: the others find it there
        write_atomically(folder / INDEX_NAME, files.cat_file(index_path))
        index = PackedIndex.read(folder)
        wanted = index.splits if splits is None else [split for split in splits if split in index.splits]
        records = [record for split in wanted for record in index.splits[split]]
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(lambda record: _fetch_shard(files, root, url, shards, record), records))
    return folder


def forget_copy(path: Path) -> bool:
    """Marks a file as a bad copy, so that fetch_packed copies it again; False where it is no copy of a remote shard."""
    mark = _mark(path)
    if not mark.is_file():
        return False
    remove_files(path.parent, [mark.name])
    return True


def upload_packed(directory: Path, url: str) -> int:
    """Copies a packed set of this machine to an address, its index last; returns how many shards were sent.

    Shards that the index there names with the same checksum, and that have their size, are not sent again.
    """
    files, root = _file_system(url)
    index = PackedIndex.read(directory)
    there = _checksums_there(files, url, root)
    files.makedirs(f"{root}/{SHARD_FOLDER}", exist_ok=True)
    todo = []
    for record in (record for records in index.splits.values() for record in records):
        target = f"{root}/{SHARD_FOLDER}/{record.file}"
        same = there.get(record.file) == record.sha256 and files.exists(target)
        if same and files.info(target)["size"] == record.bytes:
            continue
        todo.append((directory / SHARD_FOLDER / record.file, target))
    if todo and files.exists(f"{root}/{INDEX_NAME}"):
        files.rm_file(f"{root}/{INDEX_NAME}")  # it names shards that are about to be replaced
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(lambda pair: _put(files, *pair), todo))
    _put(files, directory / INDEX_NAME, f"{root}/{INDEX_NAME}")
    return len(todo)


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"{url} needs fsspec: pip install fsspec ({error})") from error
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:  # s3fs for s3://, gcsfs for gs://
        raise ImportError(f"{url} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{url} is no address that fsspec knows: {error}") from error
    return files, str(root).rstrip("/")


def _mark(path: Path) -> Path:
    """The file beside a shard's copy with the checksum that the copy had when it was made."""
    return path.with_name(f".{path.name}.sha256")


def _fetch_shard(files: Any, root: str, url: str, folder: Path, record: ShardRecord) -> None:
    path = folder / record.file
    mark = _mark(path)
    if path.is_file() and path.stat().st_size == record.bytes and mark.is_file() and mark.read_text() == record.sha256:
        return
    digest, size = hashlib.sha256(), 0
    with replace_file(path) as temporary:
        with files.open(f"{root}/{SHARD_FOLDER}/{record.file}", "rb") as source, temporary.open("xb") as target:
            while block := source.read(_BLOCK_BYTES):
                size += len(block)
                if size > record.bytes:
                    break
                digest.update(block)
                target.write(block)
        if size != record.bytes or digest.hexdigest() != record.sha256:
            raise ValueError(f"{url}/{SHARD_FOLDER}/{record.file} is damaged: it is not the file that the index names")
    write_atomically(mark, record.sha256.encode())


def _checksums_there(files: Any, url: str, root: str) -> dict[str, str]:
    """Checksum of each shard that the index at an address names; nothing where there is none yet.

    Raises:
        ValueError: something else has the index's name there; it is not ours to replace.
    """
    path = f"{root}/{INDEX_NAME}"
    if not files.exists(path):
        return {}
    try:
        index = PackedIndex.parse(files.cat_file(path))
    except ValueError as error:
        raise ValueError(
            f"{url}/{INDEX_NAME} is no index of a packed data set{error}; give another --upload, or remove it first"
        ) from error
    return {record.file: record.sha256 for records in index.splits.values() for record in records}


def _put(files: Any, path: Path, target: str) -> None:
    """Copies a file so that a reader finds it whole or not at all."""
    folder, name = target.rsplit("/", 1)
    partial = f"{folder}/.{name}.{secrets.token_hex(4)}.partial"
    try:
        files.put_file(str(path), partial)
        files.mv(partial, target)
    except BaseException:
        if files.exists(partial):
            files.rm_file(partial)
        raise
