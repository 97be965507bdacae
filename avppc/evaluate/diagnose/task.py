"""What a trained proxy task knows, measured on whole splits with the task's own heads.

Retrieval, nearest neighbours and accuracy among chosen candidates are plain arithmetic on scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from avppc.clip import ClipBatch
from avppc.data.packed.dataset import Clips
from avppc.data.packed.loader import EpochSampler, iterate_once
from avppc.losses.subtasks import task_gradients
from avppc.tasks.base import ProxyTask, cut_elements
from avppc.tasks.permutative import PermutativeBase, PermutativeTask
from avppc.tasks.registry import make_task
from avppc.train.checkpoint import CheckpointStore
from avppc.train.config import PretrainConfig
from avppc.train.hardware import autocast
from avppc.train.run_folder import read_run_config

KINDS = ("V>V", "A>A", "V>A", "A>V", "V>M", "A>M", "M>V", "M>A", "M>M")
"""What predicts what: picture (V), sound (A), or one element of each (M)."""


@dataclass(frozen=True)
class TrainedTask:
    """A proxy task with the final weights of its run."""

    task: ProxyTask
    config: PretrainConfig
    device: torch.device
    bf16: bool

    def generator(self) -> torch.Generator:
        """A generator, which tasks ask for, though nothing is drawn in evaluation."""
        return torch.Generator().manual_seed(0)

    def batches(self, dataset: Clips) -> Iterator[ClipBatch]:
        """The clips of a split in order, on the task's device."""
        for batch in iterate_once(dataset):
            yield batch.to(self.device)


def load_task(run: Path, device: torch.device, bf16: bool) -> TrainedTask:
    """The task of a run in eval mode.

    Raises:
        FileNotFoundError: there is no run, or it has no checkpoint.
        ValueError: its checkpoints are damaged, or not of its settings.
        OSError: a checkpoint cannot be read for now.
    """
    config = read_run_config(run)
    checkpoint = CheckpointStore(run / "checkpoints", config.keep_checkpoints).latest()
    if checkpoint is None:
        raise FileNotFoundError(f"{run / 'checkpoints'} holds no whole checkpoint: run must be a pretraining run")
    task = make_task(config.task, config)
    checkpoint.load_into(task)
    return TrainedTask(task.to(device).eval(), config, device, bf16)


@torch.inference_mode()
def retrieval(trained: TrainedTask, dataset: Clips) -> dict[str, Any] | None:
    """Which sound belongs to which picture of the past, among all clips of a split; None if the task cannot tell."""
    seen, heard = [], []
    task = trained.task
    if not task.has_pair_scores:
        return None
    jitter = trained.config.augment.time_jitter_frames
    for batch in trained.batches(dataset):
        elements = cut_elements(batch, trained.config.cut, jitter_frames=jitter)
        past = slice(0, len(batch))
        with autocast(trained.device, trained.bf16):
            seen.append(task.embed_video(elements.video[past], trained.generator()))
            heard.append(task.embed_audio(elements.audio[past], trained.generator()))
    scores = task.pair_scores(torch.cat(seen), torch.cat(heard))
    return {
        "clips": len(scores),
        "sound_by_picture": recall_at(scores),
        "picture_by_sound": recall_at(scores.T),
    }


@torch.inference_mode()
def offset_accuracy(trained: TrainedTask, dataset: Clips, within: int = 1) -> dict[str, Any] | None:
    """How often the best of all offsets of the sound is the right one; None if the task cannot tell offsets."""
    errors, choices = [], 0
    for batch in trained.batches(dataset):
        with autocast(trained.device, trained.bf16):
            scores = trained.task.offset_scores(batch, trained.generator())
        if scores is None:
            return None
        middle = (scores.shape[1] - 1) // 2
        choices = scores.shape[1]
        errors.append((scores.argmax(1) - middle).abs().cpu())
    error = torch.cat(errors)
    reach = trained.task.offset_frames
    width = 1 + 2 * (within // reach)
    return {
        "clips": len(error),
        "within_frames": within,
        "accuracy": (error * reach <= within).float().mean().item(),
        "chance": width / choices,
        "mean_error_frames": (error * reach).float().mean().item(),
        "offsets": choices,
    }


@torch.inference_mode()
def shortcut_report(trained: TrainedTask, dataset: Clips) -> dict[str, Any] | None:
    """Accuracy of each sub-task if the candidates share the speaker, or the clip; None if the task is not permutative.

    Beside each accuracy is the one expected with as many candidates drawn from all clips; the difference is what the
    speaker gives away. "own_clip" has one false candidate, the target's own clip with past and future swapped.
    """
    task = trained.task
    if not isinstance(task, PermutativeTask):
        return None
    batches = []
    for batch in trained.batches(dataset):
        with autocast(trained.device, trained.bf16):
            batches.append(task.represent(batch, trained.generator()))
    count = len(dataset)
    whole = [None if parts[0] is None else torch.cat(parts) for parts in zip(*batches, strict=True)]
    logits = task.logits(whole, swapped=True)
    true, swapped = logits[:, :, :count], logits[:, :, count:]
    speakers = dataset.speakers.to(trained.device)
    same_speaker = (speakers[:, None] == speakers[None, :]) & (speakers[:, None] >= 0)
    everything = torch.ones(count, count, dtype=torch.bool, device=trained.device)
    own_clip = (true.diagonal(dim1=1, dim2=2) > swapped.diagonal(dim1=1, dim2=2)).double().mean(1)
    columns = {"all_clips": accuracy_among(true, everything)[0], "own_clip": own_clip}
    others = same_speaker.sum(1) - 1
    if bool((others > 0).any()):
        columns["same_speaker"], columns["as_many_of_all"] = accuracy_among(true, same_speaker)
    rates = {name: [float(value) for value in column] for name, column in columns.items()}
    kinds = subtask_kinds(task)
    return {
        "clips": count,
        "mean_false_candidates_of_speaker": float(others[others > 0].double().mean()) if len(columns) > 2 else 0.0,
        "subtasks": task.subtask_names(),
        "accuracy": rates,
        "by_kind": {
            kind: {name: sum(column[k] for k in members) / len(members) for name, column in rates.items()}
            for kind, members in kinds.items()
        },
    }


def subtask_kinds(task: PermutativeBase) -> dict[str, list[int]]:
    """Numbers of the sub-tasks of each kind in KINDS that occurs."""

    def side(elements: Sequence[str]) -> str:
        letters = {element[0] for element in elements}
        return "M" if len(letters) == 2 else letters.pop()

    found: dict[str, list[int]] = {}
    for number, subtask in enumerate(task.loss.subtasks):
        found.setdefault(f"{side(subtask.inputs)}>{side(subtask.targets)}", []).append(number)
    return {kind: found[kind] for kind in KINDS if kind in found}


def gradient_conflict(trained: TrainedTask, dataset: Clips, batches: int, seed: int) -> dict[str, Any] | None:
    """Cosines between the gradients that groups of sub-tasks send to the visual encoder; None: not a permutative task.

    A negative cosine says that two groups pull against each other. Groups that send no gradient are left out.
    """
    task = trained.task
    if not isinstance(task, PermutativeTask):
        return None
    state = {name: value.clone() for name, value in task.state_dict().items()}
    parameters = [*task.video_encoder.parameters()]
    sampler = EpochSampler(len(dataset), min(trained.config.batch_size, len(dataset)), seed=seed)
    cosines, norms, kinds = [], [], subtask_kinds(task)
    task.train()
    for number in range(batches):
        batch = dataset.batch(next(sampler)).to(trained.device)
        with autocast(trained.device, trained.bf16):
            representations = task.represent(batch, torch.Generator().manual_seed(seed + number))
        logits = task.logits(representations)
        truth = torch.arange(len(batch), device=trained.device)
        losses = torch.stack([functional.cross_entropy(scores, truth) for scores in logits])
        of_kinds = torch.stack([losses[members].mean() for members in kinds.values()])
        stacked = torch.stack(task_gradients(of_kinds, parameters)).double()
        norms.append(stacked.norm(dim=1))
        unit = functional.normalize(stacked, dim=1)
        cosines.append(unit @ unit.T)
    task.load_state_dict(state)  # these batches changed the batch norms
    task.eval()
    norm = torch.stack(norms).mean(0)
    seen = norm > 0
    matrix = torch.stack(cosines).mean(0)[seen][:, seen]
    return {
        "groups": [kind for kind, there in zip(kinds, seen.tolist(), strict=True) if there],
        "cosines": matrix.tolist(),
        "norms": norm[seen].tolist(),
        "batches": batches,
    }


def ranks_of_positives(scores: Tensor) -> Tensor:  # [..., N, M], the positive of row i in column i
    """[..., N] how many other candidates score at least as high as the positive: 0 is the best.

    A tie counts against the positive, so that equal scores are no success.
    """
    positives = scores.diagonal(dim1=-2, dim2=-1)
    return (scores >= positives.unsqueeze(-1)).sum(-1) - 1


def recall_at(scores: Tensor, counts: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:  # [N, M]
    """R@k for each k, 0 to 1, and the median rank, 1 being the best."""
    ranks = ranks_of_positives(scores)
    found = {f"r@{count}": (ranks < count).float().mean().item() for count in counts}
    return {**found, "median_rank": ranks.float().median().item() + 1}


def accuracy_among(scores: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:  # [K, N, M], [N, M] bool
    """Accuracy among certain candidates, and the accuracy expected among as many drawn from all others.

    Args:
        scores: the positive of row i is column i.
        allowed: the candidates of row i beside its positive; rows without one do not count.

    Returns:
        Two [K]: the share of rows whose positive beats all allowed candidates; and its expected value for as many
        candidates drawn at random, without replacement, from all that are not the positive.
    """
    others = ~torch.eye(*allowed.shape, dtype=torch.bool, device=allowed.device)
    allowed = allowed & others
    rows = allowed.any(1)
    beaten = scores.diagonal(dim1=1, dim2=2).unsqueeze(2) > scores  # [K, N, M]
    won = (beaten | ~allowed).all(2)[:, rows].double().mean(1)
    # C(b, m) / C(o, m): m candidates out of o, all of them among the b that are beaten
    m = allowed.sum(1).double()
    o = others.sum(1).double()
    b = (beaten & others).sum(2).double()
    chance = torch.exp(_log_choose(b.clamp_min(0), m) - _log_choose(o, m))
    chance = torch.where(b >= m, chance, torch.zeros_like(chance))
    return won, chance[:, rows].mean(1)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """log of the binomial coefficient, for n >= k; anything finite for n < k."""
    n = torch.maximum(n, k)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def vote_of_neighbours(
    train: Tensor,  # [n, D]
    labels: Tensor,  # [n] from 0
    test: Tensor,  # [m, D]
    neighbours: int,
) -> Tensor:
    """[m] the word with most votes of the nearest training clips by cosine, each vote weighted by exp(10 cosine)."""
    similarity = functional.normalize(test, dim=1) @ functional.normalize(train, dim=1).T
    weights, nearest = similarity.topk(min(neighbours, len(train)), 1)
    votes = torch.zeros(len(test), int(labels.max()) + 1, dtype=weights.dtype)
    votes.scatter_add_(1, labels[nearest], (10.0 * weights).exp())
    return votes.argmax(1)
