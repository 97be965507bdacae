"""Settings of `avppc table`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from avppc.checks import MAX_THREADS, check_choice, check_integer, check_types
from avppc.evaluate.config import HEADS, QUICK_HEADS, EvaluateConfig, HeadName
from avppc.train.config import TASK_NAMES, PresetName

_LABELS = re.compile(r"all|[1-9]\d{0,8}")


@dataclass(frozen=True)
class TableConfig:
    """The table of the proxy tasks: pretrains what is missing, evaluates every cell, writes markdown, CSV and HTML.

    Each finished run and each finished cell is kept, so the same command goes on after an interruption.
    """

    data: Path
    """Directory of packed shards with train, val and test splits."""
    out: Path
    """Directory of the table: runs/ has the pretrained encoders, cells/ the measurements, table.* the pages."""
    preset: PresetName = "laptop"
    """Size of everything: "laptop" for two cores and about two hours, "gpu" for ResNet-34 at 88 pixels."""
    tasks: tuple[str, ...] = TASK_NAMES
    """The proxy tasks, one row each; a task may be followed by settings of pretraining, such as
    "av-permutative:objective.weighting=equal;batch_size=64"."""
    labels: str = "10"
    """Labelled clips a word, with commas between them: "all,10,1"."""
    seeds: int = 1
    """Pretraining seeds, 0 to seeds - 1, of each task."""
    heads: tuple[HeadName, ...] = QUICK_HEADS
    """Heads, a column each; the column "best" has the one with the best validation rate."""
    finetune: bool = True
    """Also fine-tunes the encoders, and trains one from scratch with the labels."""
    steps: int = 0
    """Pretraining steps; 0: the preset's."""
    draws: int = 5
    """Draws of the labelled clips for cells whose encoder is frozen."""
    training_draws: int = 3
    """Draws for cells that train the encoder."""
    most_clips: int = 20_000
    """The most labelled clips, repeated ones counted, that a training with encoder sees: many labels take fewer epochs
    (8 at least)."""
    only_finished: bool = False
    """Makes the pages from what is there: nothing is pretrained or measured, and what is missing stays empty."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"...; "auto" takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    workers: int = 0
    """Processes that train classifiers side by side on a CPU; 0: one a core, at most 8."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("preset", self.preset, get_args(PresetName))
        if not all(isinstance(entry, str) for entry in self.tasks):
            raise TypeError(f"tasks must hold texts, got {self.tasks!r}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must name at least one task, and none twice; got {self.tasks}")
        for entry in self.tasks:
            check_choice("tasks", entry.partition(":")[0], TASK_NAMES)
        if not self.heads:
            raise ValueError(f"heads must name at least one of {', '.join(HEADS)}")
        for head in self.heads:
            check_choice("heads", head, HEADS)
        counts = self.labels.split(",")
        if len(set(counts)) < len(counts) or not all(_LABELS.fullmatch(count) for count in counts):
            raise ValueError(f'labels must be different counts or "all", such as "all,10,1"; got {self.labels!r}')
        for name in ("seeds", "draws", "training_draws", "most_clips"):
            check_integer(name, getattr(self, name), 1)
        check_integer("steps", self.steps, 0)
        check_integer("threads", self.threads, 0, MAX_THREADS)
        check_integer("workers", self.workers, 0, 1024)

    @property
    def label_counts(self) -> tuple[int, ...]:
        """Labelled clips a word, in the order given; 0 is all."""
        return tuple(0 if count == "all" else int(count) for count in self.labels.split(","))

    def protocol(self, run: Path, labels_per_word: int, labelled_clips: int) -> EvaluateConfig:
        """How a cell with so many labels is evaluated."""
        epochs = min(40, max(8, self.most_clips // labelled_clips))
        wide = self.preset == "gpu"
        return EvaluateConfig(
            run,
            data=self.data,
            labels_per_word=labels_per_word,
            draws=self.draws,
            training_draws=self.training_draws,
            head_hidden=512 if wide else 64,
            gru_layers=2 if wide else 1,
            training_epochs=epochs,
            selection_epochs=max(4, epochs // 2),
            device=self.device,
            threads=self.threads,
            workers=self.workers,
        )
