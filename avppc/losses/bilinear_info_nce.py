"""BilinearInfoNCE: the op with its weights as an nn.Module; and the same where some sub-tasks score moments."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avppc.checks import check_bool, check_choice, check_integer, check_like_module, check_tensor
from avppc.losses.config import check_factor, check_task_weights
from avppc.ops.info_nce.agreement import GATHERS, GroupHolder, device_of, has_others, refusal_told
from avppc.ops.info_nce.distributed import solve_gathered, solve_moments_gathered, solve_positives_gathered
from avppc.ops.info_nce.moments import Candidates, Moments, make_moment_problem, solve_moments
from avppc.ops.info_nce.op import BACKENDS, REDUCTIONS, InfoNCEStats, solve, solve_at_once, solve_positives
from avppc.ops.info_nce.problem import (
    NORMALIZATIONS,
    MomentProblem,
    Pairs,
    Problem,
    as_pairs,
    check_positives,
    make_problem,
)  # fmt: skip
from avppc.ops.modes import constant

MAX_WIDTH = 1 << 20
MAX_TASKS = 1 << 20
_SETTINGS = (  # that the repr shows
    "initial_scale", "learn_scale", "normalize", "task_weights", "symmetric", "reduction", "backend", "gather",
    "return_stats",
)  # fmt: skip


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


class BilinearInfoNCE(nn.Module):
    """bilinear_info_nce with its weights W [K, Dz, Dc] (and, if wanted, its scale) as parameters.

    Args:
        context_dim: Dc, the width of the contexts.
        target_dim: Dz, the width of the targets.
        tasks: K, the number of sub-tasks; if pairs are given, their number.
        pairs: [K, 2] integers, the (context index, target index) of each sub-task; None: sub-task k uses context k
            and target k.
        weight: whether there are W; False scores by plain dot products, as CLIP does (context_dim == target_dim).
        scale: what the logits are multiplied by, above 0; its first value if it is learned.
        learn_scale: whether the scale is a parameter (its logarithm is, so that it stays positive).
        normalize: "none": embeddings are scored as they come; "layer_norm": each is first brought to mean 0 and
            variance 1; "l2": to length 1, so that without W a score is a cosine times the scale.
        task_weights: K weights of the sub-tasks in the mean, at least 0: sum(w_k loss_k) / sum(w_k); None: equal.
        symmetric, reduction, backend: as in bilinear_info_nce.
        gather: "none": negatives of this process alone. With torch.distributed, "all": the targets of all processes,
            copied to each; "ring": the same loss and gradients with the targets passed round, which takes the memory of
            one process and more arithmetic. Each process returns the mean over its own rows, so that the gradients that
            DistributedDataParallel averages are those of one process with the whole batch; this module must be inside
            what it wraps. All processes must call it alike, after `eval()`, too.
        group: the processes whose targets are gathered, a torch.distributed.ProcessGroup with this one; None: all. Then
            "the whole batch" is the group's, and the processes that DistributedDataParallel averages over must be the
            group or several such groups.
        return_stats: whether a call also returns InfoNCEStats, unless the call says otherwise.

    W starts as I / sqrt(D), so that embeddings of unit variance give logits of unit variance.
    """

    weight: nn.Parameter | None
    log_scale: nn.Parameter | None

    def __init__(
        self,
        context_dim: int,
        target_dim: int,
        *,
        tasks: int = 1,
        pairs: Pairs | None = None,
        weight: bool = True,
        scale: float = 1.0,
        learn_scale: bool = False,
        normalize: str = "none",
        task_weights: Sequence[float] | None = None,
        symmetric: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        gather: str = "none",
        group: dist.ProcessGroup | None = None,
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        check_integer("context_dim", context_dim, 1, MAX_WIDTH)
        check_integer("target_dim", target_dim, 1, MAX_WIDTH)
        check_integer("tasks", tasks, 1, MAX_TASKS)
        check_factor("scale", scale)
        if scale == 0:
            raise ValueError("scale must be above 0, got 0")
        switches = {"weight": weight, "learn_scale": learn_scale, "symmetric": symmetric, "return_stats": return_stats}
        for name, switch in switches.items():
            check_bool(name, switch)
        if not weight and context_dim != target_dim:
            raise ValueError(f"target_dim must be context_dim, {context_dim}, with weight=False; got {target_dim}")
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
            check_task_weights(task_weights, tasks)
        self._group = GroupHolder(group)
        self.pairs, self.tasks = pairs, tasks
        self.context_dim, self.target_dim = context_dim, target_dim
        self.initial_scale, self.learn_scale, self.normalize = scale, learn_scale, normalize
        self.task_weights = None if task_weights is None else tuple(task_weights)
        self.symmetric, self.reduction, self.backend = symmetric, reduction, backend
        self.gather, self.return_stats = gather, return_stats
        self.weight = nn.Parameter(torch.empty(tasks, target_dim, context_dim)) if weight else None
        self.log_scale = nn.Parameter(torch.empty(1)) if learn_scale else None  # FSDP shards nothing of 0 dimensions
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets W to I / sqrt(D) and the scale to its first value."""
        with torch.no_grad():
            if self.weight is not None:
                identity = torch.eye(self.target_dim, self.context_dim, device=self.weight.device)
                identity /= math.sqrt(min(self.target_dim, self.context_dim))
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
    def group(self) -> dist.ProcessGroup | None:
        """The processes whose targets are gathered; None: all."""
        return self._group.group

    @property
    def gathers(self) -> bool:
        """Whether the targets of other processes are negatives here."""
        return self.gather != "none" and has_others(self.group)

    @property
    def _is_bare(self) -> bool:
        """Whether a call is one of bilinear_info_nce and nothing else."""
        return self.normalize == "none" and self.task_weights is None and not self.gathers

    def refusal_told(self, device: torch.device) -> AbstractContextManager[None]:
        """A context for the checks of a call: the other processes, which wait for this one, learn of an error."""
        return refusal_told(device, self.group) if self.gathers else contextlib.nullcontext()

    def forward(
        self,
        contexts: Tensor,  # [C, N, Dc] or [N, Dc]
        targets: Tensor,  # [U, M, Dz] or [M, Dz]
        context_ids: Tensor | None = None,  # [N]
        target_ids: Tensor | None = None,  # [M]
        *,
        positives: Tensor | None = None,  # [N] or [N, P]
        scale: float | Tensor | None = None,
        return_stats: bool | None = None,
    ) -> Tensor | tuple[Tensor, InfoNCEStats]:
        """The loss, or (loss, InfoNCEStats); the arguments are those of bilinear_info_nce.

        With several processes under gather="all" the positives are numbers of all their targets: target m of the
        group's process r is r M + m. Under "ring" there are none. A scale given here takes the place of the module's,
        which then must not be a learned one.
        """
        with_stats = self.return_stats if return_stats is None else return_stats
        is_plain = context_ids is None and target_ids is None and positives is None and scale is None
        weight = self.weight
        fits = weight is not None or self._is_as_wide(contexts)
        if fits and is_plain and isinstance(with_stats, bool) and self._is_bare:
            arguments = contexts, targets, weight, self.pairs, self.scale, 0, self.symmetric
            found = solve_at_once(*arguments, self.reduction, self.backend, with_stats)
            if found is not None:
                return found
        with self.refusal_told(device_of(contexts, targets) if weight is None else weight.device):
            check_bool("return_stats", with_stats)
            self._check_call(contexts, positives, scale)
            problem = make_problem(
                contexts,
                targets,
                weight,
                self.pairs,
                scale=self.scale if scale is None else scale,
                context_ids=context_ids,
                target_ids=target_ids,
                symmetric=self.symmetric,
                normalize=self.normalize,
                with_offset=positives is None,
            )
            if positives is not None:
                columns = problem.targets.shape[1] * (dist.get_world_size(self.group) if self.gathers else 1)
                positives = check_positives(positives, problem.contexts, columns)
        stats: InfoNCEStats | None
        options = self.reduction, self.task_weights, self.backend
        if positives is not None:
            if self.gathers:
                loss, stats = solve_positives_gathered(problem, positives, *options, self.group, with_stats)
            else:
                loss, stats = solve_positives(problem, positives, *options, with_stats)
        elif self.gathers:
            loss, stats = solve_gathered(problem, self.gather, *options, self.group)
        else:
            loss, stats = solve(problem, *options, with_stats)
        return (loss, stats) if with_stats and stats is not None else loss

    def _is_as_wide(self, contexts: object) -> bool:
        """Whether contexts have the module's width, which without W nothing else asks."""
        return getattr(contexts, "shape", ())[-1:] == (self.context_dim,)

    def _check_call(self, contexts: Tensor, positives: Tensor | None, scale: float | Tensor | None) -> None:
        """Raises TypeError or ValueError where a call's arguments do not go with the settings."""
        if self.weight is not None:
            check_like_module("contexts", contexts, self.weight)
        elif not self._is_as_wide(check_tensor("contexts", contexts)):
            raise ValueError(f"contexts must be {self.context_dim} wide, got shape {list(contexts.shape)}")
        if scale is not None and self.learn_scale:
            raise ValueError("scale must be left out of a call of a module that learns its own")
        if positives is not None and self.gather == "ring":
            raise ValueError("positives need gather='all' or 'none', got 'ring', where no process has them all")

    def extra_repr(self) -> str:
        settings = (f"{name}={getattr(self, name)!r}" for name in _SETTINGS)
        weight = "" if self.weight is not None else "weight=False, "
        return f"{self.context_dim}, {self.target_dim}, tasks={self.tasks}, {weight}{', '.join(settings)}"


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

    weight: nn.Parameter
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

    def forward(  # type: ignore[override]  # the moments' positives are not given by index
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
        scale, normalize = self.scale, self.normalize
        with self.refusal_told(self.weight.device):
            check_bool("return_stats", with_stats)
            if self.symmetric:
                raise ValueError("symmetric is for elements without moments: they have no losses of columns")
            problems: list[tuple[tuple[int, ...], Problem | MomentProblem]] = []
            for part in moments:
                check_like_module("moments", part.contexts, self.weight)
                problem = make_moment_problem(
                    part.contexts, part.targets, self.weight_of(part.tasks, part.further), None, self.candidates,
                    scale=scale, normalize=normalize, context_ids=clip_ids, target_ids=clip_ids,
                )  # fmt: skip
                problems.append((part.tasks, problem))
            if by_span:
                assert self.pairs is not None
                spans = make_problem(
                    contexts, targets, self.weight_of(by_span), self.pairs[list(by_span)], scale=scale,
                    normalize=normalize, context_ids=context_ids, target_ids=target_ids,
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
            if self.gathers:
                return solve_gathered(problem, self.gather, *options, self.group)
            return solve(problem, *options)
        if self.gathers:
            return solve_moments_gathered(problem, *options, self.group)
        return solve_moments(problem, *options)

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
