"""`avppc bench-train`: how fast the training step is, where its time goes and what the machine could do."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from avppc.data.packed.dataset import PackedDataset
from avppc.data.packed.loader import ClipLoader
from avppc.data.packed.sampler import EpochSampler
from avppc.tasks.permutative import PermutativeTask
from avppc.tasks.registry import make_task
from avppc.train.config import BenchTrainConfig, PretrainConfig
from avppc.train.distributed import Processes, join_processes
from avppc.train.hardware import set_up_cpu, use_bf16
from avppc.train.step import Lap, TrainingStep, make_optimizer, no_lap, prepare_model

WARM_UP_STEPS = 3


@dataclass(frozen=True)
class BenchResult:
    """What was measured on this machine; seconds are those of a clock on the wall."""

    clips_per_second: float
    step_seconds: float
    parts_seconds: dict[str, float]
    """Seconds a step of fetching the batch, forward, backward, optimiser; they add up to step_seconds."""
    data_wait: float
    """Share of the step spent waiting for data."""
    step_tflop: float
    """10^12 floating point operations of a step, forward and backward: matrix products and convolutions as torch counts
    them, those of the loss by formula."""
    ceiling_tflops: float
    """TFLOP/s of large matrix products in the encoders' precision, here and now."""
    model_flop_utilisation: float
    """step_tflop / step_seconds / ceiling_tflops."""
    peak_mib: float
    """The most memory that the process had at once; on a GPU, the most that torch had allocated there."""
    precision: str


def execute(config: BenchTrainConfig) -> int:
    """`avppc bench-train`: prints the measurements as JSON; returns 0."""
    print(json.dumps(measure(config).__dict__, indent=1))
    return 0


def pretrain_config(config: BenchTrainConfig) -> PretrainConfig:
    """The pretraining whose step is timed."""
    chosen = PretrainConfig.from_preset(config.preset, config.data, config.data)
    scale = replace(chosen.scale, compile=config.compile, activation_checkpointing=config.activation_checkpointing)
    objective = replace(chosen.objective, moments=config.moments)
    return replace(
        chosen,
        batch_size=config.batch_size or chosen.batch_size,
        steps=config.pretrain_steps or chosen.steps,
        scale=scale,
        objective=objective,
    )


def measure(config: BenchTrainConfig) -> BenchResult:
    """Times the step; ValueError where the data set has too few clips."""
    with join_processes(config.device) as processes:
        if processes.size > 1:
            raise ValueError("bench-train times one process: start it without torchrun")
        set_up_cpu(config.threads)
        stepper = Stepper(pretrain_config(config), processes)
        try:
            return _measure(stepper, config.steps)
        finally:
            stepper.loader.close()


class Stepper:
    """Takes the steps of a pretraining, one after the other, and saves nothing."""

    def __init__(self, config: PretrainConfig, processes: Processes) -> None:
        self.config, self.device = config, processes.device
        dataset = PackedDataset(config.data, "train", verify=False)
        sampler = EpochSampler(len(dataset), config.batch_size, seed=0)
        self.loader = ClipLoader(dataset, sampler, device=self.device)
        torch.manual_seed(0)
        self.task = prepare_model(make_task(config.task, config), config.scale, processes).train()
        self._step = TrainingStep(config, self.task, make_optimizer(self.task, config.optimizer), processes)
        self._taken = 0

    def step(self, lap: Lap = no_lap) -> None:
        self._step.take(self._taken, self.loader, lap)
        self._taken += 1


def _measure(stepper: Stepper, steps: int) -> BenchResult:
    wait = partial(synchronise, stepper.device)
    for _ in range(WARM_UP_STEPS):
        stepper.step()
    wait()
    # The rate is measured without laps, which would make a GPU wait for the host.
    start = time.perf_counter()
    waited = stepper.loader.wait_seconds
    for _ in range(steps):
        stepper.step()
    wait()
    seconds = (time.perf_counter() - start) / steps
    data_wait = (stepper.loader.wait_seconds - waited) / steps / seconds
    parts = _parts(stepper, min(steps, 10), wait)
    total = sum(parts.values())
    subtasks = len(stepper.task.loss.subtasks) if isinstance(stepper.task, PermutativeTask) else 0
    tflop = step_flop(stepper.config, stepper.step, subtasks) / 1e12
    bf16 = use_bf16(stepper.config.precision, stepper.device)
    ceiling = product_tflops(stepper.device, torch.bfloat16 if bf16 else torch.float32)
    return BenchResult(
        clips_per_second=stepper.config.batch_size / seconds,
        step_seconds=seconds,
        parts_seconds={name: value * seconds / total for name, value in parts.items()},
        data_wait=data_wait,
        step_tflop=tflop,
        ceiling_tflops=ceiling,
        model_flop_utilisation=tflop / seconds / ceiling,
        peak_mib=peak_mib(stepper.device),
        precision="bf16" if bf16 else "fp32",
    )


def _parts(stepper: Stepper, steps: int, wait: Callable[[], None]) -> dict[str, float]:
    """Seconds of each part of a step; after each part the device is waited for."""
    parts: dict[str, float] = {}
    last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        wait()
        now = time.perf_counter()
        parts[name] = parts.get(name, 0.0) + now - last
        last = now

    for _ in range(steps):
        stepper.step(lap)
    return parts


def step_flop(config: PretrainConfig, step: Callable[[], object], subtasks: int) -> float:
    """Number of floating point operations of a step, with those that activation checkpointing repeats.

    Args:
        subtasks: how many the step's permutative loss has; 0 for a task with another loss.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    clips, dim = config.batch_size, config.objective.dim
    # Logits and their two gradient products, and as much for the projections: the counter cannot see into the op.
    return counter.get_total_flops() + 6.0 * subtasks * clips * dim * (clips + dim)


def product_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """TFLOP/s of the fastest of several large matrix products: what the hardware can do at best."""
    side = 8192 if device.type == "cuda" else 1536
    first, second = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        best = min(best, _seconds(lambda: first @ second, device))
    return 2.0 * side**3 / best / 1e12


def _seconds(function: Callable[[], Tensor], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


def peak_mib(device: torch.device) -> float:
    """BenchResult.peak_mib up to now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts it in KiB


def synchronise(device: torch.device) -> None:
    """Waits until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
