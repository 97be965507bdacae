"""Settings of `avppc bench-train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from avppc.checks import MAX_THREADS, check_choice, check_integer, check_types
from avppc.train.config import PresetName


@dataclass(frozen=True)
class BenchTrainConfig:
    """Times the training step on this machine: clips a second, where the time goes, share of the arithmetic ceiling."""

    data: Path
    """Directory of packed shards, as `avppc prepare` writes it."""
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
    """Compiles the encoders."""
    activation_checkpointing: bool = False
    """Computes the encoders' blocks again in the backward pass, to save memory."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("preset", self.preset, get_args(PresetName))
        check_integer("batch_size", self.batch_size, 0)
        check_integer("steps", self.steps, 1)
        check_integer("threads", self.threads, 0, MAX_THREADS)
