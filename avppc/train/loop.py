"""Pretraining, from packed clips to an encoder file: read `pretrain` from top to bottom."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from avppc.data.packed.dataset import Clips
from avppc.data.packed.loader import EpochSampler
from avppc.data.source import DataSource, MapDataset, OwnClips
from avppc.files import sole_use
from avppc.models.encoder_file import ENCODER_FILE, save_encoder, save_own_encoder
from avppc.models.encoders import OwnEncoder
from avppc.ops.info_nce.agreement import rows_known_even
from avppc.printing import Console
from avppc.processes import Stopped
from avppc.tasks.base import ProxyTask
from avppc.tasks.registry import make_task, with_encoder
from avppc.train.checkpoint import (
    CheckpointSaver,
    CheckpointStore,
    NoWholeCheckpoint,
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
)
from avppc.train.config import PretrainConfig
from avppc.train.distributed import Processes, StopRequest, join_processes
from avppc.train.events import require_wandb
from avppc.train.hardware import OtherPrograms, set_up_cpu, use_bf16
from avppc.train.log import SKIPPED_FILE, Meter, RunLog, SkippedReport, SkippedSteps, Stopwatch
from avppc.train.run_folder import begin_from, check_same_training, open_run, videos_of
from avppc.train.step import TrainingStep, make_optimizer, prepare_model

logger = logging.getLogger(__name__)

SHARED_MACHINE = 0.1  # share of the processors' time in other programs from which the progress tells it


def execute(config: PretrainConfig) -> int:
    """`avppc pretrain`: trains, or goes on where the run in config.out stopped.

    Returns:
        0; or, where SIGTERM or Ctrl-C ended it and its checkpoint is written, 143 or 130.

    Raises:
        KeyboardInterrupt: a signal came outside of the steps, or a second Ctrl-C; the text says what is there.
    """
    try:
        pretrain(config)
    except Stopped as stopped:
        Console(stderr=True, quiet=False, soft_wrap=True).print(f"{stopped}; the same command goes on from there")
        return stopped.exit_code
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(_where_it_goes_on(config.out / "checkpoints")) from interrupt
    return 0


def _where_it_goes_on(checkpoints: Path) -> str:
    """What the same command will do after an interruption."""
    newest = newest_checkpoint(checkpoints)
    if newest is None:
        return "no checkpoint was written yet: the same command starts from the beginning"
    return f"the same command goes on from {newest}"


def pretrain(
    config: PretrainConfig,
    *,
    task: Callable[[PretrainConfig], ProxyTask] | None = None,
    encoder: nn.Module | None = None,
    dataset: MapDataset | None = None,
) -> Path:
    """Pretrains an encoder and returns its file. Under torchrun each process does its share of every batch.

    Args:
        config: the settings.
        task: makes a proxy task from them, such as a class derived from ProxyTask; None: the one of config.task.
        encoder: a module of one's own, [N, T, H, W] luma from 0 to 1 -> [N, T, config.encoder.features]; it is trained
            in place, and safetensors.torch.load_model(encoder, file) reads the file. None: a VideoEncoder.
        dataset: clips of one's own, a map-style data set of Clip or (video, audio); config.data is then only its name.
            None: the clips in config.data.

    Every draw of step i comes from (seed, i, place of the clip in the batch), and the order of the clips from (seed,
    epoch). So on a CPU a run that was killed and is started again by the same call gives, bit for bit, the weights of
    an undisturbed one. The number of processes changes nothing but rounding, except what uses each process's own clips:

    - the negatives with gather="none", and the statistics without scale.sync_batch_norm;
    - the statistics of one process that takes its batches in slices, unless scale.batch_slices is 1;
    - the false pairs of the task correspondence and of the first stage of baselines.sync_mode="curriculum" (so one clip
      a process is a ValueError);
    - the norms of which objective.weighting="gradient-norm" takes the mean.

    Raises:
        ValueError: settings that do not fit the data, or that differ between processes, or a directory that holds
            another run or is another process's, or weights of config.init_from that do not fit.
        ImportError: config.logger needs a package that is missing.
        FloatingPointError: too many steps in a row whose loss or gradient is not finite.
        OSError: the last checkpoint could not be written.
        Stopped: SIGTERM or Ctrl-C came, and a checkpoint is written.
    """
    kept = videos_of(config.out) if config.out.is_dir() else None
    source: DataSource | OwnClips
    if dataset is None:
        source = DataSource(config.data, config.loader, config.videos, config.workers, kept)
    else:
        source = OwnClips(dataset)
    source.check(config.out)
    if isinstance(source, DataSource) and not source.is_packed:
        _ = source.listing  # before processes wait for each other: it may take long
    if config.logger == "wandb":
        require_wandb()
    with join_processes(config.device) as processes, contextlib.ExitStack() as held:
        return _pretrain(config, partial(_make_task, config, task, encoder), source, processes, held)


def _make_task(
    config: PretrainConfig, task: Callable[[PretrainConfig], ProxyTask] | None, encoder: nn.Module | None
) -> ProxyTask:
    if task is None:
        return make_task(config.task, config, encoder)
    made = task(config)
    if not isinstance(made, ProxyTask):
        raise TypeError(f"task must make a ProxyTask, got {type(made).__name__}")
    return with_encoder(made, encoder)


def _pretrain(
    config: PretrainConfig,
    make: Callable[[], ProxyTask],
    source: DataSource | OwnClips,
    processes: Processes,
    held: contextlib.ExitStack,
) -> Path:
    device, main = processes.device, processes.main
    set_up_cpu(config.threads)
    dataset = held.enter_context(processes.all_or_none(partial(_open_data, config, source, processes)))
    check_same_training(config, dataset.sha256, processes)
    sampler = _make_sampler(config, dataset, processes)
    task = _open_task(config, make, source, dataset, processes, held)
    optimizer = make_optimizer(task, config.optimizer)
    store = CheckpointStore(config.out / "checkpoints", config.keep_checkpoints)
    step, skipped_before = processes.all_or_none(partial(_restore, config, store, task, optimizer, sampler))
    if main:
        store.clear_leftovers()
    _check_alike(task, step, processes)

    training_step = TrainingStep(config, task, optimizer, processes, skipped_before)
    report = SkippedReport(config.out, dataset, task, processes)
    saver, meter, watch, logged_step, waited = CheckpointSaver(store), Meter(), Stopwatch(), step, 0.0
    others = OtherPrograms()
    task.train()
    with (
        RunLog(config, step, main) as log,
        source.stream(dataset, sampler, device) as loader,
        StopRequest(processes) as stop,
        rows_known_even(),  # the sampler deals every batch out evenly
    ):
        log.say(_opening(config, step, len(dataset), task, processes))
        while step < config.steps:
            result = training_step.take(step, loader)
            step += 1
            for values in result.outputs:
                meter.add(values, result.skip)

            stopping = stop.agreed()
            if step % config.log_every == 0 or step == config.steps:
                row = {"step": step, "learning_rate": result.learning_rate, "grad_norm": result.gradient_norm.item()}
                row |= meter.take(processes.sum)
                row["skipped"] = _check_skipped(config, training_step.skipped, report, step)
                row |= _speed(config, step - logged_step, watch.lap(), loader.wait_seconds - waited)
                logged_step, waited = step, loader.wait_seconds
                groups = task.group_metrics(row)
                log.write(row, groups, _progress_text(row, groups, others.lap() if processes.size == 1 else None))
            log.count_step()
            if main and (step % config.checkpoint_every == 0 or step == config.steps or stopping):
                tensors = {"model": task.state_dict(), "optimizer": optimizer_tensors(optimizer, task)}
                saver.save(step, tensors, {"sampler": loader.state(), "skipped": training_step.skipped.counts()[0]})
            if stopping and step < config.steps:
                saver.finish()
                name = signal.Signals(stop.signal).name
                raise Stopped(f"stopped by {name} after step {step}, which is saved in {store.directory}", stop.signal)
        saver.finish()
        return _finish(config, task, processes, log)


def _open_data(config: PretrainConfig, source: DataSource | OwnClips, processes: Processes) -> Clips:
    """The training clips, checked; each process checks its share of the shards."""
    if config.verify_data:
        source.verify("train", processes.rank, processes.size)
    dataset = source.open("train", verify=False)
    if len(dataset) < config.batch_size:
        raise ValueError(f"batch_size is {config.batch_size}, but {config.data} has {len(dataset)} training clips")
    if min(dataset.shape.height, dataset.shape.width) < config.encoder.crop_pixels:
        raise ValueError(
            f"encoder.crop_pixels is {config.encoder.crop_pixels}, but the clips of {config.data} have "
            f"{dataset.shape.height} x {dataset.shape.width} pixels"
        )
    return dataset


def _open_task(
    config: PretrainConfig,
    make: Callable[[], ProxyTask],
    source: DataSource | OwnClips,
    dataset: Clips,
    processes: Processes,
    held: contextlib.ExitStack,
) -> ProxyTask:
    """The task with its initial weights. Makes the run's directory, and locks it until `held` is closed."""
    frames = dataset.shape.frames
    torch.manual_seed(config.seed)
    task = make()
    if config.scale.cached_negatives and not task.has_representations:
        raise ValueError(
            f"scale.cached_negatives needs a permutative task or multiway synchronization, task is {config.task!r}"
        )
    if frames < task.frames_needed:
        raise ValueError(
            f"clips of {frames} frames are too short for the task {config.task!r}: with these settings of cut, "
            f"frame_stride, augment.time_jitter_frames and baselines it needs {task.frames_needed}"
        )

    def begin() -> dict[str, Any] | None:
        done = newest_checkpoint(config.out / "checkpoints") is not None
        wanted = config.init_from and (config.start_anew or not done)
        return begin_from(config.init_from, config.init_parts, task, config) if wanted else None

    initial = processes.all_or_none(begin)  # before anything is written of a run that cannot begin

    def claim() -> None:
        if processes.main:
            config.out.mkdir(parents=True, exist_ok=True)
            held.enter_context(sole_use(config.out))  # before a word is written: two runs may want one new directory
            open_run(config, dataset.sha256, task.describe(), *source.record("train"), initial=initial)

    processes.all_or_none(claim)
    return prepare_model(task, config.scale, processes)


def _make_sampler(config: PretrainConfig, dataset: Clips, processes: Processes) -> EpochSampler:
    return EpochSampler(
        len(dataset),
        processes.share(config.batch_size),
        seed=config.seed,
        rank=processes.rank,
        world_size=processes.size,
        speakers=dataset.speakers,
        speakers_per_batch=config.speakers_per_batch or None,
    )


def _restore(
    config: PretrainConfig,
    store: CheckpointStore,
    task: ProxyTask,
    optimizer: torch.optim.Optimizer,
    sampler: EpochSampler,
) -> tuple[int, int]:
    """Restores the newest whole checkpoint; returns the steps done and those skipped, both 0 where there is none.

    Raises:
        ValueError: there are only damaged ones, and config.start_anew is not set; or it is one of other settings.
        OSError: one cannot be read for now.
    """
    try:
        checkpoint = store.latest()
    except NoWholeCheckpoint as error:
        if not config.start_anew:
            raise ValueError(
                f"{error}. Put a whole one back from a copy, or start anew with --start-anew, which leaves these until "
                "new ones take their names"
            ) from error
        logger.warning("starting anew: %s", error)
        checkpoint = None
    if checkpoint is None:
        return 0, 0
    try:
        checkpoint.load_into(task)
        load_optimizer_tensors(optimizer, task, checkpoint.tensors("optimizer"))
        sampler.load_state(checkpoint.progress["sampler"])
        skipped = int(checkpoint.progress["skipped"])
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{checkpoint.directory} is not a checkpoint of these settings: {error}") from error
    return checkpoint.step, skipped


def _opening(config: PretrainConfig, step: int, clips: int, task: ProxyTask, processes: Processes) -> str:
    """What is trained, on what and by what, in a line."""
    place = f"goes on from step {step}" if step else "begins"
    if not step and config.init_from:
        place += f" with the weights of {config.init_from} ({config.init_parts})"
    if step == config.steps:
        place = "is finished already"
    together = config.batch_size * config.accumulate
    device = f"{processes.size} x {processes.device.type}" if processes.size > 1 else str(processes.device)
    precision = "bf16" if use_bf16(config.precision, processes.device) else "fp32"
    parameters = sum(parameter.numel() for parameter in task.parameters())
    return (
        f"{config.out} {place}: {config.task}, {config.steps:,} steps of {together} of {clips:,} clips "
        f"({config.steps * together / clips:.1f} epochs), {parameters:,} parameters, {device}, {precision}"
    )


def _check_alike(task: ProxyTask, step: int, processes: Processes) -> None:
    """ValueError unless all processes start from the same step and weights."""
    if processes.size == 1:
        return
    sums = [parameter.detach().double().abs().sum() for parameter in task.parameters()]
    state = torch.stack([torch.full_like(sums[0], step), torch.stack(sums).sum()])
    processes.check_same(state, "[step, sum of weights] (is --out on a file system that all nodes share?)")


def _check_skipped(config: PretrainConfig, skipped: SkippedSteps, report: SkippedReport, step: int) -> int:
    """Names the clips of the steps skipped since the last call; returns how many steps were skipped in all."""
    total, in_row = skipped.counts()
    new, remembered = skipped.new(total)
    blame = report.write(remembered)
    limit = config.scale.max_skipped_steps
    clips = "their clips" if len(remembered) == new else f"the clips of the last {len(remembered)}"
    where = f"{clips} are in {config.out / SKIPPED_FILE}; {blame}"
    if in_row > limit:
        raise FloatingPointError(
            f"loss or gradient were not finite in the last {in_row} steps up to step {step} "
            f"(scale.max_skipped_steps={limit}); {where}. Lower optimizer.learning_rate, or leave these clips out"
        )
    if new:
        logger.warning("skipped %d steps up to step %d, their loss or gradient not finite; %s", new, step, where)
    return total


def _speed(config: PretrainConfig, steps: int, seconds: float, wait_seconds: float) -> dict[str, float]:
    """Metrics of steps that took so many seconds, of which the loader was waited for wait_seconds."""
    clips = steps * config.batch_size * config.accumulate
    return {"clips_per_second": clips / seconds, "data_wait": wait_seconds / seconds}


def _progress_text(row: dict[str, Any], groups: Mapping[str, float], others: float | None) -> str:
    """What the progress bar shows of a row of metrics, and of other programs on the same processors."""
    text = f"loss {row['loss']:.3f}  {row['clips_per_second']:.0f} clips/s  data wait {row['data_wait']:.0%}"
    if row["skipped"]:
        text += f"  {row['skipped']} skipped"
    if others is not None and others >= SHARED_MACHINE:
        text += f"  other programs take {others:.0%} of the processors"
    return "  ".join([text, *(f"{group} {share:.0%}" for group, share in groups.items())])


def _finish(config: PretrainConfig, task: ProxyTask, processes: Processes, log: RunLog) -> Path:
    path = config.out / ENCODER_FILE
    if processes.main:
        encoder: nn.Module = task.video_encoder
        if isinstance(encoder, OwnEncoder):
            save_own_encoder(encoder.module, path)
        else:
            save_encoder(task.video_encoder, path)
        log.say(f"encoder written to {path}")
    processes.barrier()
    return path
