"""`avppc bench-train`: how fast the training step is, where its time goes and what the machine could do.

With --until, how many seconds of pretraining it takes until so many words are read.
"""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from avppc.data.packed.loader import EpochSampler
from avppc.data.source import DataSource
from avppc.evaluate.config import EvaluateConfig
from avppc.evaluate.lipreading.classifier import HELD_OUT_SPLITS, encode_features, fit_classifier, predict
from avppc.evaluate.lipreading.fits import check_words, draw_labelled_clips
from avppc.evaluate.lipreading.heads import make_head
from avppc.models.encoders import VideoEncoder
from avppc.printing import ProgressBar
from avppc.tasks.permutative import PermutativeTask
from avppc.tasks.registry import make_task
from avppc.train.config import BenchTrainConfig, PretrainConfig
from avppc.train.distributed import Processes, join_processes
from avppc.train.hardware import one_thread, set_up_cpu, use_bf16
from avppc.train.step import Lap, TrainingStep, make_optimizer, no_lap, prepare_model

WARM_UP_STEPS = 3
LABELS_PER_WORD = 10
DRAWS = 3


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
    beside_clips_per_second: float | None
    """The rate beside as many busy programs as were asked for; None: beside none."""


@dataclass(frozen=True)
class Record:
    """A pretraining that was stopped when its frozen encoder read enough words, or at its end."""

    reached: bool
    """Whether `rate` is at least what was asked for."""
    seconds: float
    """Of pretraining alone, by a clock on the wall: fetching clips and taking steps, not the looks at the words."""
    steps: int
    clips_per_second: float
    rate: float
    """Words read right of the test clips at the last look: 10 labelled clips a word, temporal convolution, mean of 3
    draws, epoch chosen on validation clips."""
    looks: list[tuple[int, float, float]]
    """Steps, seconds and rate of each look."""
    pretrain_steps: int
    """Steps after which the learning rate would have reached its end."""
    batch_size: int
    precision: str
    threads: int


def execute(config: BenchTrainConfig) -> int:
    """`avppc bench-train`: prints the step's measurements or, with `until`, the record, as JSON; returns 0, or 1 where
    the pretraining ended before so many words were read."""
    if not config.until:
        print(json.dumps(asdict(measure(config)), indent=1))
        return 0
    record = measure_until(config)
    print(json.dumps(asdict(record), indent=1))
    return 0 if record.reached else 1


def pretrain_config(config: BenchTrainConfig) -> PretrainConfig:
    """The pretraining whose step is timed."""
    chosen = PretrainConfig.from_preset(config.preset, config.data, config.data)
    scale = replace(
        chosen.scale,
        batch_slices=config.batch_slices or chosen.scale.batch_slices,
        compile=config.compile,
        activation_checkpointing=config.activation_checkpointing,
    )
    objective = replace(chosen.objective, moments=config.moments)
    return replace(
        chosen,
        loader=config.loader,
        batch_size=config.batch_size or chosen.batch_size,
        steps=config.pretrain_steps or chosen.steps,
        scale=scale,
        objective=objective,
    )


def measure(config: BenchTrainConfig) -> BenchResult:
    """Times the step; ValueError where the data set has too few clips."""
    with _started(config) as stepper:
        return _measure(stepper, config)


@contextlib.contextmanager
def _started(config: BenchTrainConfig) -> Iterator[Stepper]:
    """The pretraining whose steps are timed, in one process."""
    with join_processes(config.device) as processes:
        if processes.size > 1:
            raise ValueError("bench-train times one process: start it without torchrun")
        set_up_cpu(config.threads)
        stepper = Stepper(pretrain_config(config), processes)
        try:
            yield stepper
        finally:
            stepper.loader.close()


class Stepper:
    """Takes the steps of a pretraining, one after the other, and saves nothing."""

    def __init__(self, config: PretrainConfig, processes: Processes) -> None:
        self.config, self.processes, self.device = config, processes, processes.device
        self.source = DataSource(config.data, config.loader, config.videos, config.workers)
        self._dataset = self.source.open("train", verify=False)
        sampler = EpochSampler(len(self._dataset), config.batch_size, seed=0)
        self.loader = self.source.stream(self._dataset, sampler, self.device)
        torch.manual_seed(0)
        self.task = prepare_model(make_task(config.task, config), config.scale, processes).train()
        self._step = TrainingStep(config, self.task, make_optimizer(self.task, config.optimizer), processes)
        self._taken = 0

    def step(self, lap: Lap = no_lap) -> None:
        self._step.take(self._taken, self.loader, lap)
        self._taken += 1


def _measure(stepper: Stepper, config: BenchTrainConfig) -> BenchResult:
    wait = partial(synchronise, stepper.device)
    for _ in range(WARM_UP_STEPS):
        stepper.step()
    wait()
    # The rate is measured without laps, which would make a GPU wait for the host.
    waited = stepper.loader.wait_seconds
    seconds = _step_seconds(stepper, config.steps)
    data_wait = (stepper.loader.wait_seconds - waited) / config.steps / seconds
    with busy_programs(config.beside):
        beside = stepper.config.batch_size / _step_seconds(stepper, config.steps) if config.beside else None
    parts = _parts(stepper, min(config.steps, 10), wait)
    total = sum(parts.values())
    subtasks = len(stepper.task.loss.subtasks) if isinstance(stepper.task, PermutativeTask) else 0
    whole = replace(stepper.config, scale=replace(stepper.config.scale, batch_slices=1))  # other threads go uncounted
    counted = Stepper(whole, stepper.processes)
    tflop = step_flop(whole, counted.step, subtasks) / 1e12
    counted.loader.close()
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
        beside_clips_per_second=beside,
    )


def _step_seconds(stepper: Stepper, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        stepper.step()
    synchronise(stepper.device)
    return (time.perf_counter() - start) / steps


@contextlib.contextmanager
def busy_programs(count: int) -> Iterator[None]:
    """Inside, so many other programs each keep a processor busy."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


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


def measure_until(config: BenchTrainConfig) -> Record:
    """Pretrains until the words are read or the steps are over; nothing is saved.

    Raises:
        ValueError: the data have no words, or a word has fewer than 10 labelled training clips.
    """
    with _started(config) as stepper:
        reader = _Reader(stepper.source, use_bf16(stepper.config.precision, stepper.device))
        return _pretrain_until(config, stepper, reader)


def _pretrain_until(config: BenchTrainConfig, stepper: Stepper, reader: _Reader) -> Record:
    settings = stepper.config
    looks: list[tuple[int, float, float]] = []
    seconds, taken = 0.0, 0
    with ProgressBar("pretraining", settings.steps, "steps") as progress:
        while taken < settings.steps and not (looks and looks[-1][2] >= config.until):
            start = time.perf_counter()
            for _ in range(min(config.steps, settings.steps - taken)):
                stepper.step()
                taken += 1
                progress.advance()
            synchronise(stepper.device)
            seconds += time.perf_counter() - start
            looks.append((taken, seconds, reader.rate(stepper.task.video_encoder)))
            progress.show(f"{100 * looks[-1][2]:.1f} % of the words read")
    return Record(
        reached=looks[-1][2] >= config.until,
        seconds=seconds,
        steps=taken,
        clips_per_second=taken * settings.batch_size / seconds,
        rate=looks[-1][2],
        looks=looks,
        pretrain_steps=settings.steps,
        batch_size=settings.batch_size,
        precision="bf16" if reader.bf16 else "fp32",
        threads=torch.get_num_threads(),
    )


class _Reader:
    """Measures how many words of the test clips an encoder lets one read, by the recipe of `avppc evaluate`."""

    def __init__(self, source: DataSource, bf16: bool) -> None:
        self.bf16 = bf16
        self.config = EvaluateConfig(source.data, labels_per_word=LABELS_PER_WORD, draws=DRAWS)
        self.splits = {split: source.open(split, verify=False) for split in ("train", *HELD_OUT_SPLITS)}
        words = self.splits["train"].words
        check_words(source.data, words)
        labels = self.splits["train"].labels
        self.draws = [draw_labelled_clips(labels, LABELS_PER_WORD, seed, words) for seed in range(DRAWS)]

    def rate(self, encoder: VideoEncoder) -> float:
        """The share of right words, mean of the draws; torch's random numbers go on as if nothing had been asked."""
        device = next(encoder.parameters()).device
        state = torch.get_rng_state()
        try:
            encoder = copy.deepcopy(encoder)
            features = encode_features(encoder, self.splits, torch.cat(self.draws).unique(), device, self.bf16)
            labels = {split: dataset.labels for split, dataset in self.splits.items()}
            right = 0.0
            with one_thread():
                for seed, clips in enumerate(self.draws):
                    torch.manual_seed(seed)
                    head = make_head("tconv", features.width, len(self.splits["train"].words))
                    groups: list[dict[str, object]] = [{"params": head.parameters(), "lr": 1e-2}]
                    train = clips, labels["train"][clips]
                    fit_classifier(head, groups, features, train, labels["val"], self.config, self.config.epochs, seed)
                    right += (predict(head, features, "test") == labels["test"]).float().mean().item()
            return right / DRAWS
        finally:
            torch.set_rng_state(state)
