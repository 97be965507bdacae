"""Settings of pretraining, with a preset for a laptop's CPU and one for a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from avppc.checks import MAX_SEED, MAX_THREADS, check_choice, check_integer, check_number, check_types
from avppc.data.config_augment import AugmentConfig
from avppc.models.config import CutConfig, EncoderConfig
from avppc.ops.log_mel.config import LogMelConfig
from avppc.train.config_scale import ScaleConfig

Precision = Literal["auto", "bf16", "fp32"]
PresetName = Literal["laptop", "gpu"]
TaskName = Literal["synchronization", "time-arrow", "correspondence", "visual-permutative", "av-permutative"]
TASK_NAMES: tuple[TaskName, ...] = get_args(TaskName)
"""In the order of the published table."""
WeightingName = Literal["modality", "equal", "group", "uncertainty", "gradient-norm"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss: embeddings, their fusion and the weights of the 42 sub-tasks."""

    dim: int = 128
    """Width of the embeddings that are scored."""
    fusion: Literal["mlp", "sum", "concat-linear"] = "mlp"
    """How two elements become one embedding."""
    normalize: Literal["layer_norm", "none"] = "layer_norm"
    """What is done to the embeddings before they are scored; the method as published does nothing."""
    learn_scale: bool = True
    """Learns one factor for all logits."""
    between_weight: float = 1.0
    """Weight of the sub-tasks that predict sound from picture alone or picture from sound alone."""
    other_weight: float = 0.1
    """Weight of the others. Equal weights let "who speaks and how it is lit" solve most sub-tasks at this size."""
    weighting: WeightingName = "modality"
    """"modality": between_weight and other_weight; "equal": 1 each; "group": group_weights, shared out evenly inside
    each group; "uncertainty": learned, exp(-s) loss + s / 2; "gradient-norm": sub-tasks pull in proportion to their
    loss, raised to gradient_norm_power."""
    group_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Total weights of the groups 1to1, 1to2, 2to1 and 2to2 under weighting="group"."""
    gradient_norm_power: float = 1.0
    """The power to which losses are raised under "gradient-norm"; 0: all sub-tasks pull alike."""
    chunks: Literal[2, 4] = 2
    """Parts into which the task "visual-permutative" cuts a clip: past and future, or four chunks, of which every one
    or two predict every other one or two."""
    negatives: Literal["clips", "same-clip"] = "clips"
    """What a target is told from: the targets of other clips, or also targets with past and future swapped."""
    leave_out: Literal["none", "clip", "word"] = "none"
    """Clips that are not used as negatives: other appearances of the same clip, or (an oracle: it needs labels) all
    clips of the same word."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("dim", self.dim, 2)
        check_choice("fusion", self.fusion, ("mlp", "sum", "concat-linear"))
        check_choice("normalize", self.normalize, ("layer_norm", "none"))
        check_number("between_weight", self.between_weight, 0)
        check_number("other_weight", self.other_weight, 0)
        check_choice("weighting", self.weighting, get_args(WeightingName))
        if not isinstance(self.group_weights, tuple) or len(self.group_weights) != 4:
            raise ValueError(f"group_weights must be four numbers, got {self.group_weights!r}")
        for weight in self.group_weights:
            check_number("group_weights", weight, 0)
        check_number("gradient_norm_power", self.gradient_norm_power, 0, 4)
        check_choice("chunks", self.chunks, (2, 4))
        check_choice("negatives", self.negatives, ("clips", "same-clip"))
        check_choice("leave_out", self.leave_out, ("none", "clip", "word"))
        if self.between_weight == self.other_weight == 0:
            raise ValueError("between_weight and other_weight must not both be 0")


@dataclass(frozen=True)
class RivalConfig:
    """Settings of the proxy tasks that are compared with permutative predictive coding."""

    sync_mode: Literal["shift", "curriculum", "multiway"] = "shift"
    """Synchronization: "shift", is the sound aligned or shifted inside its clip; "curriculum", a margin between aligned
    and false pairs that come closer as training goes on; "multiway", which frame of the clip belongs to which sound."""
    min_shift_frames: int = 4
    """The least shift of shifted sound, in video frames."""
    far_shift_frames: int = 8
    """The least shift in the middle stage of the curriculum, in video frames."""
    margin: float = 1.0
    """Distance beyond which the curriculum pushes false pairs no further apart."""
    arrow_pool: Literal["gru", "mean"] = "gru"
    """How the time arrow's head sees the frames: in order, or (a control that cannot tell the order) their mean."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("sync_mode", self.sync_mode, ("shift", "curriculum", "multiway"))
        check_integer("min_shift_frames", self.min_shift_frames, 1)
        check_integer("far_shift_frames", self.far_shift_frames, self.min_shift_frames)
        check_number("margin", self.margin, 0)
        check_choice("arrow_pool", self.arrow_pool, ("gru", "mean"))


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay to nearly nothing."""

    learning_rate: float = 2e-3
    """Highest learning rate."""
    warmup_fraction: float = 0.1
    """Share of the steps over which the rate rises linearly."""
    final_fraction: float = 0.02
    """Rate at the last step, as a share of the highest."""
    weight_decay: float = 0.02
    """Decoupled weight decay of matrices and filters; biases and norms have none."""
    beta2: float = 0.98
    """Decay of the second moment."""
    clip_norm: float = 5.0
    """Largest norm of the whole gradient."""

    def __post_init__(self) -> None:
        check_types(self)
        check_number("learning_rate", self.learning_rate, 0)
        check_number("warmup_fraction", self.warmup_fraction, 0, 1)
        check_number("final_fraction", self.final_fraction, 0, 1)
        check_number("weight_decay", self.weight_decay, 0)
        check_number("beta2", self.beta2, 0, 0.999_999)
        check_number("clip_norm", self.clip_norm, 0)


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrains a visual speech encoder from unlabeled clips."""

    data: Path
    """Directory of packed shards, as `avppc prepare` writes it."""
    out: Path
    """Directory of this run; a run that was stopped goes on from its last checkpoint."""
    preset: PresetName = "laptop"
    """Defaults of all other settings: "laptop" for a CPU and minutes, "gpu" for ResNet-34 at 88 pixels."""
    task: TaskName = "av-permutative"
    """The proxy task: "av-permutative" (all 42 sub-tasks), "visual-permutative" (picture alone), "synchronization",
    "time-arrow" or "correspondence"."""
    subtasks: str = ""
    """Sub-tasks to learn: groups (1to1, 1to2, 2to1, 2to2, between, within, mixed) or names such as "Vp,Ap->Vf", with
    commas between them; empty: all of the task."""
    exclude: str = ""
    """Sub-tasks to leave out, in the same way."""
    steps: int = 1000
    """Optimiser steps in all."""
    batch_size: int = 128
    """Clips of one loss, on all processes together; each is told apart from the others."""
    speakers_per_batch: int = 0
    """Each batch has this many speakers, equally many clips of each, so that who speaks tells less; 0: as they come."""
    accumulate: int = 1
    """Batches whose gradients are averaged before a step; with scale.cached_negatives they share one loss."""
    gather: Literal["none", "all", "ring"] = "all"
    """Negatives under torchrun: "none", each process's own clips; "all" or "ring", the clips of all processes: copied
    to each, or passed round, with the memory of one process and more arithmetic."""
    seed: int = 0
    """Seed of the initial weights, the order of the clips and the augmentation."""
    frame_stride: int = 2
    """One frame in so many is encoded, from a random first one; motion is taken at the full rate."""
    precision: Precision = "auto"
    """Arithmetic of the encoders: "bf16", "fp32", or "auto", bf16 where the hardware is quick at it."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"...; "auto" takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    checkpoint_every: int = 250
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept."""
    verify_data: bool = True
    """Checks the shards' checksums before training."""
    start_anew: bool = False
    """Starts anew where the run has checkpoints but none of them is whole; without it such a run stops and says so."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The visual encoder."""
    audio_width: int = 16
    """Channels of the audio encoder's first layer."""
    features: LogMelConfig = field(default_factory=lambda: LogMelConfig(bands=40))
    """The audio features; their hop must give 4 frames a video frame."""
    cut: CutConfig = field(default_factory=CutConfig)
    """Past, gap and future."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Variation of the training clips."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss of the permutative tasks; its embedding width also serves the other tasks."""
    rivals: RivalConfig = field(default_factory=RivalConfig)
    """The other tasks."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimiser."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Several processes, large batches, and what to do about faults."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("preset", self.preset, get_args(PresetName))
        check_choice("task", self.task, TASK_NAMES)
        check_integer("steps", self.steps, 1)
        check_integer("batch_size", self.batch_size, 2)
        check_integer("speakers_per_batch", self.speakers_per_batch, 0)
        check_integer("accumulate", self.accumulate, 1)
        check_choice("gather", self.gather, ("none", "all", "ring"))
        check_integer("seed", self.seed, 0, MAX_SEED)
        check_choice("precision", self.precision, get_args(Precision))
        check_integer("threads", self.threads, 0, MAX_THREADS)
        check_integer("log_every", self.log_every, 1)
        check_integer("checkpoint_every", self.checkpoint_every, 1)
        check_integer("keep_checkpoints", self.keep_checkpoints, 1)
        check_integer("audio_width", self.audio_width, 4)
        if self.augment.time_jitter_frames > self.cut.past_frames - 2:
            raise ValueError(
                f"augment.time_jitter_frames must leave 2 of cut.past_frames={self.cut.past_frames} frames, "
                f"got {self.augment.time_jitter_frames}"
            )
        check_integer("frame_stride", self.frame_stride, 1, self.cut.past_frames - self.augment.time_jitter_frames)

    @classmethod
    def from_preset(cls, name: PresetName, data: Path, out: Path) -> PretrainConfig:
        """The settings for a laptop's CPU ("laptop") or for one GPU ("gpu")."""
        check_choice("preset", name, get_args(PresetName))
        if name == "laptop":
            return cls(data, out)
        return cls(
            data,
            out,
            preset="gpu",
            steps=50_000,
            batch_size=512,
            frame_stride=1,
            checkpoint_every=1000,
            encoder=EncoderConfig("resnet34", 64, "2d", channels="luma", crop_pixels=88, input_pixels=88, features=512),
            audio_width=64,
            features=LogMelConfig(),
            augment=AugmentConfig(
                shift_pixels=4, gamma_range=0.2, contrast_range=0.2, brightness_range=0.1, pixel_noise=0.02
            ),
            objective=ObjectiveConfig(dim=512),
            optimizer=OptimizerConfig(learning_rate=1e-3),
        )
