"""The 42 sub-tasks; which of them are learned, and how their losses are weighed: fixed, learned, or by their pull.

A clip gives four elements: its past and its future, each seen (V) and heard (A). Every set of one or two elements
predicts every disjoint set of one or two.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avppc.losses.config import ObjectiveConfig

ELEMENTS = ("Vp", "Vf", "Ap", "Af")
SIZE_GROUPS = ("1to1", "1to2", "2to1", "2to2")  # how many elements predict how many
OTHER_TIME = {"Vp": "Vf", "Vf": "Vp", "Ap": "Af", "Af": "Ap"}

ElementNames = tuple[str, ...]


class SubTask(NamedTuple):
    """One sub-task: a set of elements predicts a disjoint set."""

    name: str
    """For example "Vp,Ap->Vf"."""
    inputs: ElementNames
    """The elements of the context."""
    targets: ElementNames
    """The elements that are predicted."""
    group: str
    """"1to1", "1to2", "2to1" or "2to2": how many elements predict how many."""

    @property
    def between_modalities(self) -> bool:
        """Whether what is seen alone predicts what is heard alone, or the other way round."""
        seen, heard = ({element[0] for element in side} for side in (self.inputs, self.targets))
        return len(seen) == len(heard) == 1 and seen != heard

    @property
    def same_time(self) -> bool:
        """Whether one element is predicted from the other one of its time, as in "Vp->Ap"."""
        return len(self.inputs) == len(self.targets) == 1 and self.inputs[0][1] == self.targets[0][1]

    @property
    def crosses_both(self) -> bool:
        """Whether one element is predicted from the one of the other modality and the other time, as in "Vp->Af"."""
        return self.between_modalities and self.group == "1to1" and not self.same_time

    @property
    def whole_clip(self) -> bool:
        """Whether all that is heard is predicted from all that is seen, or the other way round."""
        return self.between_modalities and self.group == "2to2"


def _all_subtasks() -> tuple[SubTask, ...]:
    singles, doubles = ([*itertools.combinations(ELEMENTS, size)] for size in (1, 2))
    subtasks = []
    for inputs_sets, targets_sets in itertools.product((singles, doubles), repeat=2):
        # combinations() keeps the order of ELEMENTS, so the product is lexicographic by (inputs, targets)
        for inputs, targets in itertools.product(inputs_sets, targets_sets):
            if not set(inputs) & set(targets):
                name = f"{','.join(inputs)}->{','.join(targets)}"
                subtasks.append(SubTask(name, inputs, targets, f"{len(inputs)}to{len(targets)}"))
    return tuple(subtasks)


SUBTASKS = _all_subtasks()
"""The 42 sub-tasks: 12 "1to1", 12 "1to2", 12 "2to1", 6 "2to2", in the order of ELEMENTS inside each group."""

BY_NAME = {subtask.name: subtask for subtask in SUBTASKS}
GROUPS = (*SIZE_GROUPS, "between", "within", "mixed")


def fixed_weights(config: ObjectiveConfig, subtasks: Sequence[SubTask]) -> list[float] | None:
    """One weight a sub-task; None if the weights are found during training, by what `make_weighting` gives."""
    if config.weighting == "modality":
        weights = [config.between_weight if task.between_modalities else config.other_weight for task in subtasks]
        return _with_shares_of_moments(config, weights, subtasks)
    if config.weighting == "equal":
        return [1.0] * len(subtasks)
    if config.weighting == "group":
        sizes = [task.group for task in subtasks]
        totals = dict(zip(SIZE_GROUPS, config.group_weights, strict=True))
        return [totals[group] / sizes.count(group) for group in sizes]
    return None


def is_by_moment(config: ObjectiveConfig, subtask: SubTask) -> bool:
    """Whether a sub-task is scored moment by moment."""
    by_clip = subtask.whole_clip or (subtask.crosses_both and bool(config.moment_offsets))
    return {"none": False, "element": subtask.same_time, "clip": by_clip}[config.moments]


def _with_shares_of_moments(config: ObjectiveConfig, weights: list[float], subtasks: Sequence[SubTask]) -> list[float]:
    """The weights with those of the sub-tasks by moments changed: together they are moment_share of all, and those at
    offsets offset_share of these; inside each of the two groups they are equal."""
    marks = [is_by_moment(config, task) for task in subtasks]
    rest = sum(weight for weight, marked in zip(weights, marks, strict=True) if not marked)
    share = config.moment_share if rest else 1.0
    counts = Counter(task.crosses_both for task, marked in zip(subtasks, marks, strict=True) if marked)
    if not counts:
        return weights
    total = rest * share / (1 - share) if share < 1 else 1.0
    parts = (
        {True: config.offset_share, False: 1 - config.offset_share} if len(counts) == 2 else {next(iter(counts)): 1.0}
    )
    each = {crosses: total * part / counts[crosses] for crosses, part in parts.items()}
    others = 1.0 if share < 1 else 0.0
    return [
        each[task.crosses_both] if marked else others * weight
        for task, weight, marked in zip(subtasks, weights, marks, strict=True)
    ]


def make_weighting(config: ObjectiveConfig, subtasks: Sequence[SubTask]) -> Weighting | None:
    """The module that turns K losses into one; None for fixed weights, which the loss itself applies."""
    if config.weighting == "uncertainty":
        return UncertaintyWeighting(len(subtasks))
    if config.weighting == "gradient-norm":
        return GradientNormWeighting(len(subtasks), config.gradient_norm_power)
    return None


class Weighting(nn.Module):
    """K losses become one."""

    def forward(
        self,
        losses: Tensor,  # [K], with gradient
        embeddings: Sequence[Tensor],  # what all the losses were computed from
    ) -> Tensor:
        raise NotImplementedError

    def weights(self) -> Tensor:
        """[K] the current weights, of mean 1."""
        raise NotImplementedError


class UncertaintyWeighting(Weighting):
    """loss = mean_k exp(-s_k) loss_k + s_k / 2, with s_k learned: a sub-task whose loss is small gets a large weight.

    Reference: Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(tasks))

    def forward(self, losses: Tensor, embeddings: Sequence[Tensor]) -> Tensor:
        return ((-self.log_variance).exp() * losses + self.log_variance / 2).mean()

    def weights(self) -> Tensor:
        precision = (-self.log_variance.detach()).exp()
        return precision / precision.mean()


class GradientNormWeighting(Weighting):
    """Weights that make the norm of each sub-task's gradient at the embeddings proportional to loss^power.

    Every `every` batches w_k = (loss_k / mean loss)^power / |gradient_k|, smoothed over batches. The published method
    moves the weights towards this balance by gradient descent; here they are set to it.

    Reference: Chen, Badrinarayanan, Lee, Rabinovich, "GradNorm", ICML 2018.
    """

    current: Tensor
    batches: Tensor

    def __init__(self, tasks: int, power: float, every: int = 20, smoothing: float = 0.7) -> None:
        super().__init__()
        self.power, self.every, self.smoothing = power, every, smoothing
        # Both are part of the run's state: a run that was stopped goes on with the same weights.
        self.register_buffer("current", torch.ones(tasks))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, losses: Tensor, embeddings: Sequence[Tensor]) -> Tensor:
        if self.training and torch.is_grad_enabled():
            if int(self.batches) % self.every == 0:
                self._balance(losses, embeddings)
            self.batches += 1
        return (self.current * losses).mean()

    def weights(self) -> Tensor:
        return self.current

    def _balance(self, losses: Tensor, embeddings: Sequence[Tensor]) -> None:
        norms = torch.stack([gradient.norm() for gradient in task_gradients(losses, embeddings)])
        values = torch.stack([norms, losses.detach().float()])
        if dist.is_available() and dist.is_initialized():  # every process must use the same weights
            dist.all_reduce(values)
            values /= dist.get_world_size()
        norms, means = values
        wanted = (means / means.mean().clamp_min(1e-12)) ** self.power / norms.clamp_min(1e-12)
        wanted = wanted / wanted.mean()
        smoothing = self.smoothing if int(self.batches) else 0.0
        self.current.copy_(smoothing * self.current + (1.0 - smoothing) * wanted)


def task_gradients(losses: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """[K] vectors: the gradient of each loss with respect to all inputs together; the graph stays usable."""
    gradients = []
    for loss in losses.unbind():
        parts = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        flat = [
            torch.zeros_like(value).flatten() if part is None else part.flatten()
            for part, value in zip(parts, inputs, strict=True)
        ]
        gradients.append(torch.cat(flat).float())
    return gradients


def modality_group(subtask: SubTask) -> str:
    """ "between": sound from picture alone, or the reverse; "within": one modality only; "mixed": all others."""
    if subtask.between_modalities:
        return "between"
    return "within" if len({element[0] for element in (*subtask.inputs, *subtask.targets)}) == 1 else "mixed"


def check_subtasks(subtasks: Sequence[SubTask | str]) -> tuple[SubTask, ...]:
    """The sub-tasks, found by name if need be; TypeError or ValueError unless they are different ones of SUBTASKS."""
    if isinstance(subtasks, (str, SubTask, Tensor)) or not isinstance(subtasks, Collection):
        raise TypeError(f"subtasks must be a sequence of SubTask or names, got {subtasks!r}")
    chosen = []
    for subtask in subtasks:
        if not isinstance(subtask, (str, SubTask)):
            raise TypeError(f"subtasks must hold SubTask or names, got {subtask!r}")
        name = subtask if isinstance(subtask, str) else str(subtask.name)
        if name not in BY_NAME or subtask not in (name, BY_NAME[name]):
            raise ValueError(f"subtasks must be taken from SUBTASKS, such as 'Vp,Ap->Vf'; got {subtask!r}")
        chosen.append(BY_NAME[name])
    if not chosen:
        raise ValueError("subtasks must hold at least one sub-task, got none")
    if len(set(chosen)) < len(chosen):
        twice = next(subtask.name for subtask in chosen if chosen.count(subtask) > 1)
        raise ValueError(f"subtasks must not repeat one, got {twice!r} more than once")
    return tuple(chosen)


def choose_subtasks(available: Sequence[SubTask], chosen: str = "", excluded: str = "") -> tuple[SubTask, ...]:
    """The sub-tasks that `chosen` names (all for ""), in their order, without those that `excluded` names.

    Raises:
        ValueError: a text names no group or sub-task, is ambiguous, or leaves nothing.
    """
    for name, text in (("subtasks", chosen), ("exclude", excluded)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a str, got {type(text).__name__}")
    wanted = _named("subtasks", chosen, available) if chosen else set(available)
    unwanted = _named("exclude", excluded, available) if excluded else set()
    left = tuple(subtask for subtask in available if subtask in wanted and subtask not in unwanted)
    if not left:
        raise ValueError(f"subtasks={chosen!r} without exclude={excluded!r} leaves no sub-task to learn")
    return left


def _named(argument: str, text: str, available: Sequence[SubTask]) -> set[SubTask]:
    members = {group: {task for task in available if group in (task.group, modality_group(task))} for group in GROUPS}
    members |= {task.name: {task} for task in available}
    readings = _readings(text.replace(" ", "").split(","), members.keys())
    if len(readings) > 1:
        raise ValueError(f"{argument}: {text!r} can be read as {' or '.join(map(' and '.join, readings))}")
    if not readings:
        raise ValueError(
            f"{argument} must hold groups ({', '.join(GROUPS)}) or sub-tasks such as {available[-1].name!r}, with "
            f"commas between them; got {text!r}"
        )
    return set().union(*(members[name] for name in readings[0]))


def _readings(words: list[str], names: object) -> list[list[str]]:
    """Every way to join the words into names; a name has at most two commas of its own."""
    if not words:
        return [[]]
    found = []
    for length in (1, 2, 3):
        name = ",".join(words[:length])
        if len(words) >= length and name in names:  # type: ignore[operator]  # a set of keys
            found += [[name, *rest] for rest in _readings(words[length:], names)]
    return found
