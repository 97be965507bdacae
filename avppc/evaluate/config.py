"""Settings of `avppc evaluate`, `table`, `diagnose`, `check-sync` and `report`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from avppc.checks import (
    MAX_SEED,
    MAX_THREADS,
    check_choice,
    check_choices,
    check_integer,
    check_number,
    check_types,
    read_share,
)
from avppc.clip import SplitName
from avppc.data.config import ReaderName
from avppc.processes import count_cores
from avppc.tasks.config import TASK_NAMES
from avppc.train.config import Precision, PresetName

__all__ = [
    "CheckSyncConfig",
    "DiagnoseConfig",
    "EvaluateConfig",
    "ProbeConfig",
    "RecipeConfig",
    "ReportConfig",
    "TableConfig",
]

RowName = Literal["random", "supervised", "frozen", "finetuned", "ceiling"]
HeadName = Literal["gru", "tconv", "bins", "mstcn"]
EvaluatePreset = Literal["few-labels", "lrw"]
ROWS: tuple[RowName, ...] = get_args(RowName)
HEADS: tuple[HeadName, ...] = get_args(HeadName)
QUICK_HEADS: tuple[HeadName, ...] = ("gru", "tconv", "bins")

MeasureName = Literal["retrieval", "offset", "knn", "shortcut", "conflict", "visemes"]
MEASURES: tuple[MeasureName, ...] = get_args(MeasureName)

_LABELS = re.compile(r"all|[1-9]\d{0,8}")


@dataclass(frozen=True)
class RecipeConfig:
    """How classifiers are trained, whatever their size."""

    schedule: Literal["one-cycle", "cosine"] = "one-cycle"
    """Learning rate: "one-cycle", up over a fifth of the steps and down again; "cosine", down along half a cosine."""
    weight_decay: float = 0.05
    """Decoupled weight decay."""
    label_smoothing: float = 0.1
    """Share of the probability that is spread over all words."""
    clip_norm: float = 5.0
    """Largest norm of the whole gradient."""
    mixup: float = 0.0
    """Parameter of the beta distribution by which clips and labels are mixed in pairs; 0: no mixing."""
    time_mask_frames: int = 0
    """Up to this many consecutive frames of a training clip are replaced by its mean frame, where pictures are seen."""

    def __post_init__(self) -> None:
        check_types(self)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("label_smoothing", self.label_smoothing, 0, 1)
        check_number("clip_norm", self.clip_norm, 0)
        check_number("mixup", self.mixup, 0)
        check_integer("time_mask_frames", self.time_mask_frames, 0)


@dataclass(frozen=True)
class EvaluateConfig:
    """Lip reading: word classification rates with the encoder frozen and fine-tuned."""

    run: Path
    """Directory of a finished pretraining run; results go to its folder evaluation/."""
    preset: EvaluatePreset = "few-labels"
    """Defaults of all other settings: "few-labels" for minutes on a CPU, "lrw" for all labels of LRW on a GPU."""
    data: Path | None = None
    """Packed shards or videos with train, val and test splits; the run's own by default."""
    loader: ReaderName = "auto"
    """"packed" shards, or videos by "pyav" or "torchcodec"; "auto": as they lie there, videos as the run's."""
    results: Path | None = None
    """Directory whose folder evaluation/ gets the results; the run's by default."""
    verify_data: bool = True
    """Checks the shards' checksums first."""
    trajectories: Path | None = None
    """Data set as `avppc synth` wrote it; adds the row "ceiling": words from the true mouth movement."""
    rows: tuple[RowName, ...] = ("random", "supervised", "frozen", "finetuned")
    """"random": frozen encoder of random weights; "supervised": trained from scratch on the labels; "frozen" and
    "finetuned": the run's encoder; "ceiling": the true mouth trajectories instead of an encoder."""
    labels_per_word: int = 10
    """Labelled training clips a word; 0 takes all."""
    draws: int = 5
    """Draws of the labelled clips, for the rows whose encoder is frozen."""
    training_draws: int = 3
    """Draws for the rows that train the encoder."""
    selection_draws: int = 3
    """Draws whose mean chooses head and rate of the rows whose encoder is frozen; the others choose by the first."""
    heads: tuple[HeadName, ...] = QUICK_HEADS
    """Heads that are tried: "gru", "tconv" (temporal convolution), "bins" (linear over seven bins of time), "mstcn"
    (temporal convolutions of several lengths side by side)."""
    head_hidden: int = 64
    """Width of the heads; for LRW with all labels 512 is usual."""
    gru_layers: int = 1
    """Layers of the GRU head; for LRW with all labels 2 is usual."""
    head_learning_rates: tuple[float, ...] = (3e-3, 1e-2)
    """Learning rates of the head that are tried where the encoder is frozen; elsewhere the smallest is used."""
    scratch_learning_rates: tuple[float, ...] = (3e-3, 6e-3)
    """Learning rates of the encoder that are tried in the row "supervised"."""
    finetune_learning_rates: tuple[float, ...] = (3e-4, 1e-3)
    """Learning rates of the encoder that are tried in the row "finetuned"."""
    epochs: int = 50
    """Epochs over the labelled clips where the encoder is frozen."""
    training_epochs: int = 40
    """Epochs where it is trained."""
    selection_epochs: int = 20
    """The most epochs of the trials that choose head and rate, where the encoder is trained or a frozen encoder's
    features are larger than feature_gigabytes."""
    batch_size: int = 32
    """Labelled clips a step."""
    validate_every: int = 5
    """Epochs between two looks at the validation clips, in the second half of the epochs; the best epoch is kept."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    """Schedule, decay and variation of the training clips."""
    feature_gigabytes: float = 4.0
    """A row's frozen features are kept up to this size, in four views of each labelled clip: in memory, or in a
    temporary file that all processes map. Larger ones are computed anew for each batch, from clips varied at random;
    the row's trials then end after selection_epochs."""
    precision: Precision = "auto"
    """Arithmetic of the encoder."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"...; "auto" takes a GPU where there is one."""
    threads: int = 0
    """CPU threads in all; 0 leaves torch's choice."""
    workers: int = 0
    """Processes that train classifiers side by side on a CPU and share its threads; 0: one a core, at most 8."""
    seed: int = 0
    """Seed of the label draws, heads and order."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choices("rows", self.rows, ROWS)
        check_choices("heads", self.heads, HEADS)
        for name in ("head_learning_rates", "scratch_learning_rates", "finetune_learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one rate")
            for rate in getattr(self, name):
                check_number(name, rate, 0)
        check_number("feature_gigabytes", self.feature_gigabytes, 0)
        check_integer("labels_per_word", self.labels_per_word, 0)
        for name in (
            "draws",
            "training_draws",
            "selection_draws",
            "epochs",
            "training_epochs",
            "selection_epochs",
            "validate_every",
        ):
            check_integer(name, getattr(self, name), 1)
        check_integer("head_hidden", self.head_hidden, 4)
        check_integer("gru_layers", self.gru_layers, 1)
        check_integer("batch_size", self.batch_size, 2)
        check_integer("threads", self.threads, 0, MAX_THREADS)
        check_integer("workers", self.workers, 0, 1024)
        check_integer("seed", self.seed, 0, MAX_SEED)

    @classmethod
    def from_preset(cls, name: EvaluatePreset, run: Path) -> EvaluateConfig:
        """The settings for few labels on a CPU ("few-labels"), or for all labels of LRW on a GPU ("lrw")."""
        check_choice("preset", name, get_args(EvaluatePreset))
        if name == "few-labels":
            return cls(run)
        return cls(
            run,
            preset="lrw",
            labels_per_word=0,
            heads=("gru", "tconv", "mstcn"),
            head_hidden=512,
            gru_layers=2,
            head_learning_rates=(3e-4,),
            scratch_learning_rates=(3e-4,),
            finetune_learning_rates=(3e-4,),
            epochs=80,
            training_epochs=80,
            selection_epochs=10,
            validate_every=1,
            recipe=RecipeConfig("cosine", weight_decay=1e-2, label_smoothing=0.0, mixup=0.4, time_mask_frames=15),
        )

    @property
    def worker_processes(self) -> int:
        """Processes to use on a CPU."""
        return self.workers or min(count_cores(), 8)


@dataclass(frozen=True)
class DiagnoseConfig:
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
        check_choices("measures", self.measures, MEASURES)
        check_integer("neighbours", self.neighbours, 1)
        check_integer("conflict_batches", self.conflict_batches, 1)
        check_integer("threads", self.threads, 0, MAX_THREADS)
        check_integer("seed", self.seed, 0, MAX_SEED)


ProbeConfig = DiagnoseConfig
"""Its former name."""


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
        check_integer("clips", self.clips, 2)
        check_integer("max_offset_frames", self.max_offset_frames, 1, 1000)
        check_number("tolerance_frames", self.tolerance_frames, 0)


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
    batch_size: int = 0
    """Clips of one loss in pretraining; 0: the preset's, which must not be more than the training clips."""
    draws: int = 5
    """Draws of the labelled clips for cells whose encoder is frozen."""
    training_draws: int = 3
    """Draws for cells that train the encoder."""
    most_clips: int = 20_000
    """The most labelled clips, repeated ones counted, that a training with encoder sees: many labels take fewer epochs
    (8 at least)."""
    only_finished: bool = False
    """Makes the pages from what is there: nothing is pretrained or measured, and what is missing stays empty."""
    part: str = ""
    """"i/n" (0/4 to 3/4, say): pretrain and measure the i-th of n shares, each on a machine of its own with the same
    OUT. The one that ends last writes the whole table, and --only-finished what there is. Empty: everything but what
    another process on this machine is at, which is waited for."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"...; "auto" takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    workers: int = 0
    """Processes that train classifiers side by side on a CPU; 0: one a core, at most 8."""

    def __post_init__(self) -> None:
        check_types(self)
        if not all(isinstance(entry, str) for entry in self.tasks):
            raise TypeError(f"tasks must hold texts, got {self.tasks!r}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must name at least one task, and none twice; got {self.tasks}")
        for entry in self.tasks:
            check_choice("tasks", entry.partition(":")[0], TASK_NAMES)
        check_choices("heads", self.heads, HEADS)
        counts = self.labels.split(",")
        if len(set(counts)) < len(counts) or not all(_LABELS.fullmatch(count) for count in counts):
            raise ValueError(f'labels must be different counts or "all", such as "all,10,1"; got {self.labels!r}')
        for name in ("seeds", "draws", "training_draws", "most_clips"):
            check_integer(name, getattr(self, name), 1)
        check_integer("steps", self.steps, 0)
        check_integer("batch_size", self.batch_size, 0)
        check_integer("threads", self.threads, 0, MAX_THREADS)
        check_integer("workers", self.workers, 0, 1024)
        read_share("part", self.part)

    @property
    def label_counts(self) -> tuple[int, ...]:
        """Labelled clips a word, in the order given; 0 is all."""
        return tuple(0 if count == "all" else int(count) for count in self.labels.split(","))

    def protocol(self, run: Path, labels_per_word: int, labelled_clips: int) -> EvaluateConfig:
        """The settings of `evaluate` for a cell; the more clips are labelled in all, the fewer epochs."""
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


@dataclass(frozen=True)
class ReportConfig:
    """One self-contained HTML page about a run."""

    run: Path
    """Directory of a pretraining run, evaluated or not."""
    out: Path | None = None
    """The page, NAME.html; by default report.html in the run's directory."""
    data: Path | None = None
    """Packed shards for the contact sheet; the run's own data by default."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.out is not None and self.out.suffix not in (".html", ".htm"):  # config.json of the run, say
            raise ValueError(f"out must end in .html or .htm, got {self.out}")
