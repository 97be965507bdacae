"""A guard against shortcuts: where picture, sound, past and future are of unrelated clips, tasks stay at chance.

What is right there comes from something else than speech: padding, the place in the clip, the order of the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from task_cases import PLAIN, make_config, make_opening_mouths
from test_baseline_tasks import CASES, IDS

from avppc import ClipBatch
from avppc.clip import CLIP_FRAMES
from avppc.losses.subtasks import is_by_moment
from avppc.tasks.base import ProxyTask
from avppc.tasks.permutative import PermutativeBase
from avppc.tasks.registry import make_task
from avppc.tasks.visual import VisualMomentTask

STEPS, TRAINED_ON, TESTED_ON, TEST_BATCHES = 60, 12, 32, 6
DEVIATIONS = 5.0


@functools.cache
def unrelated_clips(count: int, seed: int) -> ClipBatch:
    """Mouths whose past, future and sound are of different clips each, and so is the sound's past and future."""
    parts = [make_opening_mouths(count, 10_000 + 4 * seed + part) for part in range(4)]
    frames = parts[0].video.shape[1] // 2
    video = torch.cat([parts[0].video[:, :frames], parts[1].video[:, frames:]], 1)
    samples = 640 * frames
    audio = torch.cat([parts[2].audio[:, :samples], parts[3].audio[:, samples:]], 1)
    return dataclasses.replace(parts[0], video=video, audio=audio)


def without_time(batch: ClipBatch, seed: int) -> ClipBatch:
    """The same with the frames of each clip in random order: nothing tells forward from backward."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch.video.shape[:2], generator=generator).argsort(1)
    return dataclasses.replace(batch, video=batch.video[torch.arange(len(order))[:, None], order])


def clips_for(name: str, count: int, seed: int) -> ClipBatch:
    batch = unrelated_clips(count, seed)
    return without_time(batch, seed) if name in ("time-arrow", "visual-permutative") else batch


def train(task: ProxyTask, name: str) -> None:
    task.train()
    optimizer = torch.optim.Adam(task.parameters(), 5e-3)
    for step in range(STEPS):
        output = task(clips_for(name, TRAINED_ON, step), torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    task.eval()


def deviations(rates: torch.Tensor, chance: float, trials: int) -> float:
    """How many standard deviations the best of some rates over `trials` independent trials lies above chance."""
    return (float(rates.max()) - chance) / math.sqrt(chance * (1 - chance) / trials)


def candidates_of_moments(task: ProxyTask) -> int:
    """How many moments one is told from, itself included."""
    objective = task.config.objective
    frames = task.span_frames if objective.moments == "element" else CLIP_FRAMES - PLAIN.time_jitter_frames
    own = task.count_moments(frames)
    return {"clip": own, "moment": TESTED_ON, "both": own + TESTED_ON - 1}[objective.candidates]


every_kind = pytest.mark.parametrize(
    ("name", "changes"),
    [
        *CASES,
        ("visual-permutative", {"objective": {"moments": "none"}}),
        ("av-permutative", {"objective": {"moments": "none"}}),
        ("av-permutative", {"objective": {"moments": "clip", "candidates": "clip"}}),
        ("av-permutative", {"objective": {"moments": "element", "candidates": "moment"}}),
        ("av-permutative", {"objective": {"moments": "element", "candidates": "clip"}}),
    ],
    ids=[*IDS, "visual-spans", "spans", "moments-of-a-clip", "same-moments-of-elements", "moments-of-elements"],
)


@every_kind
@torch.no_grad()
def test_unrelated_clips_leave_a_task_at_chance(name: str, changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    task = make_task(name, make_config(name, **changes, augment=PLAIN))
    with torch.enable_grad():
        train(task, name)
    batches = [clips_for(name, TESTED_ON, 900 + number) for number in range(TEST_BATCHES)]
    outputs = [task(batch, torch.Generator().manual_seed(0)) for batch in batches]
    clips = TEST_BATCHES * TESTED_ON
    if isinstance(task, PermutativeBase):
        rates = torch.stack([output.metrics["task_accuracy"] for output in outputs]).mean(0)
        for subtask, rate in zip(task.loss.subtasks, rates, strict=True):
            chance = 1 / TESTED_ON
            if is_by_moment(task.config.objective, subtask) and task.with_audio:
                chance = 1 / candidates_of_moments(task)
            assert deviations(rate, chance, clips) < DEVIATIONS, subtask
    elif isinstance(task, VisualMomentTask):
        # moments that a state has seen, or shares a frame with, are known not to be the next
        unseen = task.count_moments(CLIP_FRAMES - PLAIN.time_jitter_frames) - task.first_horizon
        left = range(unseen, task.HORIZONS - 1, -1)
        chance = sum(1 / candidates for candidates in left) / len(left)
        rates = torch.stack([output.metrics["task_accuracy"] for output in outputs]).mean(0)
        assert deviations(rates, chance, clips) < 3
    else:
        rate = torch.stack([output.metrics["right"] for output in outputs]).mean()
        chance = 0.5
        if changes.get("baselines") == {"sync_mode": "multiway"}:
            chance = 1 / task.similarity(batches[0].video, batches[0].audio, torch.Generator()).shape[1]
        assert deviations(rate, chance, clips) < DEVIATIONS
    scores = [task.offset_scores(batch, torch.Generator().manual_seed(0)) for batch in batches]
    if scores[0] is None:
        return
    table = torch.cat(scores)
    best = table.argmax(1).bincount(minlength=table.shape[1]) / len(table)
    assert deviations(best[table.shape[1] // 2], 1 / table.shape[1], clips) < DEVIATIONS
