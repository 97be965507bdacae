"""Settings of `avppc index` and `avppc prepare`: what lies in a folder of videos, and how it becomes packed shards."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from avppc.checks import check_choice, check_integer, check_number, check_types
from avppc.clip import CLIP_FRAMES, LRW_COLUMNS, LRW_ROWS
from avppc.processes_cores import count_cores

Layout = Literal["auto", "words", "tree"]
CropName = Literal["auto", "window", "centre", "box", "mesh", "cascade"]
TRACKED_CROPS = ("mesh", "cascade")
# Number and count of the processes of a launcher, and a variable that is only there where it started this one.
_LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"))


class _SharedWork:
    """Settings of work that several processes, or machines, share."""

    workers: int
    shard: str

    @property
    def processes(self) -> int:
        """Worker processes to use."""
        return self.workers or count_cores()

    def share(self) -> tuple[int, int]:
        """The number of this share of the work, from 0, and the number of all shares."""
        text, origin = self.shard, "shard"
        if (launcher := self._launcher()) is not None:
            text, origin = "/".join(os.environ[name] for name in launcher[:2]), "/".join(launcher[:2])
        if not text:
            return 0, 1
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(f'{origin} must be "i/n" with i from 0 to n - 1, got {text!r}')
        return int(match[1]), int(match[2])

    def share_reason(self) -> str | None:
        """Why this is but a share of the work, where nobody gave `shard`; None where somebody did, or it is all."""
        launcher = self._launcher()
        if launcher is None or self.share()[1] == 1:
            return None
        number, count = launcher[:2]
        share = "share {} of {}".format(*self.share())
        return f"this was {share}, as {number} and {count} in the environment say; --shard 0/1 does all"

    def is_alone(self) -> bool:
        """Whether the environment asks for a share but no launcher has started this process: who does the others?"""
        launcher = self._launcher()
        return launcher is not None and self.share()[1] > 1 and launcher[2] not in os.environ

    def _launcher(self) -> tuple[str, str, str] | None:
        """The variables that say which share this is; None where `shard` does, or nothing."""
        if self.shard:
            return None
        return next((names for names in _LAUNCHERS if names[0] in os.environ and names[1] in os.environ), None)


@dataclass(frozen=True)
class IndexConfig(_SharedWork):
    """Lists what a folder of videos holds, without decoding: length, rates, streams, and what is wrong."""

    data: Path
    """Folder of the videos, as for `avppc prepare`."""
    out: Path | None = None
    """Manifest to write, NAME.jsonl, a JSON object a line; None: DATA/manifest.jsonl. Speakers and boxes that it has
    already are kept, and files that have not changed since are not read again."""
    paths: Path | None = None
    """A list of the videos to take: a text file with one path below DATA a line, or a manifest. None: all."""
    frames: int = CLIP_FRAMES
    """Frames, of 1/25 s, that a clip needs; shorter videos are listed as a problem."""
    workers: int = 0
    """Processes; 0: one for each core."""
    shard: str = ""
    """"i/n" (0/4 to 3/4, say): read the i-th of n shares of the videos, each on a machine of its own with the same OUT;
    the one that ends last writes the manifest. Empty: RANK / WORLD_SIZE or SLURM_PROCID / SLURM_NTASKS where the
    environment has them, else everything."""
    timeout_seconds: float = 120.0
    """A video that twice cannot be read within this time is listed as a problem, and read again by the next command. It
    is the reader's own processor time, or its waiting: a machine that sleeps meanwhile does no harm."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.out is not None and self.out.suffix != ".jsonl":  # a video or a list of them, say
            raise ValueError(f"out must end in .jsonl, got {self.out}")
        check_integer("frames", self.frames, 1, 10_000)
        check_integer("workers", self.workers, 0, 1024)
        check_number("timeout_seconds", self.timeout_seconds, 1.0)
        self.share()


@dataclass(frozen=True)
class PrepareConfig(_SharedWork):
    """Decodes videos once into packed shards; after an interruption the same command goes on where it stopped."""

    data: Path
    """Folder of the videos: DATA/WORD/{train,val,test}/*.mp4 as in LRW (labelled), DATA/_UNLABELED/** or any other tree
    of videos (without labels; folders named train, val or test set the split). A DATA/manifest.jsonl may give the
    speaker or the mouth's box of each; videos that `avppc index` found to be of no use are left out, and those
    that have changed since are refused."""
    out: Path
    """Folder of the packed data set."""
    paths: Path | None = None
    """A list of the videos to take: a text file with one path below DATA a line, or a manifest as `avppc index` writes
    it. None: all below DATA."""
    layout: Layout = "auto"
    """Which folders are words. "words": all that hold videos as DATA/WORD/{train,val,test}/*; "tree": none; "auto": as
    "words", but no folder with videos further down, and no single one unless its files are named WORD_* after it."""
    frames: int = CLIP_FRAMES
    """Frames of a clip, of 1/25 s each."""
    stride: int = CLIP_FRAMES
    """Unlabelled videos are cut into clips that start this many frames apart; 0: only the clip at the start. A labelled
    video gives one clip, its first frames."""
    crop: CropName = "auto"
    """What is stored as 96 x 96 pixels. "window": crop_rows and crop_columns; "centre": the middle square; "auto": the
    window for 256 x 256 video (LRW's), the middle square for all other; "box": each video's own box, from the manifest;
    "mesh" and "cascade": the mouth, found and followed by mediapipe's face mesh or OpenCV's cascade (extras)."""
    crop_rows: tuple[int, int] = LRW_ROWS
    """First row of the window and the one after its last, pixels of the picture as it is shown."""
    crop_columns: tuple[int, int] = LRW_COLUMNS
    """First column of the window and the one after its last, pixels of the picture as it is shown."""
    centre_fraction: float = 1.0
    """Side of the middle square as a share of the frame's shorter side."""
    clips_per_shard: int = 512
    """The most clips of a shard; each process holds one shard in memory (0.3 MB a clip of 29 frames)."""
    workers: int = 0
    """Processes; 0: one for each core."""
    shard: str = ""
    """"i/n" (0/4 to 3/4, say): do the i-th of n shares of the work, each on a machine of its own with the same OUT; the
    one that ends last writes the index. Empty: RANK / WORLD_SIZE or SLURM_PROCID / SLURM_NTASKS where the environment
    has them, else everything."""
    upload: str = ""
    """Where to copy the finished set, if anywhere: an address that fsspec knows, such as s3://BUCKET/SET.
    Training takes the address for its --data."""
    timeout_seconds: float = 120.0
    """A video that twice gives no clip for so long is refused, and tried again by the next command. It is the decoder's
    own processor time, or its waiting: a machine that sleeps meanwhile does no harm."""
    overwrite: bool = False
    """Replace a data set in OUT that was made from another folder or with other settings; otherwise it is refused."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("layout", self.layout, get_args(Layout))
        check_integer("frames", self.frames, 1, 10_000)
        check_integer("stride", self.stride, 0)
        check_choice("crop", self.crop, get_args(CropName))
        for name in ("crop_rows", "crop_columns"):
            pair = getattr(self, name)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ValueError(f"{name} must be two numbers, got {pair!r}")
            check_integer(f"{name}, first", pair[0], 0)
            check_integer(f"{name}, second", pair[1], pair[0] + 1)
        check_number("centre_fraction", self.centre_fraction, 0.01, 1.0)
        check_integer("clips_per_shard", self.clips_per_shard, 1, 1_000_000)
        check_integer("workers", self.workers, 0, 1024)
        check_number("timeout_seconds", self.timeout_seconds, 1.0)
        self.share()
