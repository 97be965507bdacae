"""Which sub-tasks are learned, and how their losses are weighed: fixed, learned, or by how hard each pulls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avppc.losses.config import ObjectiveConfig
from avppc.losses.permutative_info_nce import SIZE_GROUPS, SubTask

GROUPS = (*SIZE_GROUPS, "between", "within", "mixed")


def fixed_weights(config: ObjectiveConfig, subtasks: Sequence[SubTask]) -> list[float] | None:
    """One weight a sub-task; None if the weights are found during training, by what `make_weighting` gives."""
    if config.weighting == "modality":
        return [config.between_weight if task.between_modalities else config.other_weight for task in subtasks]
    if config.weighting == "equal":
        return [1.0] * len(subtasks)
    if config.weighting == "group":
        sizes = [task.group for task in subtasks]
        totals = dict(zip(SIZE_GROUPS, config.group_weights, strict=True))
        return [totals[group] / sizes.count(group) for group in sizes]
    return None


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
