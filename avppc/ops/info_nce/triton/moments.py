"""Launches the Triton kernels of the bilinear InfoNCE where clips have moments: kernels_moments.py has the method.

Queries, and the gradients of contexts and weights, are those of N Tc rows without clips: forward.py and backward.py
compute them. Between, each part of the candidates, across clips and inside them, is one launch in the forward and two
in the backward, which keep dq and dz on the chip and compute the logits again; a part that no sub-task has is left out.
Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from avppc.ops.info_nce.problem import MomentProblem, Problem
from avppc.ops.info_nce.triton import kernels_moments as kernels
from avppc.ops.info_nce.triton.backward import (
    Needs,
    Upstream,
    dcontexts_and_dweights,
    empty_dq,
    empty_if,
    output_options,
)
from avppc.ops.info_nce.triton.forward import LaunchArguments, cdiv, combine, on, options_of, queries_of
from avppc.ops.info_nce.triton.tiles import Tile, TileKey, with_best_tile
from avppc.ops.modes import constant

PARTS = ("across", "inside")
"""In the order of their launches: the second adds its part of a gradient to the first's."""
_BITS = {"across": 2, "inside": 1}
"""Of MomentProblem.candidates."""


class MomentLaunch(NamedTuple):
    """A problem as the kernels take it."""

    flat: LaunchArguments
    """Of N Tc rows and M Tz columns without clips."""
    problem: MomentProblem
    parts: tuple[str, ...]
    """Those of PARTS that some sub-task has."""
    candidates: Tensor
    """[K] int32, on the device, as the next"""
    shifts: Tensor
    """[K] int32"""
    ids: tuple[Tensor, Tensor]
    """Of clips; if there are none, tensors that are not read."""

    @classmethod
    def of(cls, problem: MomentProblem) -> MomentLaunch:
        """The arguments for a checked problem; copies what is not contiguous."""
        flat = LaunchArguments.of(Problem(*problem[:5], 0, None, None, False))
        codes, shifts = tuple(problem.candidates.tolist()), tuple(problem.shifts.tolist())
        most = problem.target_moments - problem.context_moments
        if any(code not in (1, 2, 3) for code in codes) or any(not 0 <= shift <= most for shift in shifts):
            raise RuntimeError(f"candidates must be 1, 2 or 3, shifts 0 to {most}; got {codes} and {shifts}")
        parts = tuple(part for part in PARTS if any(code & _BITS[part] for code in codes))
        device = problem.contexts.device
        tables = constant(
            "moments", (codes, shifts, device),
            lambda: torch.tensor([codes, shifts], dtype=torch.int32, device=device), problem.contexts,
        )  # fmt: skip
        ids = (problem.context_ids, problem.target_ids)
        found = tuple(flat.problem.scale if one is None else one.contiguous() for one in ids)
        return cls(flat, problem, parts, tables[0], tables[1], (found[0], found[1]))

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """N, M, Tc, Tz, and the offset, in clips."""
        p = self.problem
        clips, target_clips = p.contexts.shape[1] // p.context_moments, p.targets.shape[1] // p.target_moments
        return clips, target_clips, p.context_moments, p.target_moments, p.positive_offset

    def key(self, part: str) -> TileKey:
        """What the choice of a tile depends on."""
        return self.flat.key._replace(part=part)

    def flags(self, part: str) -> dict[str, Any]:
        """Constants of every kernel."""
        over_clips = part == "across"
        return {"OVER_CLIPS": over_clips, "HAS_IDS": over_clips and self.problem.context_ids is not None}

    def tables(self) -> tuple[Tensor, Tensor]:
        """What sub-tasks look at, and where."""
        return self.candidates, self.shifts


def tile_length(part: str, block: int, moments: int) -> int:
    """Rows (or columns) of a tile of at most `block`: inside clips whole clips, if any fits."""
    return block // moments * moments if part == "inside" and moments <= block else block


def _programs(part: str, clips: int, moments: int, length: int) -> int:
    """Tiles of so many rows (or columns) of one sub-task (or target)."""
    return moments * cdiv(clips, length) if part == "across" else cdiv(clips * moments, length)


def info_nce_moments_triton(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows [K, N Tc], correct [K, N Tc], row_lse [2, K, N Tc], queries [K, N Tc, D] (none without W)."""
    launch = MomentLaunch.of(MomentProblem(*inputs))
    flat = launch.flat
    K, L, *_ = flat.sizes
    rows, correct, positives, row_lse = (flat.empty(*shape, K, L) for shape in ((), (), (), (2,)))
    maxima_and_sums = flat.empty(len(launch.parts), K, L), flat.empty(len(launch.parts), K, L)
    with on(flat.problem.contexts.device):
        queries = queries_of(flat)
        for number, part in enumerate(launch.parts):

            def launch_with(tile: Tile, number: int = number, part: str = part) -> None:
                _statistics(launch, queries, maxima_and_sums, positives, part, number, tile)

            with_best_tile("fwd", launch.key(part), launch_with)
        combine(flat, maxima_and_sums, positives, row_lse, rows, correct, 0)
    saved = queries if flat.problem.weights is not None else flat.empty(0, dtype=queries.dtype)
    return rows, correct, row_lse, saved


def _statistics(
    launch: MomentLaunch,
    queries: Tensor,
    maxima_and_sums: tuple[Tensor, Tensor],
    positives: Tensor,
    part: str,
    number: int,
    tile: Tile,
) -> None:
    """Statistics of the negatives of one part, and the positives that are in it."""
    problem, plan = launch.flat.problem, launch.flat.plan
    K, _, _, _, D = launch.flat.sizes
    clips, _, moments, *_ = launch.sizes
    length = tile_length(part, tile.n, moments)
    kernels.moment_info_nce_fwd_kernel[(K * _programs(part, clips, moments, length),)](
        queries,
        problem.targets,
        problem.scale,
        plan.sorted_tasks,
        plan.sorted_targets,
        *launch.tables(),
        *launch.ids,
        *maxima_and_sums,
        positives,
        K,
        *launch.sizes,
        length,
        D,
        PART=number,
        EVEN=D % tile.d == 0,
        WHOLE=tile.d >= D,
        **launch.flags(part),
        **options_of(tile),
    )


def info_nce_moments_triton_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dcontexts, dtargets, dweights (in the dtypes of their tensors) and dscale (float32); empty where not needed.

    The inputs are those of the forward, then row_lse, queries (computed again if empty), drows, and the four needs.
    """
    fields = len(MomentProblem._fields)
    launch = MomentLaunch.of(MomentProblem(*inputs[:fields]))
    row_lse, queries, drows = inputs[fields : fields + 3]
    flat, needs = launch.flat, Needs(*inputs[fields + 3 :])
    if flat.problem.weights is None:
        needs = needs._replace(weights=False)
    with on(drows.device):
        upstream = Upstream.of(flat, row_lse, flat.empty(0), drows)
        queries = queries.contiguous() if queries.numel() > 0 else queries_of(flat)
        dq, dtargets = empty_dq(flat, needs.dq), empty_if(flat, needs.targets, flat.problem.targets)
        both = len(launch.parts) == 2
        dq_across = torch.empty_like(dq, dtype=torch.float32) if both else dq
        dz_across = torch.empty_like(dtargets, dtype=torch.float32) if both else dtargets
        terms = []
        for part in launch.parts:
            is_last = part == launch.parts[-1]
            dq_here, dz_here = (dq, dtargets) if is_last else (dq_across, dz_across)
            if needs.dq or needs.scale:
                terms.append(_part_of_dq(launch, queries, upstream, dq_here, dq_across, part))
            if needs.targets:
                _part_of_dz(launch, queries, upstream, dz_here, dz_across, part)
        dcontexts, dweights = dcontexts_and_dweights(flat, dq, upstream.alpha, needs)
        dscale = torch.cat(terms).sum() * upstream.amax if needs.scale else flat.empty(0)
    return dcontexts, dtargets, dweights, dscale


def _common(launch: MomentLaunch, upstream: Upstream, length: int) -> tuple[Any, ...]:
    """The last arguments, which are the same for both kernels of the backward."""
    K, _, _, _, D = launch.flat.sizes
    tables = launch.tables()
    return *tables, upstream.row_lse, upstream.drows, *launch.ids, K, *launch.sizes, length, D


def _options(launch: MomentLaunch, part: str, output: int, tile: Tile) -> dict[str, Any]:
    adds = part == "inside" and len(launch.parts) == 2
    return {"ADD": adds, **launch.flags(part), **output_options(launch.flat.key.width, output, tile)}


def _part_of_dq(
    launch: MomentLaunch, queries: Tensor, upstream: Upstream, dq: Tensor, dq_across: Tensor, part: str
) -> Tensor:
    """Fills dq, unless it is empty, by one part, which may add dq_across to it; returns the part's terms of dscale."""
    problem, plan = launch.flat.problem, launch.flat.plan
    K, _, _, _, D = launch.flat.sizes
    clips, _, moments, *_ = launch.sizes

    def launch_with(tile: Tile) -> Tensor:
        length, output = tile_length(part, tile.n, moments), tile.output(D)
        programs = K * _programs(part, clips, moments, length)
        terms = launch.flat.empty(programs)
        # for the scale alone one part of the width is enough
        kernels.moment_info_nce_bwd_dq_kernel[(programs, cdiv(D, output) if dq.numel() > 0 else 1)](
            queries,
            problem.targets,
            dq,
            dq_across,
            terms,
            problem.scale,
            upstream.amax,
            plan.sorted_tasks,
            plan.sorted_targets,
            *_common(launch, upstream, length),
            HAS_DQ=dq.numel() > 0,
            **_options(launch, part, output, tile),
        )
        return terms

    return with_best_tile("dq", launch.key(part), launch_with)


def _part_of_dz(
    launch: MomentLaunch, queries: Tensor, upstream: Upstream, dz: Tensor, dz_across: Tensor, part: str
) -> None:
    """Fills dz by one part, which may add dz_across to it; the last has the factor alpha."""
    problem, plan = launch.flat.problem, launch.flat.plan
    _, _, U, _, D = launch.flat.sizes
    _, target_clips, _, target_moments, _ = launch.sizes

    def launch_with(tile: Tile) -> None:
        length, output = tile_length(part, tile.m, target_moments), tile.output(D)
        programs = U * _programs(part, target_clips, target_moments, length)
        kernels.moment_info_nce_bwd_dz_kernel[(programs, cdiv(D, output))](
            queries,
            problem.targets,
            dz,
            dz_across,
            upstream.alpha,
            problem.scale,
            upstream.amax,
            plan.sorted_tasks,
            plan.target_starts,
            *_common(launch, upstream, length),
            FINAL=part == launch.parts[-1],
            **_options(launch, part, output, tile),
        )

    with_best_tile("dz", launch.key(part), launch_with)
