"""bilinear_info_nce with the targets of every process as candidates (torch.distributed).

Each process scores its own N contexts against the targets of all G processes, and returns the mean over its own rows. A
gradient of another process's tensor is added up on that process. So the average over processes, which
DistributedDataParallel takes of the gradients, is exactly the gradient of one process that has the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from avppc.checks import check_choice, without_autocast
from avppc.ops.info_nce.agreement import check_agreement, device_of, refusal_told
from avppc.ops.info_nce.moments import OTHER_CLIPS, solve_moments
from avppc.ops.info_nce.op import BACKENDS, REDUCTIONS, InfoNCEStats, pick_backend, reduce_rows, solve, solve_positives
from avppc.ops.info_nce.problem import NO_POSITIVE, MomentProblem, Pairs, Problem, make_problem
from avppc.ops.info_nce.reference import info_nce_logits_reference
from avppc.ops.modes import plain_torch_alone, refuse_second_derivative

if TYPE_CHECKING:
    Group = dist.ProcessGroup | None
_P = TypeVar("_P", Problem, MomentProblem)


def solve_gathered(
    problem: Problem,
    gather: str,
    reduction: str,
    task_weights: Sequence[float] | None,
    backend: str,
    group: Group = None,
) -> tuple[Tensor, InfoNCEStats]:
    """The loss of this process's rows, and its statistics; there must be other processes.

    Args:
        problem: this process's own; its positive_offset is 0.
        gather: "all": the targets of all processes are copied here; "ring": they pass by, one process's at a time, in
            the forward and again in the backward.
        reduction, task_weights, backend: as in `solve`.
        group: the processes; None: all.

    Raises:
        ValueError: the processes differ in shapes, dtypes or options; on all of them, naming what differs.
        RuntimeError: torch.func or a forward-mode derivative is asked to go through messages.
    """
    options = reduction, task_weights, backend, group
    _check_messages(problem, gather, reduction, task_weights, group)
    one_way = _solve_all if gather == "all" else _solve_ring
    if not problem.symmetric:
        return one_way(problem, *options)
    loss, stats = one_way(problem._replace(symmetric=False), *options)
    column_loss, column_stats = one_way(_transposed(problem), *options)
    task_loss = (stats.task_loss + column_stats.task_loss) / 2
    return (loss + column_loss) / 2, InfoNCEStats(task_loss, stats.accuracy)


def solve_call_gathered(
    contexts: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    pairs: Pairs | None,
    options: dict[str, Any],
    gather: str,
    reduction: str,
    backend: str,
) -> tuple[Tensor, InfoNCEStats]:
    """bilinear_info_nce with the targets of all processes; the others, which wait for this one, learn of an error."""
    with refusal_told(device_of(contexts, targets), None):
        if options["positive_offset"] != 0:
            raise ValueError(f"positive_offset must be 0 with gather={gather!r}, got {options['positive_offset']}")
        problem = make_problem(contexts, targets, weights, pairs, **options)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("backend", backend, BACKENDS)
    return solve_gathered(problem, gather, reduction, None, backend)


def _check_messages(
    problem: Problem | MomentProblem, gather: str, reduction: str, task_weights: Sequence[float] | None, group: Group
) -> None:
    """Raises unless messages to other processes serve here, and all of them call for the same loss."""
    lacking = plain_torch_alone(problem.contexts, problem.targets, problem.weights, problem.scale)
    if lacking:  # messages are seen by the backwards of autograd functions alone
        raise RuntimeError(f"gather={gather!r} has no {lacking} with several processes; use gather='none'")
    check_agreement(problem, gather, reduction, task_weights, group)


def solve_positives_gathered(
    problem: Problem,
    positives: Tensor,
    reduction: str,
    task_weights: Sequence[float] | None,
    backend: str,
    group: Group = None,
    with_stats: bool = True,
) -> tuple[Tensor, InfoNCEStats | None]:
    """solve_positives of this process's rows; the positives [N, P] are numbers of all G M targets, in order of ranks.

    The targets are copied to each process, as under gather="all". Raises as solve_gathered.
    """
    _check_messages(problem, "all", reduction, task_weights, group)
    whole = _with_all_targets(problem, problem.targets.shape[1], group)._replace(positive_offset=NO_POSITIVE)
    return solve_positives(whole, positives, reduction, task_weights, backend, with_stats)


def solve_moments_gathered(
    problem: MomentProblem, reduction: str, task_weights: Sequence[float] | None, backend: str, group: Group = None
) -> tuple[Tensor, InfoNCEStats]:
    """solve_moments with the clips of all processes as candidates, where a sub-task has other clips at all.

    Their targets are copied to each process, as under gather="all". Raises as solve_gathered.
    """
    _check_messages(problem, "all", reduction, task_weights, group)
    if bool((problem.candidates & OTHER_CLIPS).any()):
        problem = _with_all_targets(problem, problem.targets.shape[1] // problem.target_moments, group)
    return solve_moments(problem, reduction, task_weights, backend)


def _transposed(problem: Problem) -> Problem:
    """The problem in which targets look for contexts."""
    weights = None if problem.weights is None else problem.weights.mT
    return Problem(
        contexts=problem.targets,
        targets=problem.contexts,
        weights=weights,
        pairs=problem.pairs.flip(1),
        scale=problem.scale,
        positive_offset=0,
        context_ids=problem.target_ids,
        target_ids=problem.context_ids,
        symmetric=False,
    )


def _gather(value: Tensor, group: Group) -> Tensor:
    """[G, ...] from every process's [...]."""
    gathered = value.new_empty((dist.get_world_size(group), *value.shape))
    dist.all_gather(list(gathered.unbind(0)), value.contiguous(), group)
    return gathered


class _GatherRows(torch.autograd.Function):
    """[U, G M, D]: the rows [U, M, D] of all processes; all gradients of a row are summed on the process it is from."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(value, group).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _SumRows.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]  # torch does not annotate it


class _SumRows(torch.autograd.Function):
    """[U, M, D]: this process's rows of [U, G M, D], summed over processes. Each of the two is the other's backward."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, group: Group) -> Tensor:
        ctx.group = group
        # [G, U, M, D], summed in float32: in bfloat16 a sum over many processes would lose digits
        parts = gradient.unflatten(1, (dist.get_world_size(group), -1)).transpose(0, 1)
        parts = parts.to(torch.promote_types(gradient.dtype, torch.float32)).contiguous()
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, list(parts.unbind(0)), group=group)
        return own.to(gradient.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _GatherRows.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]  # as above


def _with_all_targets(problem: _P, own: int, group: Group) -> _P:
    """The problem of this process's contexts and the targets of all; `own`: rows or clips that each process has."""
    targets: Tensor = _GatherRows.apply(problem.targets, group)  # type: ignore[no-untyped-call]  # torch does not annotate it
    ids = problem.target_ids
    return problem._replace(
        targets=targets,
        target_ids=None if ids is None else _gather(ids, group).flatten(),
        positive_offset=dist.get_rank(group) * own,
    )


def _solve_all(
    problem: Problem, reduction: str, task_weights: Sequence[float] | None, backend: str, group: Group
) -> tuple[Tensor, InfoNCEStats]:
    whole = _with_all_targets(problem, problem.targets.shape[1], group)
    return solve(whole, reduction, task_weights, backend)


def _solve_ring(
    problem: Problem, reduction: str, task_weights: Sequence[float] | None, backend: str, group: Group
) -> tuple[Tensor, InfoNCEStats]:
    rows, correct = _Ring.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
        problem.contexts,
        problem.targets,
        problem.weights,
        problem.scale,
        problem,
        pick_backend(problem, backend),
        group,
    )
    return reduce_rows(rows, reduction, task_weights), InfoNCEStats(rows.detach().mean(1), correct.mean(1))


class _Ring(torch.autograd.Function):
    """Losses [K, N] and whether each positive beats every negative [K, N], from one process's targets at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        contexts: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        scale: Tensor,
        own: Problem,
        backend: str,
        group: Group,
    ) -> tuple[Tensor, Tensor]:
        own = own._replace(contexts=contexts, targets=targets, weights=weights, scale=scale)
        rows, correct, lse = _statistics(own, backend)
        own_maximum, own_log_sum = lse
        for part in _others(own, group):
            _, _, other = _statistics(part, backend)
            correct = correct * (own_maximum > other[0])
            lse = _merge(lse, other)
        # log-sum-exp - positive, from the loss among this process's own targets
        rows = rows + (lse[0] - own_maximum) + (lse[1] - own_log_sum)
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(contexts, targets, weights, scale, own.pairs, own.context_ids, own.target_ids, lse)
        ctx.backend, ctx.group = backend, group
        return rows, correct

    @staticmethod
    def backward(ctx: Any, drows: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gather='ring'", "use gather='all' and backend='reference' with create_graph=True")
        contexts, targets, weights, scale, pairs, context_ids, target_ids, lse = ctx.saved_tensors
        own = Problem(contexts, targets, weights, pairs, scale, 0, context_ids, target_ids, False)
        dcontexts, dtargets, dweights, dscale = _gradients(own, ctx.backend, lse, drows)
        for part in _others(own, ctx.group):
            more = _gradients(part, ctx.backend, lse, drows)
            dcontexts, dweights, dscale = dcontexts + more[0], dweights + more[2], dscale + more[3]
            # the gradient travels one process behind the targets it belongs to, and so arrives where they came from
            dtargets = _pass_on([dtargets], ctx.group)[0] + more[1]
        dtargets = _pass_on([dtargets], ctx.group)[0]
        gradients = (dcontexts, dtargets, None if weights is None else dweights, dscale)
        inputs = (contexts, targets, weights, scale)
        return *(None if d is None else d.to(x.dtype) for d, x in zip(gradients, inputs, strict=True)), None, None, None


def _others(own: Problem, group: Group) -> Iterator[Problem]:
    """The problem with each other process's targets in turn; the next ones travel meanwhile."""
    travellers = [value.contiguous() for value in (own.targets, own.target_ids) if value is not None]
    works, arriving = _start_passing(travellers, group)
    for step in range(1, dist.get_world_size(group)):
        for work in works:
            work.wait()
        held = arriving
        if step < dist.get_world_size(group) - 1:
            works, arriving = _start_passing(held, group)
        ids = None if own.target_ids is None else held[1]
        yield own._replace(targets=held[0], target_ids=ids, positive_offset=NO_POSITIVE)


def _start_passing(values: list[Tensor], group: Group) -> tuple[list[Any], list[Tensor]]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    arriving = [torch.empty_like(value) for value in values]
    transfers = [dist.P2POp(dist.isend, value, group=group, group_peer=(rank + 1) % size) for value in values]
    transfers += [dist.P2POp(dist.irecv, value, group=group, group_peer=(rank - 1) % size) for value in arriving]
    return dist.batch_isend_irecv(transfers), arriving


def _pass_on(values: list[Tensor], group: Group) -> list[Tensor]:
    works, arriving = _start_passing([value.contiguous() for value in values], group)
    for work in works:
        work.wait()
    return arriving


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """The log-sum-exp of two parts; each is [2, K, N], the maximum and the log of the sum of exponentials."""
    maximum = torch.maximum(a[0], b[0])
    return torch.stack([maximum, torch.logaddexp(a[0] - maximum + a[1], b[0] - maximum + b[1])])


def _statistics(problem: Problem, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, hits [K, N] and log-sum-exps [2, K, N] among these targets; without positives only the last is of use."""
    if backend != "reference":
        operator = torch.ops.avppc.info_nce_cpu if backend == "cpp" else torch.ops.avppc.info_nce_triton
        rows, correct, lse, *_ = operator(*problem)
        return rows, correct, lse
    with without_autocast(problem.contexts):
        s = info_nce_logits_reference(*problem[:-1])
    lowest = torch.finfo(s.dtype).min
    maximum = s.amax(2).clamp_min(lowest)  # finite even if all are left out
    log_sum = (s - maximum[:, :, None]).exp().sum(2).log()
    if problem.positive_offset == NO_POSITIVE:
        return log_sum, log_sum, torch.stack([maximum, log_sum])
    positive = s.diagonal(problem.positive_offset, 1, 2)
    correct = (s >= positive[:, :, None]).sum(2) == 1
    return maximum - positive + log_sum, correct.to(s.dtype), torch.stack([maximum, log_sum])


def _gradients(problem: Problem, backend: str, lse: Tensor, drows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of contexts, targets, weights (empty without) and scale among these targets, at least float32."""
    with_weights = problem.weights is not None
    no_columns = lse.new_empty(2, problem.tasks, 0)
    needs = (True, True, with_weights, True)
    if backend == "cpp":
        found = torch.ops.avppc.info_nce_cpu_backward(*problem, lse, no_columns, drows, *needs)
    elif backend == "triton":
        nothing = problem.contexts.new_empty(0)  # without queries the operator computes them again
        found = torch.ops.avppc.info_nce_triton_backward(*problem, lse, no_columns, nothing, drows, *needs)
    else:
        names = ("contexts", "targets", "weights", "scale") if with_weights else ("contexts", "targets", "scale")
        leaves = {name: getattr(problem, name).detach().requires_grad_() for name in names}
        with torch.enable_grad(), without_autocast(problem.contexts):
            s = info_nce_logits_reference(*problem._replace(**leaves)[:-1])
        ds = (s.detach() - lse[0][:, :, None] - lse[1][:, :, None]).exp() * drows[:, :, None]
        if problem.positive_offset != NO_POSITIVE:
            ds.diagonal(problem.positive_offset, 1, 2).sub_(drows)
        by_name = dict(zip(names, torch.autograd.grad(s, list(leaves.values()), ds), strict=True))
        found = [by_name.get(name, lse.new_empty(0)) for name in ("contexts", "targets", "weights", "scale")]
    dcontexts, dtargets, dweights, dscale = (value.to(lse.dtype) for value in found)
    return dcontexts, dtargets, dweights, dscale
