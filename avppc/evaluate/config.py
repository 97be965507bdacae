"""Settings of the lip-reading evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from avppc.checks import MAX_SEED, MAX_THREADS, check_choice, check_integer, check_number, check_types
from avppc.processes_cores import count_cores
from avppc.train.config import Precision

RowName = Literal["random", "supervised", "frozen", "finetuned", "ceiling"]
HeadName = Literal["gru", "tconv", "bins", "mstcn"]
EvaluatePreset = Literal["few-labels", "lrw"]
ROWS: tuple[RowName, ...] = get_args(RowName)
HEADS: tuple[HeadName, ...] = get_args(HeadName)
QUICK_HEADS: tuple[HeadName, ...] = ("gru", "tconv", "bins")


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
        check_choice("schedule", self.schedule, ("one-cycle", "cosine"))
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
    """Packed shards with train, val and test splits; the run's own data by default."""
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
        for name, values, allowed in (("rows", self.rows, ROWS), ("heads", self.heads, HEADS)):
            if not values:
                raise ValueError(f"{name} must name at least one of {', '.join(allowed)}")
            for value in values:
                check_choice(name, value, allowed)
        for name in ("head_learning_rates", "scratch_learning_rates", "finetune_learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one rate")
            for rate in getattr(self, name):
                check_number(name, rate, 0)
        check_choice("preset", self.preset, get_args(EvaluatePreset))
        check_number("feature_gigabytes", self.feature_gigabytes, 0)
        check_integer("labels_per_word", self.labels_per_word, 0)
        for name in ("draws", "training_draws", "epochs", "training_epochs", "selection_epochs", "validate_every"):
            check_integer(name, getattr(self, name), 1)
        check_integer("head_hidden", self.head_hidden, 4)
        check_integer("gru_layers", self.gru_layers, 1)
        check_integer("batch_size", self.batch_size, 2)
        check_choice("precision", self.precision, get_args(Precision))
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
