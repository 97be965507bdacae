"""Settings of `avppc probe`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from avppc.checks import MAX_SEED, MAX_THREADS, check_choice, check_integer, check_types
from avppc.clip import SPLITS, SplitName
from avppc.train.config import Precision

MeasureName = Literal["retrieval", "offset", "knn", "shortcut", "conflict", "visemes"]
MEASURES: tuple[MeasureName, ...] = get_args(MeasureName)


@dataclass(frozen=True)
class ProbeConfig:
    """Looks into a pretrained run: what it can tell apart, and by what."""

    run: Path
    """Directory of a finished pretraining run; the result goes to its file evaluation/probe.json."""
    data: Path | None = None
    """Packed shards; the run's own data by default."""
    split: SplitName = "test"
    """The split that is looked at; only "conflict" always takes training clips."""
    measures: tuple[MeasureName, ...] = MEASURES
    """"retrieval" of sound by picture and back; "offset", the right one within a frame; "knn", words by the nearest
    training clips; "shortcut", sub-tasks with candidates of one speaker; "conflict", cosines of the gradients of groups
    of sub-tasks; "visemes", evaluated words that are confused, by how far apart they look."""
    neighbours: int = 10
    """Training clips that vote in "knn"."""
    conflict_batches: int = 4
    """Batches over which "conflict" averages."""
    precision: Precision = "auto"
    """Arithmetic of the encoders."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"...; "auto" takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    seed: int = 0
    """Seed of the batches of "conflict"."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("split", self.split, SPLITS)
        if not self.measures:
            raise ValueError(f"measures must name at least one of {', '.join(MEASURES)}")
        for measure in self.measures:
            check_choice("measures", measure, MEASURES)
        check_integer("neighbours", self.neighbours, 1)
        check_integer("conflict_batches", self.conflict_batches, 1)
        check_choice("precision", self.precision, get_args(Precision))
        check_integer("threads", self.threads, 0, MAX_THREADS)
        check_integer("seed", self.seed, 0, MAX_SEED)
