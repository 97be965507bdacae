"""Where clips come from: packed shards, a folder of videos, or a data set of one's own.

Decoders are imported when they are needed: packed clips are read without them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from avppc.clip import SPLITS, Clip, ClipBatch
from avppc.data.config import CropSettings, LoaderName, VideoConfig, VideoDecoder
from avppc.data.packed.dataset import (
    Clips,
    PackedDataset,
    check_data_apart,
    data_sha256,
    local_folder,
    split_sha256,
    verify_shards,
)
from avppc.data.packed.index import CLAIM_NAME, INDEX_NAME, SHARD_FOLDER, PackedIndex, prepared_crop
from avppc.data.packed.remote import remote_url
from avppc.data.packed.shard import ClipShape
from avppc.processes import count_cores

if TYPE_CHECKING:
    from avppc.data.on_the_fly.listing import ClipList, Listing
    from avppc.data.packed.loader import EpochSampler, SampledBatches

_log = logging.getLogger(__name__)


class MapDataset(Protocol):
    """A map-style data set, as torch.utils.data.DataLoader takes it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Clip | tuple[Any, Any]:
        """A Clip, or (video, audio): uint8 [T, H, W] luma, 16 black to 235 white, at 25 frames a second, and int16
        [640 T] at 16 kHz, as tensors or arrays; all clips of one shape."""


@dataclass(frozen=True)
class DataSource:
    """A data set: a packed one, or a folder of videos.

    Which clips the videos give is found out once, when it is first needed (listing.py); this object keeps to that.
    """

    data: Path
    """Folder (or address) of packed shards, or folder of videos."""
    loader: LoaderName = "auto"
    """How clips are read; "auto": as they lie there."""
    videos: VideoConfig = field(default_factory=VideoConfig)
    """How clips are cut out of videos."""
    workers: int = 0
    """Processes that decode; 0: one for each core, which the processes of a run on this machine share."""
    kept: Mapping[str, str] | None = None
    """SHA-256 by path, of the videos on which a run was begun: its training sees no others. None: all."""

    @cached_property
    def is_packed(self) -> bool:
        """Whether `data` is a packed set, or is to be one; ValueError where it is one and `loader` decodes videos."""
        names = (INDEX_NAME, CLAIM_NAME)
        if remote_url(self.data) is None and self.data.is_file():
            raise ValueError(
                f"data must be a folder of packed shards or of videos, and {self.data} is a file; one video's clip is "
                "avppc.load_clip(path) in Python"
            )
        packed = remote_url(self.data) is not None or any((self.data / name).is_file() for name in names)
        if self.loader == "packed" or (self.loader == "auto" and (packed or not self.data.is_dir())):
            return True
        if packed:
            raise ValueError(
                f"loader {self.loader!r} decodes videos, and {self.data} is a packed data set: give the folder of its "
                "videos, or loader 'packed'"
            )
        return False

    @cached_property
    def listing(self) -> Listing:
        """The clips of the videos; errors as list_videos."""
        from avppc.data.on_the_fly.listing import list_videos, settings_for

        name = self.loader
        backend: VideoDecoder = "pyav" if name == "auto" or name == "packed" or name == "dali" else name
        return list_videos(settings_for(self.data, self.videos, backend, self.workers), self.kept)

    def check(self, out: Path) -> None:
        """ValueError where an output folder is not apart from the data, or settings of videos go with a packed set."""
        check_data_apart(out, self.data)
        self.check_settings()

    def check_settings(self) -> None:
        """ValueError where settings of videos go with a packed set."""
        if self.is_packed and self.videos != VideoConfig():
            raise ValueError(f"settings of videos are for a folder of videos, and {self.data} is a packed data set")

    def open(self, split: str, verify: bool = True, processes: int | None = None) -> Clips:
        """The clips of a split.

        Args:
            verify: whether the checksums of packed shards are computed first; videos are known by size and time.
            processes: how many decode videos, in place of `workers`.

        Raises:
            ValueError: there is no such data set or split, or it is damaged. Or as list_videos.
        """
        if self.is_packed:
            return PackedDataset(self.data, split, verify)
        from avppc.data.on_the_fly.videos import ListedDataset

        clips = self.listed(split)
        beside = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun's processes on this machine
        shared = self.workers or max(1, count_cores() // beside)
        return ListedDataset(clips, split, self.listing.found.words, processes or shared)

    def listed(self, split: str) -> ClipList:
        """The clips of a split of videos; ValueError where it has none."""
        clips = self.listing.split(split)
        if not clips.videos:
            available = ", ".join(repr(name) for name in self.splits())
            raise ValueError(f"split {split!r} of {self.data} has no clips; available: {available or 'none'}")
        return clips

    def verify(self, split: str, number: int, shares: int) -> None:
        """Checks the checksums of a share of a packed split's shards; ValueError names a damaged one."""
        if self.is_packed:
            folder = local_folder(self.data, [split])
            records = PackedIndex.read(folder).splits.get(split, ())
            verify_shards(folder / SHARD_FOLDER, records[number::shares])

    def splits(self) -> dict[str, int]:
        """How many clips each split has, of those that have any."""
        if self.is_packed:
            index = PackedIndex.read(local_folder(self.data, ()))
            counts = {split: sum(record.clips for record in index.splits.get(split, ())) for split in SPLITS}
        else:
            counts = {split: len(self.listing.split(split).numbers) for split in SPLITS}
        return {split: count for split, count in counts.items() if count}

    def split_sha256(self, split: str) -> str:
        """SHA-256 of which clips a split has, in which order; ValueError where it has none."""
        return split_sha256(self.data, split) if self.is_packed else self.listed(split).sha256

    def sha256(self) -> str:
        """SHA-256 of the whole set: the clips of all splits, and their words."""
        if self.is_packed:
            return data_sha256(self.data)
        lists = [self.listing.split(split) for split in SPLITS]
        content = [self.listing.found.words, *((clips.sha256, clips.labels()) for clips in lists)]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def crop(self) -> CropSettings:
        """How the clips were, or are, cut out of the pictures; the defaults where nothing tells.

        Raises:
            ValueError, OSError: as prepared_crop.
        """
        if not self.is_packed:
            names = [item.name for item in fields(CropSettings)]
            return CropSettings(**{name: getattr(self.videos, name) for name in names})
        return CropSettings() if remote_url(self.data) else prepared_crop(self.data)

    def record(self, split: str) -> tuple[dict[str, str] | None, list[tuple[str, str]]]:
        """SHA-256 by path of the videos that give a split's clips, None where these are packed; and what of the whole
        folder could not be used, and why."""
        if self.is_packed:
            return None, []
        clips = self.listing.split(split)
        pairs = zip(clips.videos, clips.entries, strict=True)
        return {video.path: entry["sha256"] for video, entry in pairs}, self.listing.refused()

    def stream(self, dataset: Clips, sampler: EpochSampler, device: torch.device) -> SampledBatches:
        """Batches for training, made ahead.

        Videos are decoded by DALI where `loader` asks for it, or is "auto", the device is a GPU, and DALI can decode
        all of them there; else in processes. Which decoder it is, and why, is logged.

        Raises:
            ImportError, ValueError: loader "dali", and DALI is not there, or cannot decode one of the videos.
        """
        from avppc.data.packed.loader import ClipLoader

        if isinstance(dataset, PackedDataset):
            return ClipLoader(dataset, sampler, device=device)
        from avppc.data.on_the_fly.videos import ListedDataset

        assert isinstance(dataset, ListedDataset)
        if self.loader == "dali" or (self.loader == "auto" and device.type == "cuda"):
            from avppc.data.on_the_fly.dali import DaliLoader, listed_problem, load_dali

            if self.loader == "dali":
                load_dali()
            against = listed_problem(dataset.clips, device)
            if against is None:
                _log.info("decoding with dali")
                device_id = (device.index or 0) if device.type == "cuda" else None
                clips, frames = dataset.video_clips(), dataset.shape.frames
                return DaliLoader(clips, sampler, device_id=device_id, num_frames=frames, workers=dataset.processes)
            if self.loader == "dali":
                raise ValueError(
                    f"loader 'dali' cannot decode the videos of {self.data}: {against}; give loader 'pyav'"
                )
            _log.info("decoding with pyav (not DALI: %s)", against)
        return ClipLoader(dataset, sampler, device=device)


class OwnClips:
    """A map-style data set of one's own in the place of DataSource and of the training split that it opens.

    Args:
        dataset: see MapDataset. Two attributes are optional: `speakers`, [n] integers of at least 0, by which batches
            may be grouped, and `sha256`, a text that is another one for other clips; without it, the first, the middle
            and the last clip stand for all.

    Raises:
        ValueError: it is empty, or an item is no clip.
    """

    split = "train"
    words: tuple[str, ...] = ()
    is_packed = True

    def __init__(self, dataset: MapDataset) -> None:
        count = len(dataset)
        if count < 1:
            raise ValueError("dataset must hold at least one clip, got 0")
        self._dataset = dataset
        self.shape = ClipShape(*self._clip(0).video.shape)
        self.sources = tuple(f"clip {number}" for number in range(count))
        self.clip_ids = torch.arange(count)
        self.labels = torch.full((count,), -1)
        self.speakers = torch.as_tensor(getattr(dataset, "speakers", self.labels)).long()
        if len(self.speakers) != count:
            raise ValueError(f"dataset.speakers must have {count} entries like the data set, got {len(self.speakers)}")

    def __len__(self) -> int:
        return len(self.sources)

    @cached_property
    def sha256(self) -> str:
        """What tells these clips from others: of the data set, or of three of its clips and their number."""
        known = getattr(self._dataset, "sha256", None)
        digest = hashlib.sha256(str(known or len(self)).encode())
        for number in () if known else (0, len(self) // 2, len(self) - 1):
            clip = self._clip(number)
            digest.update(clip.video.numpy().tobytes() + clip.audio.numpy().tobytes())
        return digest.hexdigest()

    def batch(self, indices: torch.Tensor, *, pin_memory: bool = False) -> ClipBatch:
        """The clips of these numbers, in that order."""
        batch = ClipBatch.stack([self._clip(number) for number in indices.tolist()])
        return batch.pin_memory() if pin_memory else batch

    def _clip(self, number: int) -> Clip:
        item = self._dataset[number]
        if isinstance(item, Clip):
            video, audio = item.video, item.audio
        elif isinstance(item, (tuple, list)) and len(item) == 2:
            video, audio = (torch.as_tensor(part) for part in item)
        else:
            raise TypeError(f"dataset[{number}] must be a Clip or (video, audio), got {type(item).__name__}")
        try:
            return Clip(video, audio, clip_id=number)
        except (TypeError, ValueError) as error:
            raise type(error)(f"dataset[{number}]: {error}") from error

    def check(self, out: Path) -> None:
        """Nothing lies in a folder that could be the output's."""

    def verify(self, split: str, number: int, shares: int) -> None:
        """There are no checksums."""

    def open(self, split: str, verify: bool = True) -> OwnClips:
        """This object."""
        return self

    def record(self, split: str) -> tuple[None, list[tuple[str, str]]]:
        """As of packed clips."""
        return None, []

    def stream(self, dataset: Clips, sampler: EpochSampler, device: torch.device) -> SampledBatches:
        """Batches for training, made ahead by a thread."""
        from avppc.data.packed.loader import ClipLoader

        return ClipLoader(dataset, sampler, device=device)

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...
