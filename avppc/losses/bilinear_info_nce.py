"""BilinearInfoNCE: the op with its weights as an nn.Module; and the same where some sub-tasks score moments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from avppc.checks import FLOAT_DTYPES, check_bool, check_choice, check_integer, check_number, dtype_name
from avppc.ops.info_nce.agreement import GATHERS, has_others, refusal_told
from avppc.ops.info_nce.distributed import solve_gathered, solve_moments_gathered
from avppc.ops.info_nce.moments import Candidates, make_moment_problem, solve_moments
from avppc.ops.info_nce.op import BACKENDS, REDUCTIONS, InfoNCEStats, solve, solve_at_once
from avppc.ops.info_nce.problem import MomentProblem, Pairs, Problem, as_pairs, make_problem, product_dtype
from avppc.ops.modes import constant

NORMALIZATIONS = ("none", "layer_norm")
MAX_WIDTH = 1 << 20
MAX_TASKS = 1 << 20
_SETTINGS = (  # that the repr shows
    "initial_scale", "learn_scale", "normalize", "task_weights", "symmetric", "reduction", "backend", "gather",
    "return_stats",
)  # fmt: skip


def check_weight_list(weights: object) -> None:
    """Raises TypeError unless it is a collection, such as a list, and no tensor; BilinearInfoNCE checks the numbers."""
    if not isinstance(weights, Collection) or isinstance(weights, Tensor):
        raise TypeError(f"task_weights must hold one number a sub-task, got {weights!r}")


def _check_factor(name: str, value: float) -> None:
    check_number(name, value, 0.0)
    if value > torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite in float32, got {value}")


def _check_task_weights(weights: Sequence[float], tasks: int) -> None:
    check_weight_list(weights)
    for weight in weights:
        _check_factor("task_weights", weight)
    if not any(weights):
        raise ValueError("task_weights must hold a weight above 0, got none")
    if len(weights) != tasks:
        raise ValueError(f"task_weights must hold {tasks} weights, one a sub-task; got {len(weights)}")


def _fill(parameter: Any, value: Tensor) -> None:
    """Copies a value that every process has whole into a parameter, which may be sharded (a DTensor)."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        parameter.copy_(value)
        return
    from torch.distributed.tensor import DTensor, Replicate  # whoever shards has imported it

    whole = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    # As local parts: DTensor's own copy_ refuses a dimension of fewer elements than processes (torch 2.13).
    parameter.to_local().copy_(whole.redistribute(mesh, parameter.placements).to_local())


def check_like_module(name: str, value: object, weight: Tensor) -> None:
    """Raises unless value has the device of a module's weight and, unless autocast makes them alike, its dtype.

    Call it inside that module's forward: elsewhere a sharded weight may be stored in another dtype, on another device.
    What is no tensor of floating point numbers is left to other checks.
    """
    if not isinstance(value, Tensor) or value.dtype not in FLOAT_DTYPES:
        return
    if value.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} like the module, got {value.device}")
    if value.dtype != weight.dtype and product_dtype(value) != product_dtype(weight):
        wanted, got = dtype_name(weight.dtype), dtype_name(value.dtype)
        raise TypeError(f"{name} must have dtype {wanted} like the module where there is no autocast, got {got}")


class BilinearInfoNCE(nn.Module):
    """bilinear_info_nce with its weights W [K, Dz, Dc] (and, if wanted, its scale) as parameters.

    Args:
        context_dim: Dc, the width of the contexts.
        target_dim: Dz, the width of the targets.
        tasks: K, the number of sub-tasks; if pairs are given, their number.
        pairs: [K, 2] integers, the (context index, target index) of each sub-task; None: sub-task k uses context k
            and target k.
        scale: what the logits are multiplied by, above 0; its first value if it is learned.
        learn_scale: whether the scale is a parameter (its logarithm is, so that it stays positive).
        normalize: "none": embeddings are scored as they come; "layer_norm": each is first brought to mean 0 and
            variance 1.
        task_weights: K weights of the sub-tasks in the mean, at least 0: sum(w_k loss_k) / sum(w_k); None: equal.
        symmetric, reduction, backend: as in bilinear_info_nce.
        gather: "none": negatives of this process alone. With torch.distributed, "all": the targets of all processes,
            copied to each; "ring": the same loss and gradients with the targets passed round, which takes the memory of
            one process and more arithmetic. Each process returns the mean over its own rows, so that the gradients that
            DistributedDataParallel averages are those of one process with the whole batch; this module must be inside
            what it wraps. All processes must call it alike, after `eval()`, too.
        return_stats: whether a call also returns InfoNCEStats, unless the call says otherwise.

    W starts as I / sqrt(D), so that embeddings of unit variance give logits of unit variance.
    """

    log_scale: nn.Parameter | None

    def __init__(
        self,
        context_dim: int,
        target_dim: int,
        *,
        tasks: int = 1,
        pairs: Pairs | None = None,
        scale: float = 1.0,
        learn_scale: bool = False,
        normalize: str = "none",
        task_weights: Sequence[float] | None = None,
        symmetric: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        gather: str = "none",
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        check_integer("context_dim", context_dim, 1, MAX_WIDTH)
        check_integer("target_dim", target_dim, 1, MAX_WIDTH)
        check_integer("tasks", tasks, 1, MAX_TASKS)
        _check_factor("scale", scale)
        if scale == 0:
            raise ValueError("scale must be above 0, got 0")
        for name, switch in (("learn_scale", learn_scale), ("symmetric", symmetric), ("return_stats", return_stats)):
            check_bool(name, switch)
        check_choice("normalize", normalize, NORMALIZATIONS)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("backend", backend, BACKENDS)
        check_choice("gather", gather, GATHERS)
        if pairs is not None:
            pairs = as_pairs(pairs)
            if pairs.min() < 0:
                raise ValueError(f"pairs must hold indices from 0, got {int(pairs.min())}")
            if tasks not in (1, len(pairs)):
                raise ValueError(f"tasks must be left out or equal the {len(pairs)} pairs, got {tasks}")
            tasks = len(pairs)
        if task_weights is not None:
            _check_task_weights(task_weights, tasks)
        self.pairs = pairs
        self.initial_scale, self.learn_scale, self.normalize = scale, learn_scale, normalize
        self.task_weights = None if task_weights is None else tuple(task_weights)
        self.symmetric, self.reduction, self.backend = symmetric, reduction, backend
        self.gather, self.return_stats = gather, return_stats
        self.weight = nn.Parameter(torch.empty(tasks, target_dim, context_dim))
        self.log_scale = nn.Parameter(torch.empty(1)) if learn_scale else None  # FSDP shards nothing of 0 dimensions
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets W to I / sqrt(D) and the scale to its first value."""
        _, target_dim, context_dim = self.weight.shape
        with torch.no_grad():
            identity = torch.eye(target_dim, context_dim, device=self.weight.device)
            identity /= math.sqrt(min(target_dim, context_dim))
            _fill(self.weight, identity.expand(self.weight.shape))
            if self.log_scale is not None:
                self.log_scale.fill_(math.log(self.initial_scale))

    @property
    def scale(self) -> float | Tensor:
        """What the logits are multiplied by."""
        return self.initial_scale if self.log_scale is None else self.log_scale.exp().squeeze(0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        name = f"{prefix}log_scale"
        if isinstance(value := state_dict.get(name), Tensor) and value.ndim == 0:  # as it was up to version 0.1
            state_dict[name] = value.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @property
    def gathers(self) -> bool:
        """Whether the targets of other processes are negatives here."""
        return self.gather != "none" and has_others()

    @property
    def _is_bare(self) -> bool:
        """Whether a call is one of bilinear_info_nce and nothing else."""
        return self.normalize == "none" and self.task_weights is None and not self.gathers

    def refusal_told(self, device: torch.device) -> AbstractContextManager[None]:
        """A context for the checks of a call: the other processes, which wait for this one, learn of an error."""
        return refusal_told(device) if self.gathers else contextlib.nullcontext()

    def forward(
        self,
        contexts: Tensor,  # [C, N, Dc] or [N, Dc]
        targets: Tensor,  # [U, M, Dz] or [M, Dz]
        context_ids: Tensor | None = None,  # [N]
        target_ids: Tensor | None = None,  # [M]
        *,
        return_stats: bool | None = None,
    ) -> Tensor | tuple[Tensor, InfoNCEStats]:
        """The loss, or (loss, InfoNCEStats); the arguments are those of bilinear_info_nce."""
        with_stats = self.return_stats if return_stats is None else return_stats
        if self._is_bare and context_ids is None and target_ids is None and isinstance(with_stats, bool):
            arguments = contexts, targets, self.weight, self.pairs, self.scale, 0, self.symmetric
            found = solve_at_once(*arguments, self.reduction, self.backend, with_stats)
            if found is not None:
                return found
        with self.refusal_told(self.weight.device):
            check_bool("return_stats", with_stats)
            check_like_module("contexts", contexts, self.weight)
            problem = make_problem(
                contexts,
                targets,
                self.weight,
                self.pairs,
                scale=self.scale,
                context_ids=context_ids,
                target_ids=target_ids,
                symmetric=self.symmetric,
                layer_norm=self.normalize == "layer_norm",
            )
        stats: InfoNCEStats | None
        if self.gathers:
            loss, stats = solve_gathered(problem, self.gather, self.reduction, self.task_weights, self.backend)
        else:
            loss, stats = solve(problem, self.reduction, self.task_weights, self.backend, with_stats)
        return (loss, stats) if with_stats and stats is not None else loss

    def extra_repr(self) -> str:
        tasks, target_dim, context_dim = self.weight.shape
        settings = (f"{name}={getattr(self, name)!r}" for name in _SETTINGS)
        return f"{context_dim}, {target_dim}, tasks={tasks}, {', '.join(settings)}"


class Moments(NamedTuple):
    """Contexts and targets of some sub-tasks that score clips moment by moment."""

    tasks: tuple[int, ...]
    """P numbers of sub-tasks, from 0 to K - 1."""
    contexts: Tensor
    """[P, N, Tc, D], one for each sub-task in turn."""
    targets: Tensor
    """[P, N, Tz, D]"""
    further: int = 0
    """By which W they are scored: 0, the sub-task's own; i, the i-th of its further ones."""


class MomentInfoNCE(BilinearInfoNCE):
    """BilinearInfoNCE some of whose sub-tasks score clips moment by moment (moment_info_nce), where a call says so.

    Args:
        dim: the width of contexts and targets.
        pairs: as in BilinearInfoNCE.
        candidates: what a moment is told from, as in moment_info_nce.
        several: sub-tasks that score moments in several ways, each with a W; their loss is the mean over the ways.
        ways: how many.
        settings: the others of BilinearInfoNCE.
    """

    further_weight: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        pairs: Pairs,
        candidates: Candidates,
        *,
        several: tuple[int, ...] = (),
        ways: int = 1,
        **settings: Any,
    ) -> None:
        self.further_weight = None
        super().__init__(dim, dim, pairs=pairs, **settings)
        self.candidates = candidates
        self.several = several
        if several and ways > 1:
            self.further_weight = nn.Parameter(torch.empty(ways - 1, len(several), dim, dim))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.further_weight is not None:
            dim = self.weight.shape[-1]
            with torch.no_grad():
                identity = torch.eye(dim, device=self.further_weight.device) / math.sqrt(dim)
                _fill(self.further_weight, identity.expand(self.further_weight.shape))

    def forward(
        self,
        contexts: Tensor,  # [C, N, D]
        targets: Tensor,  # [U, M, D]
        context_ids: Tensor | None = None,  # [N]
        target_ids: Tensor | None = None,  # [M]
        *,
        moments: Sequence[Moments] = (),
        clip_ids: Tensor | None = None,  # [N]
        return_stats: bool | None = None,
    ) -> Tensor | tuple[Tensor, InfoNCEStats]:
        """As BilinearInfoNCE; the sub-tasks that have moments are scored by them, the others as there.

        Args:
            contexts, targets, context_ids, target_ids: as in bilinear_info_nce.
            moments: those that are scored by moments.
            clip_ids: ids of the clips that have these moments.
            return_stats: overrides the setting of the same name.
        """
        if not moments:
            return super().forward(contexts, targets, context_ids, target_ids, return_stats=return_stats)
        with_stats = self.return_stats if return_stats is None else return_stats
        by_moment = [task for part in moments for task in part.tasks]
        by_span = tuple(task for task in range(len(self.weight)) if task not in by_moment)
        scale, layer_norm = self.scale, self.normalize == "layer_norm"
        with self.refusal_told(self.weight.device):
            check_bool("return_stats", with_stats)
            if self.symmetric:
                raise ValueError("symmetric is for elements without moments: they have no losses of columns")
            problems: list[tuple[tuple[int, ...], Problem | MomentProblem]] = []
            for part in moments:
                check_like_module("moments", part.contexts, self.weight)
                problem = make_moment_problem(
                    part.contexts, part.targets, self.weight_of(part.tasks, part.further), None, self.candidates,
                    scale=scale, layer_norm=layer_norm, context_ids=clip_ids, target_ids=clip_ids,
                )  # fmt: skip
                problems.append((part.tasks, problem))
            if by_span:
                assert self.pairs is not None
                spans = make_problem(
                    contexts, targets, self.weight_of(by_span), self.pairs[list(by_span)], scale=scale,
                    layer_norm=layer_norm, context_ids=context_ids, target_ids=target_ids,
                )  # fmt: skip
                problems.append((by_span, spans))
        parts = _mean_over_ways([(tasks, *self._solve(problem, tasks)) for tasks, problem in problems])
        joined = [task for tasks, _, _ in parts for task in tasks]
        order = self._numbers(tuple(joined.index(task) for task in range(len(joined))))
        loss = self._join([(tasks, loss) for tasks, loss, _ in parts], order)
        losses, accuracies = ([stats[field] for *_, stats in parts] for field in (0, 1))
        stats = InfoNCEStats(torch.cat(losses)[order], torch.cat(accuracies)[order])
        return (loss, stats) if with_stats else loss

    def weight_of(self, tasks: tuple[int, ...], further: int = 0) -> Tensor:
        """[P, D, D], the W of some sub-tasks, or the further ones of a number of those that have several."""
        if not further:
            return self.weight.index_select(0, self._numbers(tasks))
        assert self.further_weight is not None
        assert tasks == self.several
        return self.further_weight[further - 1]

    def _numbers(self, numbers: tuple[int, ...]) -> Tensor:
        """The numbers as a tensor beside the weights."""
        device = self.weight.device
        return constant("numbers", (numbers, device), lambda: torch.tensor(numbers, device=device), self.weight)

    def _solve(self, problem: Problem | MomentProblem, tasks: tuple[int, ...]) -> tuple[Tensor, InfoNCEStats]:
        """Loss and statistics of some sub-tasks, in the mean by their own weights (equal if all are 0)."""
        weights = [] if self.task_weights is None else [self.task_weights[task] for task in tasks]
        options = self.reduction, weights if any(weights) else None, self.backend
        if isinstance(problem, Problem):
            return solve_gathered(problem, self.gather, *options) if self.gathers else solve(problem, *options)
        return solve_moments_gathered(problem, *options) if self.gathers else solve_moments(problem, *options)

    def _join(self, parts: Sequence[tuple[tuple[int, ...], Tensor]], order: Tensor) -> Tensor:
        """The loss of all sub-tasks from those of its parts."""
        if self.reduction == "mean":
            weights = self.task_weights or (1.0,) * len(self.weight)
            shares = [sum([weights[task] for task in tasks]) / sum(weights) for tasks, _ in parts]
            return torch.stack([share * loss for share, (_, loss) in zip(shares, parts, strict=True)]).sum()
        return torch.cat([loss for _, loss in parts])[order]


_Part = tuple[tuple[int, ...], Tensor, InfoNCEStats]
"""Numbers of some sub-tasks, their loss and their statistics."""


def _mean_over_ways(parts: Sequence[_Part]) -> list[_Part]:
    """One part for each set of sub-tasks; by the reduction "none" a clip has the mean of its moments."""
    ways: dict[tuple[int, ...], list[tuple[Tensor, ...]]] = {}
    for tasks, loss, stats in parts:
        ways.setdefault(tasks, []).append((loss.mean(2) if loss.ndim == 3 else loss, *stats))
    found = []
    for tasks, values in ways.items():
        means = values[0] if len(values) == 1 else [torch.stack(each).mean(0) for each in zip(*values, strict=True)]
        found.append((tasks, means[0], InfoNCEStats(*means[1:])))
    return found
