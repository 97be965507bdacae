"""Settings of `avppc check-sync`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from avppc.checks import check_choice, check_integer, check_number, check_types
from avppc.clip import SPLITS, SplitName


@dataclass(frozen=True)
class CheckSyncConfig:
    """Estimates by how much the sound of a packed data set is shifted against its pictures."""

    data: Path
    """Folder (or address) of the packed data set."""
    run: Path | None = None
    """A pretrained run, if there is one: its own scores of sound and picture then tell the offset, too. It must have
    been trained on data that are in sync: a model takes for right what it was trained with."""
    out: Path = Path("sync")
    """Folder for histogram.png and sync.json."""
    split: SplitName = "train"
    """"train", "val" or "test"."""
    clips: int = 2000
    """The most clips to look at, evenly chosen; a few hundred are enough where people talk all the time."""
    max_offset_frames: int = 8
    """Largest shift to look for, in frames of 1/25 s; each clip must be longer than twice that. With a run, its shifts
    reach only as far as the clips have room beside the model's spans."""
    tolerance_frames: float = 2.0
    """Shifts up to this count as in sync: lips move a little before they are heard."""
    device: str = "auto"
    """Where the run's model computes: "auto", "cpu", "cuda"."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("split", self.split, SPLITS)
        check_integer("clips", self.clips, 2)
        check_integer("max_offset_frames", self.max_offset_frames, 1, 1000)
        check_number("tolerance_frames", self.tolerance_frames, 0)
