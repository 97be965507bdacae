"""Launches the Triton kernels of the bilinear InfoNCE's forward: projection, statistics, losses.

Nothing here waits for the device, so that CUDA graphs can capture it. Tensors are ordered by task, queries by position
(see kernels_forward.py). Which sub-task uses what is in tables on the device that are kept for each list of pairs: a
step copies nothing.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avppc.ops.info_nce.problem import NO_POSITIVE, Problem
from avppc.ops.info_nce.triton import kernels_forward as kernels
from avppc.ops.info_nce.triton import tiles
from avppc.ops.info_nce.triton.tiles import Tile, TileKey, with_best_tile
from avppc.ops.modes import constant

_NOWHERE = -(1 << 30)
"""The offset of positives that are not among the columns here."""
FINISH_BLOCK = 256


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up."""
    return (n + by - 1) // by


class LaunchArguments(NamedTuple):
    """A problem as the kernels take it: contiguous, with its tables."""

    problem: Problem
    plan: Plan
    key: TileKey

    @classmethod
    def of(cls, problem: Problem) -> LaunchArguments:
        """The arguments for a checked problem; copies what is not contiguous."""
        values: Any = (x.contiguous() if isinstance(x, Tensor) else x for x in problem)
        problem = Problem(*values)
        device = problem.contexts.device
        plan = plan_of(problem)
        width, itemsize = problem.targets.shape[2], problem.contexts.itemsize
        key = TileKey(
            tiles.architecture_of(device),
            itemsize,
            width,
            unaligned=width * itemsize % 16 != 0,
            extra_registers=problem.symmetric or problem.context_ids is not None,
        )
        return cls(problem, plan, key)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """K, N, U, M, D"""
        U, M, D = self.problem.targets.shape
        return self.problem.tasks, self.problem.rows, U, M, D

    @property
    def offset(self) -> int:
        """The positive of row i is column i + offset; far below 0 if it is elsewhere."""
        offset = self.problem.positive_offset
        return _NOWHERE if offset == NO_POSITIVE else offset

    @property
    def has_ids(self) -> bool:
        """Whether rows and columns have ids."""
        return self.problem.context_ids is not None

    @property
    def ids(self) -> tuple[Tensor, Tensor]:
        """Ids of rows and columns; if there are none, tensors that are not read."""
        p = self.problem
        return (p.scale if p.context_ids is None else p.context_ids, p.scale if p.target_ids is None else p.target_ids)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Fresh memory on the problem's device."""
        return torch.empty(shape, dtype=dtype, device=self.problem.contexts.device)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which kernels run on the device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _precision() -> str:
    """How products of float32 are computed: as torch is set to do it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def options_of(tile: Tile) -> dict[str, Any]:
    """The options of every kernel that come from its tile."""
    blocks: dict[str, Any] = {"BLOCK_N": tile.n, "BLOCK_M": tile.m, "BLOCK_D": tile.d}
    if tile.registers:
        blocks["maxnreg"] = tile.registers
    return {**blocks, "PRECISION": _precision(), "num_warps": tile.warps, "num_stages": tile.stages}


def grouped_matmul(
    key: TileKey, a: Tensor, b: Tensor, groups: GroupedProducts, out: Tensor, alpha: Tensor | None = None
) -> None:
    """out[o] = alpha * the sum of group o of products a[..] @ b[..]; a [.., rows, depth], b [.., depth, columns]."""
    outputs, rows, columns = out.shape
    depth = a.shape[2]

    def launch_with(tile: Tile) -> None:
        grid = (outputs * cdiv(rows, tile.n) * cdiv(columns, tile.m),)
        kernels.info_nce_product_kernel[grid](
            a,
            b,
            out,
            out if alpha is None else alpha,
            groups.starts,
            groups.a,
            groups.b,
            rows,
            columns,
            depth,
            *a.stride(),
            *b.stride(),
            FULL_N=rows % tile.n == 0,
            FULL_M=columns % tile.m == 0,
            EVEN=depth % tile.d == 0,
            HAS_ALPHA=alpha is not None,
            **options_of(tile),
        )

    lines = depth if a.stride(2) == 1 else rows, columns if b.stride(2) == 1 else depth, columns  # along memory
    unaligned = any(line * a.itemsize % 16 != 0 for line in lines)
    with_best_tile("product", key._replace(width=depth, unaligned=unaligned, extra_registers=False), launch_with)


def queries_of(launch: LaunchArguments) -> Tensor:
    """[K, N, D]: q = c W^T of the sub-task at each position; without weights, the contexts themselves."""
    problem, plan = launch.problem, launch.plan
    K, N, _, _, D = launch.sizes
    if problem.weights is None:
        if plan.sorted_contexts == tuple(range(problem.contexts.shape[0])):
            return problem.contexts
        return problem.contexts.index_select(0, plan.queries.a)
    queries = launch.empty(K, N, D, dtype=problem.contexts.dtype)
    grouped_matmul(launch.key, problem.contexts, problem.weights.mT, plan.queries, queries)
    return queries


def info_nce_triton(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """rows [K, N], correct [K, N], row_lse [2, K, N], column_lse [2, K, M or 0], queries [K, N, D] (none without W)."""
    launch = LaunchArguments.of(Problem(*inputs))
    problem = launch.problem
    K, N, _, M, _ = launch.sizes
    rows, correct, positives = launch.empty(K, N), launch.empty(K, N), launch.empty(K, N)
    row_lse = launch.empty(2, K, N)
    column_lse = launch.empty(2, K, M if problem.symmetric else 0)
    with on(problem.contexts.device):
        queries = queries_of(launch)

        def launch_with(tile: Tile) -> None:
            for first, count in _task_chunks(launch, tile):
                row_parts, column_parts = _statistics(launch, queries, positives, tile, first, count)
                combine(launch, row_parts, positives, row_lse, rows, correct, first)
                if problem.symmetric:
                    combine(launch, column_parts, positives, column_lse, rows, None, first)

        with_best_tile("fwd", launch.key, launch_with)
    saved = queries if problem.weights is not None else launch.empty(0, dtype=queries.dtype)
    return rows, correct, row_lse, column_lse, saved


def _task_chunks(launch: LaunchArguments, tile: Tile) -> Iterator[tuple[int, int]]:
    """(first position, sub-tasks) of each launch of the forward: all, or as many as columns' statistics may fill."""
    K, N, _, M, _ = launch.sizes
    chunk = K
    if launch.problem.symmetric:
        chunk = max(1, tiles.COLUMN_STATISTICS_BYTES // (cdiv(N, tile.n) * M * 8))
    for first in range(0, K, chunk):
        yield first, min(chunk, K - first)


def _splits(launch: LaunchArguments, tile: Tile, tasks: int) -> int:
    """Over how many programs a row tile's columns are divided: one, unless that were fewer than two a processor."""
    _, N, _, M, _ = launch.sizes
    programs = tasks * cdiv(N, tile.n)
    wanted = cdiv(2 * tiles.processors_of(launch.problem.contexts.device), programs)
    return max(1, min(wanted, cdiv(M, tile.m)))


_Parts = tuple[Tensor, Tensor]  # maxima and sums [parts, sub-tasks, length]


def _statistics(
    launch: LaunchArguments, queries: Tensor, positives: Tensor, tile: Tile, first_position: int, tasks: int
) -> tuple[_Parts, _Parts]:
    """Statistics of the negatives: of rows by split of the columns, and of columns by row tile."""
    problem, plan = launch.problem, launch.plan
    _, N, _, M, D = launch.sizes
    row_tiles = cdiv(N, tile.n)
    split_columns = cdiv(cdiv(M, tile.m), _splits(launch, tile, tasks)) * tile.m
    splits = cdiv(M, split_columns)
    row_parts = launch.empty(splits, tasks, N), launch.empty(splits, tasks, N)
    column_parts = row_parts
    if problem.symmetric:
        column_parts = launch.empty(row_tiles, tasks, M), launch.empty(row_tiles, tasks, M)
    kernels.info_nce_fwd_kernel[(tasks * row_tiles, splits)](
        queries,
        problem.targets,
        problem.scale,
        plan.sorted_tasks,
        plan.sorted_targets,
        *launch.ids,
        *row_parts,
        positives,
        *column_parts,
        first_position,
        tasks,
        N,
        M,
        launch.offset,
        split_columns,
        D,
        EVEN=D % tile.d == 0,
        WHOLE=tile.d >= D,
        HAS_IDS=launch.has_ids,
        COLUMNS=problem.symmetric,
        **options_of(tile),
    )
    return row_parts, column_parts


def combine(
    launch: LaunchArguments,
    parts: _Parts,
    positives: Tensor,
    lse: Tensor,
    losses: Tensor,
    correct: Tensor | None,
    first_position: int,
) -> None:
    """Log-sum-exps and losses of rows if `correct` is given; else of columns, averaged into the losses of rows."""
    count, tasks, length = parts[0].shape
    kernels.info_nce_lse_kernel[(tasks * cdiv(length, FINISH_BLOCK),)](
        *parts,
        positives,
        lse,
        losses,
        losses if correct is None else correct,
        launch.plan.sorted_tasks,
        first_position,
        tasks,
        lse.shape[1],
        length,
        count,
        HAS_POSITIVE=launch.offset != _NOWHERE,
        IS_COLUMN=correct is None,
        BLOCK=FINISH_BLOCK,
    )


@dataclass(frozen=True)
class GroupedProducts:
    """Which products of matrices `info_nce_product_kernel` adds up to each output."""

    starts: Tensor
    """[outputs + 1] int32: the products of output o are starts[o] to starts[o + 1] - 1"""
    a: Tensor
    """[products] int32: the index of the first factor of each"""
    b: Tensor
    """[products] int32: the index of the second factor of each"""


@dataclass(frozen=True)
class Plan:
    """K sub-tasks, sorted by target, where each has its position; tables are int32 on the device."""

    sorted_tasks: Tensor
    """[K]"""
    sorted_targets: Tensor
    """[K]"""
    target_starts: Tensor
    """[U + 1]: the positions of target u are target_starts[u] to target_starts[u + 1] - 1"""
    target_ranges: tuple[tuple[int, int], ...]
    """U ranges: target_starts on the host"""
    sorted_contexts: tuple[int, ...]
    """K: the context of the sub-task at each position, on the host"""
    queries: GroupedProducts
    """For each position: its sub-task's context, times the sub-task's weights transposed"""
    dcontexts: GroupedProducts
    """For each context: the dq of its positions, times their sub-tasks' weights"""
    dweights: GroupedProducts
    """For each sub-task: the dq of its position transposed, times its context"""


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
    positions = {task: position for position, task in enumerate(tasks)}

    def table(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def grouped(groups: list[list[tuple[int, int]]]) -> GroupedProducts:
        """One list of (first factor, second factor) for each output."""
        starts = [0]
        for group in groups:
            starts.append(starts[-1] + len(group))
        products = [product for group in groups for product in group]
        return GroupedProducts(table(starts), table([a for a, _ in products]), table([b for _, b in products]))

    counts = collections.Counter(target for _, target in pairs)
    target_starts = list(itertools.accumulate((counts[target] for target in range(targets)), initial=0))
    of_context: list[list[tuple[int, int]]] = [[] for _ in range(contexts)]
    for k in tasks:
        of_context[pairs[k][0]].append((positions[k], k))
    return Plan(
        sorted_tasks=table(tasks),
        sorted_targets=table([pairs[task][1] for task in tasks]),
        target_starts=table(target_starts),
        target_ranges=tuple(itertools.pairwise(target_starts)),
        sorted_contexts=tuple(pairs[task][0] for task in tasks),
        queries=grouped([[(pairs[task][0], task)] for task in tasks]),
        dcontexts=grouped(of_context),
        dweights=grouped([[(positions[k], pair[0])] for k, pair in enumerate(pairs)]),
    )
