"""`avppc embed`: the encoder's features of every clip of a packed data set, in one file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from rich.text import Text

from avppc._version import __version__
from avppc.clip import SPLITS, VIDEO_FPS, ClipBatch
from avppc.data.augment import crop_video
from avppc.data.packed.dataset import open_shard
from avppc.data.packed.index import PackedIndex
from avppc.data.packed.remote import fetch_packed, remote_url
from avppc.export.config import EmbedConfig
from avppc.export.embedding_file import EmbeddedClips, require_parquet, write_embeddings
from avppc.files import check_writable, remove_files, sha256_of, write_atomically
from avppc.models.encoder_file import find_encoder, load_encoder
from avppc.models.video import VideoEncoder
from avppc.printing import Console, ProgressBar, as_line
from avppc.settings import config_to_dict
from avppc.train.hardware import autocast, resolve_device, set_up_cpu, use_bf16

T = TypeVar("T")


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
    directory, index = _open_index(config, encoder)
    skipped: list[SkippedClip] = []
    total = sum(record.clips for split in _splits(config, index) for record in index.splits[split])
    with ProgressBar("embed", total, "clips") as progress:
        batches = _embed_all(config, _load(config, directory, index), encoder, skipped, progress.advance)
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


def _open_index(config: EmbedConfig, encoder: VideoEncoder) -> tuple[Path, PackedIndex]:
    """The data set's folder on this machine and its index; ValueError where it does not fit settings or encoder."""
    url = remote_url(config.data)
    directory = config.data if url is None else fetch_packed(url, config.splits or None)
    index = PackedIndex.read(directory)
    for split in config.splits:
        index.shards_of(split, config.data)  # refuses one without clips
    crop, side = encoder.config.crop_pixels, min(index.shape.height, index.shape.width)
    if side < crop:
        raise ValueError(f"the encoder sees {crop} x {crop} pixels, but the clips of {config.data} have {side} a side")
    return directory, index


def _splits(config: EmbedConfig, index: PackedIndex) -> list[str]:
    """The splits to embed."""
    return [split for split in config.splits or SPLITS if split in index.splits]


@dataclass(frozen=True)
class _LoadedClips:
    """A batch, and for each of its clips the video it comes from and its word, "" if it has none."""

    split: str
    batch: ClipBatch
    sources: list[str]
    words: list[str]


def _load(config: EmbedConfig, directory: Path, index: PackedIndex) -> Iterator[_LoadedClips | list[SkippedClip]]:
    """The clips shard by shard: batches of a sound shard, and one list of all clips of a damaged one."""
    for split in _splits(config, index):
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
    items: Iterator[_LoadedClips | list[SkippedClip]],
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
