"""Which sub-task uses what, as tables on the device that are kept for each list of pairs: a step copies nothing."""

from __future__ import annotations

import collections
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from avppc.ops.constant_tensors import constant
from avppc.ops.info_nce.problem import Problem


@dataclass(frozen=True)
class Terms:
    """Sums of products for `info_nce_product_kernel`."""

    starts: Tensor
    """[outputs + 1] int32: the terms of output o are starts[o] to starts[o + 1] - 1"""
    a: Tensor
    """[terms] int32: the first factor of each"""
    b: Tensor
    """[terms] int32: the second factor of each"""


@dataclass(frozen=True)
class Plan:
    """K sub-tasks in slots, sorted by target; tables are int32 on the device."""

    slot_tasks: Tensor
    """[K]"""
    slot_targets: Tensor
    """[K]"""
    target_starts: Tensor
    """[U + 1]: the slots of target u are target_starts[u] to target_starts[u + 1] - 1"""
    target_slots: tuple[tuple[int, int], ...]
    """U ranges: target_starts on the host"""
    slot_contexts: tuple[int, ...]
    """K: the context of each slot, on the host"""
    queries: Terms
    """For each slot: its context, times its sub-task's weights transposed"""
    dcontexts: Terms
    """For each context: the dq of its slots, times their sub-tasks' weights"""
    dweights: Terms
    """For each sub-task: the dq of its slot transposed, times its context"""


def plan_of(problem: Problem) -> Plan:
    """The plan of a checked problem; once kept it stays, since a CUDA graph may read its tables."""
    flat: list[int] = problem.pairs.flatten().tolist()
    arguments = tuple(flat), problem.contexts.shape[0], problem.targets.shape[0], problem.contexts.device
    return constant("plan", arguments, lambda: _make_plan(*arguments), problem.contexts)


def _make_plan(flat: tuple[int, ...], contexts: int, targets: int, device: torch.device) -> Plan:
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    for context, target in pairs:
        for name, index, count in (("context", context, contexts), ("target", target, targets)):
            if not 0 <= index < count:
                raise RuntimeError(f"pairs must hold {name} indices from 0 to {count - 1}, got {index}")
    tasks = sorted(range(len(pairs)), key=lambda task: (pairs[task][1], task))
    slots = {task: slot for slot, task in enumerate(tasks)}

    def table(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def terms(groups: list[list[tuple[int, int]]]) -> Terms:
        """One list of (first factor, second factor) for each output."""
        starts = [0]
        for group in groups:
            starts.append(starts[-1] + len(group))
        flat_terms = [term for group in groups for term in group]
        return Terms(table(starts), table([a for a, _ in flat_terms]), table([b for _, b in flat_terms]))

    counts = collections.Counter(target for _, target in pairs)
    target_starts = list(itertools.accumulate((counts[target] for target in range(targets)), initial=0))
    of_context: list[list[tuple[int, int]]] = [[] for _ in range(contexts)]
    for k in tasks:
        of_context[pairs[k][0]].append((slots[k], k))
    return Plan(
        slot_tasks=table(tasks),
        slot_targets=table([pairs[task][1] for task in tasks]),
        target_starts=table(target_starts),
        target_slots=tuple(itertools.pairwise(target_starts)),
        slot_contexts=tuple(pairs[task][0] for task in tasks),
        queries=terms([[(pairs[task][0], task)] for task in tasks]),
        dcontexts=terms(of_context),
        dweights=terms([[(slots[k], pair[0])] for k, pair in enumerate(pairs)]),
    )
