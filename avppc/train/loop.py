"""Pretraining, from packed clips to an encoder file: read `pretrain` from top to bottom."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from avppc.config.pretrain import PretrainConfig
from avppc.data.loader import ClipLoader
from avppc.data.packed import PackedDataset
from avppc.data.sampler import EpochSampler
from avppc.files import write_json
from avppc.models.encoder_file import ENCODER_FILE, save_encoder
from avppc.tasks.protocol import ProxyTask
from avppc.tasks.registry import make_task
from avppc.train.hardware import autocast, keep_memory, resolve_device, use_bf16
from avppc.train.log import Meter, MetricsLog, Stopwatch, TrainingProgress
from avppc.train.optimizer import learning_rate_at, make_optimizer, set_learning_rate
from avppc.train.run import TASK_FILE, open_run
from avppc.train.state import CheckpointStore, load_optimizer_tensors, optimizer_tensors


def run(config: PretrainConfig) -> int:
    """`avppc pretrain`: trains, or goes on where the run in config.out was stopped; returns 0."""
    pretrain(config)
    return 0


def pretrain(config: PretrainConfig) -> Path:
    """Pretrains an encoder and returns its file.

    Every draw of step i comes from (seed, i), and the order of the clips from (seed, epoch): a run that was killed and
    is started again by the same call gives, on a CPU, bit for bit the weights of an undisturbed one.

    Raises:
        ValueError: settings that do not fit the data, or a directory that holds another run.
        FloatingPointError: the loss is not finite.
    """
    device = resolve_device(config.device)
    bf16 = use_bf16(config.precision, device)
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_memory()

    dataset = PackedDataset(config.data, "train", verify=config.verify_data)
    if len(dataset) < config.batch_size:
        raise ValueError(f"batch_size is {config.batch_size}, but {config.data} has {len(dataset)} training clips")
    if min(dataset.shape.height, dataset.shape.width) < config.encoder.crop_pixels:
        raise ValueError(
            f"encoder.crop_pixels is {config.encoder.crop_pixels}, but the clips of {config.data} have "
            f"{dataset.shape.height} x {dataset.shape.width} pixels"
        )
    sampler = EpochSampler(
        len(dataset),
        config.batch_size,
        seed=config.seed,
        speakers=dataset.speakers,
        speakers_per_batch=config.speakers_per_batch or None,
    )
    torch.manual_seed(config.seed)
    task = make_task(config.task, config)
    open_run(config)
    task.to(device)
    optimizer = make_optimizer(task, config.optimizer)
    write_json(config.out / TASK_FILE, task.describe())

    store = CheckpointStore(config.out / "checkpoints", config.keep_checkpoints)
    step = _restore(store, task, optimizer, sampler)
    meter, watch, logged_step, waited = Meter(), Stopwatch(), step, 0.0
    task.train()
    with (
        contextlib.closing(MetricsLog(config.out, step)) as log,
        contextlib.closing(ClipLoader(dataset, sampler, device=device)) as loader,
        TrainingProgress("pretrain", config.steps, step) as progress,
    ):
        while step < config.steps:
            rate = learning_rate_at(step, config.steps, config.optimizer)
            set_learning_rate(optimizer, rate)
            for part in range(config.accumulate):
                generator = _seed_step(config.seed, step, part)
                with autocast(device, bf16):
                    output = task(next(loader), generator)
                (output.loss / config.accumulate).backward()
                meter.add({"loss": output.loss, **output.metrics})
            norm = torch.nn.utils.clip_grad_norm_(task.parameters(), config.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            if step % config.log_every == 0 or step == config.steps:
                row = {"step": step, "learning_rate": rate, "grad_norm": norm.item(), **meter.take()}
                row |= _speed(config, step - logged_step, watch.lap(), loader.wait_seconds - waited)
                logged_step, waited = step, loader.wait_seconds
                log.write(row)
                _check_finite(row)
                progress.show(step, _figures(row, task))
            else:
                progress.step_to(step)
            if step % config.checkpoint_every == 0 or step == config.steps:
                tensors = {"model": task.state_dict(), "optimizer": optimizer_tensors(optimizer, task)}
                store.save(step, tensors, {"sampler": loader.state()})
    return _finish(config, task)


def _restore(store: CheckpointStore, task: ProxyTask, optimizer: torch.optim.Optimizer, sampler: EpochSampler) -> int:
    """Puts everything back as the newest checkpoint has it; the steps done, 0 without one."""
    checkpoint = store.latest()
    if checkpoint is None:
        return 0
    try:
        task.load_state_dict(checkpoint.tensors("model"))
        load_optimizer_tensors(optimizer, task, checkpoint.tensors("optimizer"))
        sampler.load_state(checkpoint.progress["sampler"])
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{checkpoint.directory} is not a checkpoint of these settings: {error}") from error
    return checkpoint.step


def _seed_step(seed: int, step: int, part: int) -> torch.Generator:
    """The generator of one batch of one step; torch's own is seeded too, for dropout."""
    state = int(np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.manual_seed(state)
    return torch.Generator().manual_seed(state)


def _speed(config: PretrainConfig, steps: int, seconds: float, wait_seconds: float) -> dict[str, float]:
    clips = steps * config.batch_size * config.accumulate
    return {"clips_per_second": clips / seconds, "data_wait": wait_seconds / seconds}


def _check_finite(row: dict[str, Any]) -> None:
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(
            f"the loss is {row['loss']} at step {row['step']}: lower optimizer.learning_rate, or start from the last "
            "checkpoint with another seed"
        )


def _figures(row: dict[str, Any], task: ProxyTask) -> str:
    """The text right of the bar."""
    text = f"loss {row['loss']:.3f}  {row['clips_per_second']:.0f} clips/s  data wait {row['data_wait']:.0%}"
    return "  ".join([text, *(f"{group} {share:.0%}" for group, share in task.group_metrics(row).items())])


def _finish(config: PretrainConfig, task: ProxyTask) -> Path:
    path = config.out / ENCODER_FILE
    save_encoder(task.video_encoder, path)
    Console(stderr=True, soft_wrap=True).print(f"encoder written to {path}")
    return path
