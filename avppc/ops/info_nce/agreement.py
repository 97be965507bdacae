"""Before a loss over processes: do they all compute the same one? One message round says so, on all of them alike.

Without it, processes that differ read each other's bytes wrongly, or wait for messages that nobody sends.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from avppc.checks import FLOAT_DTYPES, dtype_name
from avppc.ops.info_nce.problem import NO_POSITIVE, MomentProblem, Problem

GATHERS = ("none", "all", "ring")
_REDUCTIONS = ("mean", "task", "none")
_MOST_RANKS = 8  # that a message names of one kind
_checks = math.inf  # how many calls are still to be checked


@contextlib.contextmanager
def rows_known_even() -> Iterator[None]:
    """Inside, all processes promise calls like the first one, which alone is checked: a check is a message round."""
    global _checks
    before, _checks = _checks, 1
    try:
        yield
    finally:
        _checks = before


def has_others(group: dist.ProcessGroup | None = None) -> bool:
    """Whether there are other processes (of the group), which take part in a loss unless its gather is "none"."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    count = dist.get_world_size(group)
    if count < 0:
        raise ValueError(f"group must be one that this process belongs to, got one without rank {dist.get_rank()}")
    return count > 1


def device_of(*values: object) -> torch.device:
    """That of the first tensor among the values."""
    return next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))


class GroupHolder:
    """The setting `group` of a module. A copy of the module has the same group, which itself cannot be copied."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """Raises TypeError unless it is None or a group that this process belongs to."""
        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            # what torch.distributed.new_group gives the processes outside is a number
            raise TypeError(f"group must be None or a torch.distributed.ProcessGroup of this process, got {group!r}")
        self.group = group

    def __deepcopy__(self, _: object) -> GroupHolder:
        return self


class _Facts(NamedTuple):
    """What must be the same on every process, as integers; all are 0 on a process that has refused its arguments."""

    accepted: int
    gather: int
    dtype: int
    C: int
    N: int
    Dc: int
    U: int
    M: int
    Dz: int
    K: int
    pairs: int
    weights: int
    ids: int
    positives: int
    symmetric: int
    reduction: int
    task_weights: int
    targets_gradient: int
    contexts_gradient: int
    moments: int
    candidates: int


_TEXTS: dict[str, Callable[[int], str]] = {
    "gather": lambda code: repr(GATHERS[code]),
    "dtype": lambda code: dtype_name(FLOAT_DTYPES[code]),
    "pairs": lambda code: f"(hash {code})",
    "candidates": lambda code: f"(hash {code})",
    "task_weights": lambda code: f"(hash {code})",
    "weights": lambda code: "given" if code else "None",
    "ids": lambda code: "given" if code else "None",
    "positives": lambda code: "given" if code else "None",
    "symmetric": lambda code: str(bool(code)),
    "reduction": lambda code: repr(_REDUCTIONS[code]),
    "targets_gradient": lambda code: "needed" if code else "not needed",
    "contexts_gradient": lambda code: "needed" if code else "not needed",
}


def check_agreement(
    problem: Problem | MomentProblem,
    gather: str,
    reduction: str,
    task_weights: Sequence[float] | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Raises ValueError on all processes unless they have called for the same loss with the same shapes and dtypes.

    The text names what differs. Each process must call this, or `tell_refusal`, as often as the others.
    """
    global _checks
    if _checks <= 0:
        return
    _checks -= 1
    every = _exchange(_facts(problem, gather, reduction, task_weights), problem.contexts.device, group)
    numbers = dist.get_process_group_ranks(group)
    refused = [rank for rank, facts in zip(numbers, every, strict=True) if not facts.accepted]
    if refused:
        raise ValueError(f"gather={gather!r}: {_ranks(refused)} refused its arguments, and says why")
    of_all = zip(_Facts._fields, zip(*every, strict=True), strict=True)
    differing = [name for name, values in of_all if len(set(values)) > 1]
    if differing:
        found = "; ".join(
            f"{name} is {_described(name, [getattr(facts, name) for facts in every], numbers)}" for name in differing
        )
        raise ValueError(f"gather={gather!r} needs the same call on every rank, but {found}")


@contextlib.contextmanager
def refusal_told(device: torch.device, group: dist.ProcessGroup | None) -> Iterator[None]:
    """An error raised inside, before `check_agreement`, is told to the other processes, which would wait for ever."""
    global _checks
    try:
        yield
    except (TypeError, ValueError, RuntimeError):
        if _checks > 0:
            _checks -= 1
            with contextlib.suppress(RuntimeError):  # the first error counts
                _exchange(_Facts(*[0] * len(_Facts._fields)), device, group)
        raise


def _facts(
    problem: Problem | MomentProblem, gather: str, reduction: str, task_weights: Sequence[float] | None
) -> _Facts:
    contexts, targets = problem.contexts, problem.targets
    # Whose backward sends messages: one that runs on some processes alone would wait for the others.
    symmetric = isinstance(problem, Problem) and problem.symmetric
    of_targets, of_contexts = _needed(targets), symmetric and _needed(contexts)
    moments, candidates = 0, 0
    if isinstance(problem, MomentProblem):
        moments = problem.target_moments
        candidates = hash((*problem.candidates.tolist(), *problem.shifts.tolist()))
    if gather == "ring":
        of_targets = of_contexts = _needed(contexts, targets, problem.weights, problem.scale)
    (C, N, Dc), (U, M, Dz) = contexts.shape, targets.shape
    return _Facts(
        accepted=True,
        gather=GATHERS.index(gather),
        dtype=FLOAT_DTYPES.index(contexts.dtype),
        C=C,
        N=N,
        Dc=Dc,
        U=U,
        M=M,
        Dz=Dz,
        K=len(problem.pairs),
        pairs=hash(tuple(problem.pairs.flatten().tolist())),
        weights=problem.weights is not None,
        ids=problem.context_ids is not None,
        positives=problem.positive_offset == NO_POSITIVE,
        symmetric=symmetric,
        reduction=_REDUCTIONS.index(reduction),
        task_weights=0 if task_weights is None else hash(tuple(task_weights)),
        targets_gradient=of_targets,
        contexts_gradient=of_contexts,
        moments=moments,
        candidates=candidates,
    )


def _needed(*values: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)


def _exchange(own: _Facts, device: torch.device, group: dist.ProcessGroup | None) -> list[_Facts]:
    """The facts of every process of the group, in the order of ranks."""
    # on the CPU if the group can, so that nobody waits for a GPU
    device = torch.device("cpu") if "cpu:" in str(dist.get_backend_config(group)) else device
    numbers = torch.tensor(own, dtype=torch.int64, device=device)
    every = numbers.new_empty(dist.get_world_size(group), len(own))
    dist.all_gather(list(every.unbind(0)), numbers, group)
    return [_Facts(*row) for row in every.tolist()]


def _described(name: str, codes: Sequence[int], numbers: Sequence[int]) -> str:
    """For example "float32 on ranks 0, 1 and bfloat16 on rank 2"."""
    text = _TEXTS.get(name, str)
    by_code = {code: [rank for rank, other in zip(numbers, codes, strict=True) if other == code] for code in codes}
    return " and ".join(f"{text(code)} on {_ranks(ranks)}" for code, ranks in by_code.items())


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:_MOST_RANKS])) + (", ..." if len(ranks) > _MOST_RANKS else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
