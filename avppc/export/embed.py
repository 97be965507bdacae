"""`avppc embed`: the encoder's features of every clip of a data set, in one file, whole or absent.

It is an .npz for numpy, without pickled objects, or a .parquet for tables.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.text import Text

from avppc._version import __version__
from avppc.clip import CROP_SIZE, SPLITS, VIDEO_FPS, ClipBatch
from avppc.data.augment import crop_video
from avppc.data.config import VideoConfig
from avppc.data.packed.dataset import open_shard
from avppc.data.packed.index import PackedIndex
from avppc.data.packed.remote import fetch_packed, remote_url
from avppc.data.source import DataSource
from avppc.export.config import EmbedConfig
from avppc.files import check_writable, remove_files, replace_file, sha256_of, write_atomically
from avppc.models.encoder_file import find_encoder, load_encoder
from avppc.models.encoders import VideoEncoder
from avppc.printing import Console, ProgressBar, as_line
from avppc.settings import config_to_dict
from avppc.train.hardware import autocast, resolve_device, set_up_cpu, use_bf16
from avppc.train.run_folder import read_run_config, videos_of

T = TypeVar("T")
_ROWS_PER_GROUP = 16_384
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class SkippedClip:
    """A clip that could not be embedded, and why."""

    split: str
    source: str
    reason: str


def execute(config: EmbedConfig) -> int:
    """`avppc embed`: writes the file, says how many clips are in it and which are not; returns 0."""
    clips, skipped = embed(config)
    console = Console(stderr=True, soft_wrap=True)
    for reason, count in Counter(clip.reason for clip in skipped).items():
        console.print(Text.assemble((f"skipped {count} clips:", "yellow"), " ", as_line(reason)))
    if skipped:
        console.print(f"they are listed in {skipped_list(config.out)}")
    console.print(f"features of {clips} clips written to {config.out}")
    return 0


def skipped_list(out: Path) -> Path:
    """The file that lists the clips that are not in `out`, one JSON object a line; absent where there are none."""
    return out.with_name(f"{out.name}.skipped.jsonl")


def embed(config: EmbedConfig) -> tuple[int, list[SkippedClip]]:
    """Writes the features of all clips to config.out, whole or not at all.

    Returns:
        The number of clips in the file, and the clips that could not be embedded.

    Raises:
        FileNotFoundError, ValueError: the encoder or the data set is missing or damaged as a whole, or no clip could be
            embedded.
        ImportError: a .parquet file needs pyarrow.
    """
    if config.out.suffix == ".parquet":
        require_parquet()
    set_up_cpu(config.threads)
    check_writable(config.out)
    encoder = load_encoder(config.encoder).to(resolve_device(config.device))
    total, items = _open_data(config, encoder)
    skipped: list[SkippedClip] = []
    with ProgressBar("embed", total, "clips") as progress:
        batches = _embed_all(config, items, encoder, skipped, progress.advance)
        clips = write_embeddings(config.out, batches, _about(config, encoder))
    lines = "".join(json.dumps(asdict(clip), ensure_ascii=False) + "\n" for clip in skipped)
    if skipped:
        write_atomically(skipped_list(config.out), lines.encode())
    else:
        remove_files(config.out.parent, [skipped_list(config.out).name])
    if not clips:
        reasons = f"; the reasons are in {skipped_list(config.out)}" if skipped else ": it has none"
        raise ValueError(f"no clip of {config.data} could be embedded{reasons}")
    return clips, skipped


def _open_data(config: EmbedConfig, encoder: VideoEncoder) -> tuple[int, _Items]:
    """How many clips there are, and the clips; ValueError where the data do not fit settings or encoder."""
    source, crop = _source(config), encoder.config.crop_pixels
    if source.is_packed:
        directory, index = _open_index(config)
        counts = {split: sum(record.clips for record in records) for split, records in index.splits.items()}
        side = min(index.shape.height, index.shape.width)
    else:
        counts, side = source.splits(), CROP_SIZE
        _ = [source.listed(split) for split in config.splits]  # refuses one without clips
    if side < crop:
        raise ValueError(f"the encoder sees {crop} x {crop} pixels, but the clips of {config.data} have {side} a side")
    splits = [split for split in config.splits or SPLITS if split in counts]
    items = _load(config, directory, index, splits) if source.is_packed else _decode(config, source, splits)
    return sum(counts[split] for split in splits), items


def _source(config: EmbedConfig) -> DataSource:
    """Where the clips are; videos are cut as those of the run whose encoder it is, unless the settings say how."""
    source = DataSource(config.data, config.loader, config.videos, config.workers)
    source.check_settings()
    if config.videos != VideoConfig() or source.is_packed or videos_of(config.encoder) is None:
        return source
    return replace(source, videos=read_run_config(config.encoder).videos)


def _open_index(config: EmbedConfig) -> tuple[Path, PackedIndex]:
    """The data set's folder on this machine and its index; ValueError where it lacks a split that is asked for."""
    url = remote_url(config.data)
    directory = config.data if url is None else fetch_packed(url, config.splits or None)
    index = PackedIndex.read(directory)
    for split in config.splits:
        index.shards_of(split, config.data)  # refuses one without clips
    return directory, index


@dataclass(frozen=True)
class _LoadedClips:
    """A batch, and for each of its clips the video it comes from and its word, "" if it has none."""

    split: str
    batch: ClipBatch
    sources: list[str]
    words: list[str]


_Items = Iterator[_LoadedClips | list[SkippedClip]]


def _load(config: EmbedConfig, directory: Path, index: PackedIndex, splits: Sequence[str]) -> _Items:
    """The clips shard by shard: batches of a sound shard, and one list of all clips of a damaged one."""
    for split in splits:
        for record in index.splits[split]:
            try:
                dataset = open_shard(directory, index, split, record, config.verify_data)
            except (ValueError, OSError) as error:
                yield [SkippedClip(split, source, str(error)) for source in record.sources]
                continue
            with dataset:
                for clips in torch.arange(len(dataset)).split(config.batch_size):
                    batch = dataset.batch(clips)
                    words = [dataset.words[label] if label >= 0 else "" for label in batch.labels.tolist()]
                    yield _LoadedClips(split, batch, [dataset.sources[clip] for clip in clips.tolist()], words)


def _decode(config: EmbedConfig, source: DataSource, splits: Sequence[str]) -> _Items:
    """The clips of videos: batches of those that can be decoded, and lists of the others."""
    from avppc.data.on_the_fly.videos import ListedDataset  # only here: it imports the decoder

    for split in splits:
        with source.open(split) as dataset:
            assert isinstance(dataset, ListedDataset)
            for clips in torch.arange(len(dataset)).split(config.batch_size):
                batch, rows, failed = dataset.batch_of_good(clips)
                if failed:
                    yield [SkippedClip(split, dataset.sources[row], reason) for row, reason in failed.items()]
                if batch is not None:
                    words = [dataset.words[label] if label >= 0 else "" for label in batch.labels.tolist()]
                    yield _LoadedClips(split, batch, [dataset.sources[row] for row in rows], words)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; each is made by a thread while the one before it is used."""
    end = object()
    with ThreadPoolExecutor(1, "avppc-embed") as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield cast("T", item)


def _embed_all(
    config: EmbedConfig,
    items: _Items,
    encoder: VideoEncoder,
    skipped: list[SkippedClip],
    advance: Callable[[int], None],
) -> Iterator[EmbeddedClips]:
    """The features of the batches. Clips without finite features are added to `skipped`, as are those in `items`.

    Args:
        advance: called with the number of clips that are done since the last call.
    """
    device = next(encoder.parameters()).device
    bf16 = use_bf16(config.precision, device)
    for item in _ahead(items):
        if isinstance(item, list):
            skipped += item
            advance(len(item))
            continue
        with torch.inference_mode(), autocast(device, bf16):
            crops = crop_video(item.batch.video.to(device), encoder.config.crop_pixels, encoder.config.input_pixels)
            features = encoder(crops).float()  # [N, T, D]
        features = (features if config.per == "frame" else features.mean(1)).cpu()
        finite = features.flatten(1).isfinite().all(1)
        kept = finite.nonzero().flatten().tolist()
        skipped += [
            SkippedClip(item.split, item.sources[place], "its features are not finite")
            for place in (~finite).nonzero().flatten().tolist()
        ]
        advance(len(item.batch))
        if kept:
            yield EmbeddedClips(
                features=features[finite].numpy(),
                ids=item.batch.clip_ids[finite].numpy(),
                sources=[item.sources[place] for place in kept],
                split=item.split,
                labels=item.batch.labels[finite].numpy(),
                words=[item.words[place] for place in kept],
                speakers=item.batch.speakers[finite].numpy(),
            )


def _about(config: EmbedConfig, encoder: VideoEncoder) -> dict[str, Any]:
    """What a reader of the file must know of the features, as JSON values."""
    return {
        "avppc": __version__,
        "encoder": config_to_dict(encoder.config),
        "encoder_sha256": sha256_of(find_encoder(config.encoder)),
        "per": config.per,
        "fps": VIDEO_FPS,
    }


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
