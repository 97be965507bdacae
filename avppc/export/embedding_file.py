"""Files of embeddings: .npz for numpy, without pickled objects, and .parquet for tables. They are whole or absent."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from avppc.files import replace_file

_ROWS_PER_GROUP = 16_384
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class EmbeddedClips:
    """Some clips with their features."""

    features: NDArray[np.float32]
    """[n, D] one vector a clip, or [n, T, D] one a frame."""
    ids: NDArray[np.int64]
    """[n] numbers of the clips in their data set."""
    sources: list[str]
    """[n] where each clip comes from."""
    split: str
    """"train", "val" or "test"."""
    labels: NDArray[np.int64]
    """[n] numbers of the words, -1 where not known."""
    words: list[str]
    """[n] the words, "" where not known."""
    speakers: NDArray[np.int64]
    """[n] numbers of the speakers, -1 where not known."""

    def __len__(self) -> int:
        return len(self.sources)


def require_parquet() -> None:
    """ImportError, naming the extra to install, if pyarrow is missing."""
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError(
            f"a .parquet file needs pyarrow ({error}): pip install 'avppc[parquet]', or write a .npz"
        ) from error


def write_embeddings(path: Path, batches: Iterable[EmbeddedClips], about: Mapping[str, Any]) -> int:
    """Writes clips into a .npz or .parquet file, as path's suffix says; nothing if no batch has a clip.

    Args:
        batches: consumed one after the other; features are never all in memory.
        about: what a reader must know of the features, as JSON values.

    Returns:
        The number of clips in the file.
    """
    if path.suffix == ".parquet":
        require_parquet()
    write = {".npz": _write_npz, ".parquet": _write_parquet}[path.suffix]
    try:
        with replace_file(path) as temporary:
            return write(temporary, batches, json.dumps(about))
    except _NoClipsError:
        return 0


class _NoClipsError(Exception):
    """No batch brought a clip."""


def _write_npz(path: Path, batches: Iterable[EmbeddedClips], about: str) -> int:
    shape: tuple[int, ...] = ()
    columns: dict[str, list[NDArray[Any]]] = {}
    # An array's shape stands before its values, and the number of clips is known when the last has come: they wait.
    with tempfile.TemporaryFile(dir=path.parent) as waiting:
        for batch in batches:
            shape = batch.features.shape[1:]
            waiting.write(np.ascontiguousarray(batch.features, np.float32).data)
            for name, values in _columns(batch).items():
                columns.setdefault(name, []).append(values)
        if not columns:
            raise _NoClipsError
        joined = {name: np.concatenate(parts) for name, parts in columns.items()}
        clips = len(joined["ids"])
        waiting.seek(0)
        with zipfile.ZipFile(path, "x") as archive:
            with archive.open("embeddings.npy", "w", force_zip64=True) as member:
                _write_header(member, (clips, *shape))
                shutil.copyfileobj(waiting, member, _COPY_BYTES)
            for name, values in {**joined, "about": np.array(about)}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)
    return clips


def _columns(batch: EmbeddedClips) -> dict[str, NDArray[Any]]:
    """The arrays of a .npz file beside the features; texts have a fixed width, which numpy reads without pickle."""
    return {
        "ids": batch.ids,
        "sources": np.array(batch.sources, np.str_),
        "splits": np.full(len(batch), batch.split),
        "labels": batch.labels,
        "words": np.array(batch.words, np.str_),
        "speakers": batch.speakers,
    }


def _write_header(member: IO[bytes], shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(member, header)


def _write_parquet(path: Path, batches: Iterable[EmbeddedClips], about: str) -> int:
    """One table row a clip, or one a frame with its number in the column "frame"; what is not known is null."""
    import pyarrow.parquet

    clips, writer = 0, None
    waiting: list[Any] = []  # tables of a batch each: a row group for each would be far too small
    with path.open("xb") as file, contextlib.ExitStack() as held:  # its errors are the system's, pyarrow's are not
        for batch in batches:
            waiting.append(_parquet_table(batch))
            clips += len(batch)
            if writer is None:
                schema = waiting[0].schema.with_metadata({"avppc": about})
                writer = held.enter_context(pyarrow.parquet.ParquetWriter(file, schema))
            if sum(map(len, waiting)) >= _ROWS_PER_GROUP:
                writer.write_table(pyarrow.concat_tables(waiting).cast(writer.schema))
                waiting.clear()
        if writer is None:
            raise _NoClipsError
        if waiting:
            writer.write_table(pyarrow.concat_tables(waiting).cast(writer.schema))
    return clips


def _parquet_table(batch: EmbeddedClips) -> Any:
    import pyarrow

    width = batch.features.shape[-1]
    frames = batch.features.shape[1] if batch.features.ndim == 3 else 1
    columns = {
        "id": pyarrow.array(np.repeat(batch.ids, frames)),
        "source": pyarrow.array(_repeat(batch.sources, frames), pyarrow.string()),
        "split": pyarrow.array([batch.split] * len(batch) * frames, pyarrow.string()),
        "label": _known(np.repeat(batch.labels, frames)),
        "word": pyarrow.array([word or None for word in _repeat(batch.words, frames)], pyarrow.string()),
        "speaker": _known(np.repeat(batch.speakers, frames)),
    }
    if batch.features.ndim == 3:
        columns["frame"] = pyarrow.array(np.tile(np.arange(frames, dtype=np.int32), len(batch)))
    values = pyarrow.array(np.ascontiguousarray(batch.features, np.float32).reshape(-1))
    columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(values, width)
    return pyarrow.table(columns)


def _repeat(values: list[str], times: int) -> list[str]:
    return [value for value in values for _ in range(times)]


def _known(numbers: NDArray[np.int64]) -> Any:
    """A Parquet column of numbers, null where they are -1, that is not known."""
    import pyarrow

    return pyarrow.array(numbers, mask=numbers < 0)
