"""Settings of pretraining, with a preset for a laptop's CPU and one for a GPU, and of `avppc bench-train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, get_args

from avppc.checks import MAX_SEED, MAX_THREADS, check_choice, check_integer, check_number, check_types
from avppc.data.config import AugmentConfig, LoaderName, VideoConfig
from avppc.losses.config import MomentsName, ObjectiveConfig
from avppc.models.config import EncoderConfig
from avppc.ops.log_mel.config import LogMelConfig
from avppc.tasks.config import TaskConfig

__all__ = ["BenchTrainConfig", "OptimizerConfig", "PretrainConfig", "ScaleConfig"]

InitParts = Literal["encoder", "all"]
LoggerName = Literal["none", "wandb"]
Precision = Literal["auto", "bf16", "fp32"]
PresetName = Literal["laptop", "gpu"]


@dataclass(frozen=True)
class ScaleConfig:
    """Several processes, large batches, memory and faults: how a step is computed.

    Except sync_batch_norm, cached_negatives and batch_slices, nothing here changes what is learned.
    """

    BEFORE: ClassVar[dict[str, int]] = {"batch_slices": 1}
    """What a file means that lacks a field: it was written before there was one."""

    sync_batch_norm: bool = True
    """Batch norms see the batches of all processes, so that the number of processes changes nothing."""
    cached_negatives: bool = False
    """One loss over all `accumulate` batches instead of one each: every clip is told apart from batch_size * accumulate
    clips, with the memory of one batch (each passes through the encoders twice). Batch norms still see one batch."""
    batch_slices: int = 2
    """On a CPU, the batch passes through the encoders in so many slices at a time, each on its share of the threads:
    as fast as all threads on each operator, and faster beside another busy program. The loss is that of the whole
    batch; batch norms see a slice. 1: the batch whole, as it is in any case with several processes, cached_negatives,
    activation_checkpointing, compile, and for tasks whose loss is not taken from features of single clips."""
    activation_checkpointing: bool = False
    """Keeps only the inputs of the encoders' blocks and computes the rest again in the backward pass."""
    compile: bool = False
    """Compiles the encoders with torch.compile; the first steps take minutes."""
    max_skipped_steps: int = 10
    """A step whose loss or gradient is not finite is skipped; more than this many in a row end the run. This is checked
    with each line of metrics (every log_every steps): skipped steps before the last good one do not count."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("batch_slices", self.batch_slices, 1)
        check_integer("max_skipped_steps", self.max_skipped_steps, 0)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay to nearly nothing."""

    learning_rate: float = 4e-3
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
class _Places:
    """Where a run reads and writes, and its preset: what `--help` shows first."""

    data: Path
    """Directory of packed shards, as `avppc prepare` writes it; or a folder of videos, decoded as training goes on."""
    out: Path
    """Directory of this run; a run that was stopped goes on from its last checkpoint."""
    preset: PresetName = "laptop"
    """Defaults of all other settings: "laptop" for a CPU and minutes, "gpu" for ResNet-34 at 88 pixels."""


@dataclass(frozen=True)
class PretrainConfig(TaskConfig, _Places):
    """Pretrains a visual speech encoder from unlabeled clips."""

    loader: LoaderName = "auto"
    """"packed" shards, or videos by "pyav", "torchcodec" or "dali" (extras); "auto": as they lie there, videos by
    DALI where it can decode all on the GPU, else by PyAV."""
    videos: VideoConfig = field(default_factory=VideoConfig)
    """How clips are cut out of videos: the clips that `avppc prepare` packs with the same settings."""
    workers: int = 0
    """Processes that decode videos; 0: one for each core, which the processes of a run on a machine share."""
    batch_size: int = 128
    """Clips of one loss, on all processes together; each is told apart from the others."""
    speakers_per_batch: int = 0
    """Each batch has this many speakers, equally many clips of each, so that who speaks tells less; 0: as they come."""
    seed: int = 0
    """Seed of the initial weights, the order of the clips and the augmentation."""
    init_from: str = ""
    """Weights to begin with instead of random ones: the directory of a run, finished or not, an encoder file or the
    name of a pretrained encoder. A run that is resumed goes on from its own."""
    init_parts: InitParts = "encoder"
    """What is taken from there: "encoder", the visual encoder, or "all" that a run of the same task has learned."""
    precision: Precision = "auto"
    """Arithmetic of the encoders: "bf16", "fp32", or "auto", bf16 where the hardware is quick at it."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"...; "auto" takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    log_every: int = 20
    """Steps between two lines of metrics."""
    logger: LoggerName = "none"
    """Where the metrics are shown besides the run's own files: "wandb" (needs the extra [wandb])."""
    checkpoint_every: int = 250
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept."""
    verify_data: bool = True
    """Checks the shards' checksums before training."""
    start_anew: bool = False
    """Starts anew where the run has checkpoints but none of them is whole; without it such a run stops and says so."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimiser."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Several processes, large batches, memory, and what to do about faults."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("workers", self.workers, 0, 1024)
        check_integer("batch_size", self.batch_size, 2)
        check_integer("speakers_per_batch", self.speakers_per_batch, 0)
        check_integer("seed", self.seed, 0, MAX_SEED)
        check_integer("threads", self.threads, 0, MAX_THREADS)
        check_integer("log_every", self.log_every, 1)
        check_integer("checkpoint_every", self.checkpoint_every, 1)
        check_integer("keep_checkpoints", self.keep_checkpoints, 1)

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


@dataclass(frozen=True)
class BenchTrainConfig:
    """Times the training step on this machine: clips a second, where the time goes, share of the arithmetic ceiling."""

    data: Path
    """Directory of packed shards, or a folder of videos."""
    loader: LoaderName = "auto"
    """How clips are read, as for `avppc pretrain`."""
    preset: PresetName = "laptop"
    """Size of everything: "laptop" for a CPU, "gpu" for ResNet-34 at 88 pixels."""
    batch_size: int = 0
    """Clips a batch; 0: the preset's."""
    steps: int = 20
    """Steps that are timed, after three that are not."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"...; "auto" takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    compile: bool = False
    """Compiles the encoders with torch.compile."""
    activation_checkpointing: bool = False
    """Computes the encoders' blocks again in the backward pass, to save memory."""
    moments: MomentsName = "clip"
    """What the step scores moment by moment, as objective.moments of a pretraining."""
    batch_slices: int = 0
    """Slices of a batch, as scale.batch_slices of a pretraining; 0: the preset's."""
    beside: int = 0
    """Times the steps once more beside so many programs that each keep a processor busy."""
    until: float = 0.0
    """Pretrains until this share of the test words is read (0 to 1) with 10 labels a word, and says how many seconds
    that took; it looks every `steps` steps. 0: times steps alone."""
    pretrain_steps: int = 0
    """Steps of the whole pretraining, which the learning rate follows; 0: the preset's."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("batch_size", self.batch_size, 0)
        check_integer("steps", self.steps, 1)
        check_integer("batch_slices", self.batch_slices, 0)
        check_integer("beside", self.beside, 0, MAX_THREADS)
        check_integer("threads", self.threads, 0, MAX_THREADS)
        check_number("until", self.until, 0, 1)
        check_integer("pretrain_steps", self.pretrain_steps, 0)
