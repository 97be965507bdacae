"""Launches the Triton kernels of the bilinear InfoNCE's backward, by one of two methods.

By recomputation, two kernels compute the logits again and keep dq and dz on the chip, without a workspace. By waves,
the dS of some rows at a time is written to a bounded workspace, and cuBLAS multiplies. The upstream gradients are
divided by the largest of them, `amax`, so that float16 holds dS and dq; gradients are multiplied by `alpha`, which is
scale * amax, where they are stored. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from avppc.ops.info_nce.problem import Problem
from avppc.ops.info_nce.triton import kernels_backward as kernels
from avppc.ops.info_nce.triton import tiles
from avppc.ops.info_nce.triton.forward import LaunchArguments, Plan, cdiv, grouped_matmul, on, options_of, queries_of
from avppc.ops.info_nce.triton.tiles import Tile, with_best_method, with_best_tile

GROUP = 8
"""Row tiles that walk the columns together; their queries and the columns' targets share the second-level cache."""


class Upstream(NamedTuple):
    """What the backward kernels need of the loss, beside the problem."""

    row_lse: Tensor
    """[2, K, N]"""
    column_lse: Tensor
    """[2, K, M], or [2, K, 0] unless symmetric"""
    drows: Tensor
    """[K, N]"""
    amax: Tensor
    """0-d: the largest |drows|, or 1 where all are 0"""
    alpha: Tensor
    """0-d: scale * amax"""

    @classmethod
    def of(cls, launch: LaunchArguments, row_lse: Tensor, column_lse: Tensor, drows: Tensor) -> Upstream:
        """From what the forward has kept, and the gradient of the rows' losses."""
        largest = drows.abs().amax()
        amax = torch.where(largest > 0, largest, 1.0)
        lse = row_lse.contiguous(), column_lse.contiguous()
        return cls(*lse, drows.contiguous(), amax, amax * launch.problem.scale)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    contexts: bool
    targets: bool
    weights: bool
    scale: bool

    @property
    def dq(self) -> bool:
        return self.contexts or self.weights


def info_nce_triton_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dcontexts, dtargets, dweights (in the dtypes of their tensors) and dscale (float32); empty where not needed.

    The inputs are those of the forward, then row_lse, column_lse, queries (computed again if empty), drows, and the
    four needs.
    """
    fields = len(Problem._fields)
    launch = LaunchArguments.of(Problem(*inputs[:fields]))
    row_lse, column_lse, queries, drows = inputs[fields : fields + 4]
    needs = Needs(*inputs[fields + 4 :])
    if launch.problem.weights is None:
        needs = needs._replace(weights=False)
    with on(drows.device):
        upstream = Upstream.of(launch, row_lse, column_lse, drows)
        queries = queries.contiguous() if queries.numel() > 0 else queries_of(launch)
        dq, dtargets, terms = _solve(launch, queries, upstream, needs)
        dcontexts, dweights = dcontexts_and_dweights(launch, dq, upstream.alpha, needs)
        dscale = terms.sum() * upstream.amax if needs.scale else launch.empty(0)
    return dcontexts, dtargets, dweights, dscale


_Solved = tuple[Tensor, Tensor, Tensor]
"""dq [K, N, D] by position, dtargets, and the terms of dscale / amax; empty where not needed."""


def _solve(launch: LaunchArguments, queries: Tensor, upstream: Upstream, needs: Needs) -> _Solved:
    K, N, U, M, D = launch.sizes
    tile = tiles.table_tile("dz", launch.key)
    target_tiles = U * cdiv(M, tile.m) * cdiv(D, tile.output(D))
    processors = tiles.processors_of(queries.device)
    recompute = tiles.recompute_in_backward(launch.key, K * N * M, target_tiles, processors)
    methods = {"recompute": _by_recomputation, "waves": _by_waves}
    key = launch.key, K, N, U, M
    return with_best_method(
        key, "recompute" if recompute else "waves", methods, lambda method: method(launch, queries, upstream, needs)
    )


def _by_recomputation(launch: LaunchArguments, queries: Tensor, upstream: Upstream, needs: Needs) -> _Solved:
    """Two kernels and no workspace."""
    dq, terms = empty_dq(launch, needs.dq), launch.empty(0)
    if needs.dq or needs.scale:
        terms = with_best_tile("dq", launch.key, lambda tile: _recompute_dq(launch, queries, upstream, dq, tile))
    dtargets = empty_if(launch, needs.targets, launch.problem.targets)
    if needs.targets:
        with_best_tile("dz", launch.key, lambda tile: _recompute_dz(launch, queries, upstream, dtargets, tile))
    return dq, dtargets, terms


def empty_if(launch: LaunchArguments, needed: bool, like: Tensor) -> Tensor:
    return launch.empty(*(like.shape if needed else (0,)), dtype=like.dtype)


def empty_dq(launch: LaunchArguments, needed: bool) -> Tensor:
    """dq; without weights it is added up as it is, not multiplied, and so is float32."""
    K, N, _, _, D = launch.sizes
    dtype = torch.float32 if launch.problem.weights is None else launch.problem.contexts.dtype
    return launch.empty(*((K, N, D) if needed else (0,)), dtype=dtype)


def _common(launch: LaunchArguments, upstream: Upstream) -> tuple[Any, ...]:
    """The last arguments, which are the same for all three kernels."""
    K, N, _, M, D = launch.sizes
    return upstream.row_lse, upstream.column_lse, upstream.drows, *launch.ids, K, N, M, launch.offset, D


def _flags(launch: LaunchArguments) -> dict[str, Any]:
    return {"HAS_IDS": launch.has_ids, "SYMMETRIC": launch.problem.symmetric}


def output_options(width: int, output: int, tile: Tile) -> dict[str, Any]:
    """For kernels that keep a part of a gradient's tile, `output` of its `width` columns, on the chip."""
    even = width % tile.d == 0 and width % output == 0
    return {"EVEN": even, "WHOLE": tile.d >= width, "BLOCK_O": output, **options_of(tile)}


def _recompute_dq(launch: LaunchArguments, queries: Tensor, upstream: Upstream, dq: Tensor, tile: Tile) -> Tensor:
    """Fills dq, unless it is empty; returns the terms of dscale."""
    problem, plan = launch.problem, launch.plan
    K, N, _, _, D = launch.sizes
    programs = K * cdiv(N, tile.n)
    terms = launch.empty(programs)
    # for the scale alone one part of the width is enough
    output = tile.output(D)
    parts = cdiv(D, output) if dq.numel() > 0 else 1
    kernels.info_nce_bwd_dq_kernel[(programs, parts)](
        queries,
        problem.targets,
        dq,
        terms,
        problem.scale,
        upstream.amax,
        plan.sorted_tasks,
        plan.sorted_targets,
        *_common(launch, upstream),
        HAS_DQ=dq.numel() > 0,
        **_flags(launch),
        **output_options(D, output, tile),
    )
    return terms


def _recompute_dz(launch: LaunchArguments, queries: Tensor, upstream: Upstream, dtargets: Tensor, tile: Tile) -> None:
    problem, plan = launch.problem, launch.plan
    _, _, U, M, D = launch.sizes
    output = tile.output(D)
    kernels.info_nce_bwd_dz_kernel[(U * cdiv(M, tile.m), cdiv(D, output))](
        queries,
        problem.targets,
        dtargets,
        upstream.alpha,
        problem.scale,
        upstream.amax,
        plan.sorted_tasks,
        plan.target_starts,
        *_common(launch, upstream),
        **_flags(launch),
        **output_options(D, output, tile),
    )


class _Wave(NamedTuple):
    """Neighbouring row tiles of the sub-tasks of one target."""

    target: int
    first_tile: int
    tiles: int
    first_row: int
    """Of K N rows by position."""
    rows: int
    is_first: bool
    """Of its target."""


@functools.lru_cache(maxsize=64)
def _waves(target_ranges: tuple[tuple[int, int], ...], N: int, block: int, most_tiles: int) -> tuple[_Wave, ...]:
    """Waves of about equal size, none of more than most_tiles."""
    tiles_per_task = cdiv(N, block)

    def row(tile: int) -> int:
        return tile // tiles_per_task * N + tile % tiles_per_task * block

    waves = []
    for target, (start, end) in enumerate(target_ranges):
        first, last = start * tiles_per_task, end * tiles_per_task
        size = cdiv(last - first, cdiv(last - first, most_tiles)) if last > first else 1
        for tile in range(first, last, size):
            count = min(size, last - tile)
            waves.append(_Wave(target, tile, count, row(tile), row(tile + count) - row(tile), tile == first))
    return tuple(waves)


def _by_waves(launch: LaunchArguments, queries: Tensor, upstream: Upstream, needs: Needs) -> _Solved:
    """The products of dS by cuBLAS, with as many rows of dS at a time as the workspace holds."""
    return with_best_tile("ds", launch.key, lambda tile: _launch_waves(launch, queries, upstream, needs, tile))


def _launch_waves(launch: LaunchArguments, queries: Tensor, upstream: Upstream, needs: Needs, tile: Tile) -> _Solved:
    problem, plan = launch.problem, launch.plan
    _, N, U, M, D = launch.sizes
    dtype = queries.dtype
    stride = cdiv(M, 16 // queries.itemsize) * (16 // queries.itemsize)  # rows start at 16 bytes
    most_tiles = max(1, tiles.BACKWARD[launch.key.architecture].wave_bytes // (tile.n * stride * queries.itemsize))
    waves = _waves(plan.target_ranges, N, tile.n, most_tiles)
    workspace = launch.empty(max(wave.rows for wave in waves), stride, dtype=dtype)
    column_tiles = cdiv(M, tile.m)
    terms = launch.empty(sum(wave.tiles for wave in waves), column_tiles)
    dq = empty_dq(launch, needs.dq)
    dz = launch.empty(*((U, M, D) if needs.targets else (0,)))
    done = 0
    for wave in waves:
        z, ds = problem.targets[wave.target], workspace[: wave.rows, :M]
        kernels.info_nce_bwd_ds_kernel[(wave.tiles * column_tiles,)](
            queries,
            z,
            workspace,
            terms[done],
            problem.scale,
            upstream.amax,
            plan.sorted_tasks,
            wave.first_tile,
            wave.tiles,
            stride,
            *_common(launch, upstream),
            GROUP=GROUP,
            EVEN=D % tile.d == 0,
            **_flags(launch),
            **options_of(tile),
        )
        done += wave.tiles
        rows = slice(wave.first_row, wave.first_row + wave.rows)
        if needs.dq:
            _multiply(ds, z, dq.flatten(0, 1)[rows], add=False)
        if needs.targets:
            _multiply(ds.T, queries.flatten(0, 1)[rows], dz[wave.target], add=not wave.is_first)
    if needs.targets:
        for target, (first, last) in enumerate(plan.target_ranges):
            if first == last:
                dz[target].zero_()
        dz = dz.mul_(upstream.alpha).to(dtype)
    return dq, dz, terms


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out (+)= a @ b, accumulated in float32 whatever the dtype of the factors."""
    if a.dtype == out.dtype and (a.dtype == torch.float32 or a.device.type == "cuda"):
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.device.type == "cuda":
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        product = a.float() @ b.float()
        out.copy_(out + product if add else product)


def dcontexts_and_dweights(launch: LaunchArguments, dq: Tensor, alpha: Tensor, needs: Needs) -> tuple[Tensor, Tensor]:
    """dc = the sum over a context's sub-tasks of dq W, dW = dq^T c."""
    problem, plan = launch.problem, launch.plan
    dcontexts = empty_if(launch, needs.contexts, problem.contexts)
    if problem.weights is None:
        if needs.contexts:
            _add_up(plan, dq, alpha, dcontexts)
        return dcontexts, launch.empty(0, dtype=dcontexts.dtype)
    dweights = empty_if(launch, needs.weights, problem.weights)
    if needs.contexts:
        grouped_matmul(launch.key, dq, problem.weights, plan.dcontexts, dcontexts, alpha)
    if needs.weights:
        grouped_matmul(launch.key, dq.mT, problem.contexts, plan.dweights, dweights, alpha)
    return dcontexts, dweights


def _add_up(plan: Plan, dq: Tensor, alpha: Tensor, dcontexts: Tensor) -> None:
    """Without weights: each context's gradient is the sum of dq over its sub-tasks, always in the same order."""
    of_context: list[list[int]] = [[] for _ in range(dcontexts.shape[0])]
    for position, context in enumerate(plan.sorted_contexts):
        of_context[context].append(position)
    for context, positions in enumerate(of_context):
        total = dq[positions[0]] if positions else torch.zeros_like(dq[0])
        for position in positions[1:]:
            total = total + dq[position]
        dcontexts[context].copy_(total * alpha)
