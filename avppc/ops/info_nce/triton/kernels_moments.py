"""Triton kernels of the bilinear InfoNCE where clips have moments; moments.py here calls them.

Letters, names and positions are those of kernels_forward.py, but N contexts and M targets are clips, of Tc and Tz
moments that lie one after another: N Tc rows, M Tz columns. Each kernel has two forms, for the two parts of a row's
candidates; ../moments.py defines them.

Inside clips a tile of rows holds as many whole clips as fit, so that tensor cores have work, and goes over the columns
of these clips alone; each row keeps those of its own clip:

    rows of clip 0    [ s  .  . ]
    rows of clip 1    [ .  s  . ]      N Tc (columns of a tile) dot products, not N Tc M Tz
    rows of clip 2    [ .  .  s ]

Across clips a tile holds one moment of many clips, Tc rows from each other, and goes over the moment t + shift of all
target clips, Tz rows from each other: Tc problems of N x M. The own clip is none of the negatives; it is the positive,
unless the sub-task looks inside clips, too, where the positive is then.

A sub-task that has no candidates in a part adds nothing to it. Both parts of a gradient are summed in float32: the part
across clips comes first and is kept, the other one adds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from avppc.ops.info_nce.triton.kernels_backward import _weights
from avppc.ops.info_nce.triton.kernels_forward import (
    LOG2E,
    LOWEST,
    _add_terms,
    _dot,
    _load,
    _load_ids,
    _narrow,
    _products,
)

INSIDE = tl.constexpr(1)  # the bits of `candidates`
ACROSS = tl.constexpr(2)
# A kernel is compiled once for all sizes but the width, whose multiples make wide loads.
SIZES = ("K", "N", "M", "Tc", "Tz", "offset", "tile_rows", "tile_columns")


@triton.jit
def _tile(tile_length, clips, T, OVER_CLIPS: tl.constexpr):
    """Of this program: which sub-task or target, which moment, the first row (or column) and the end of its tile."""
    length, moments = clips * T, 1
    if OVER_CLIPS:
        length, moments = clips, T
    tiles = tl.cdiv(length, tile_length)
    pid = tl.program_id(0)
    first = (pid % tiles) * tile_length
    return pid // (tiles * moments), (pid // tiles) % moments, first, tl.minimum(first + tile_length, length)


@triton.jit
def _places(o, end, moment, clips, T, OVER_CLIPS: tl.constexpr):
    """Where the rows o, which count clips or moments of clips, lie among clips * T of them: past all from `end` on."""
    places = o * T + moment if OVER_CLIPS else o
    return tl.where(o < end, places, clips * T)


@triton.jit
def _pointers(p, places, rows, D):
    """Pointers to rows of a matrix [rows, D]; past the end to the last one."""
    return p + tl.cast(tl.minimum(places, rows - 1), tl.int64) * D


@triton.jit
def _columns(n, end_n, M, Tc, Tz, offset, looks, OVER_CLIPS: tl.constexpr):
    """The first of the columns that rows n to end_n - 1 may look at, and the end of them; none if they do not look."""
    first, end_m = 0, M
    if not OVER_CLIPS:
        first, end_m = (n // Tc + offset) * Tz, ((end_n - 1) // Tc + 1 + offset) * Tz
    return first, tl.where(looks, end_m, first)


@triton.jit
def _own(o_n, Tc, Tz, offset, shift, OVER_CLIPS: tl.constexpr):
    """The column of each row's positive; across clips that of its own clip."""
    return o_n + offset if OVER_CLIPS else (o_n // Tc + offset) * Tz + o_n % Tc + shift


@triton.jit
def _keep(s, o_n, o_m, o_own, ids_n, ids_m, end_n, end_m, Tc, Tz, offset, positive_here, OVER_CLIPS: tl.constexpr,
          HAS_IDS: tl.constexpr):  # fmt: skip
    """s where a column is a candidate of a row, the positive among them if it is here, and -inf elsewhere."""
    keep = (o_n < end_n) & (o_m < end_m)
    if OVER_CLIPS:
        keep = keep & ((o_m != o_own) | positive_here)
        if HAS_IDS:
            keep = keep & ((ids_n != ids_m) | (o_m == o_own))
    else:
        keep = keep & (o_m // Tz == o_n // Tc + offset)
    return tl.where(keep, s, float("-inf"))


@triton.jit
def _looks(code, OVER_CLIPS: tl.constexpr):
    """Whether a sub-task has candidates in this part, and whether its positive is among them."""
    looks, positive_here = code & INSIDE, True
    if OVER_CLIPS:
        looks, positive_here = code & ACROSS, (code & INSIDE) == 0
    return looks != 0, positive_here


@triton.jit(do_not_specialize=SIZES)
def moment_info_nce_fwd_kernel(
    q,  # [K, L, D] queries, by position
    z,  # [U, M Tz, D]
    scale,  # []
    sorted_tasks,  # [K]
    sorted_targets,  # [K]
    candidates,  # [K]: INSIDE, ACROSS or both
    shifts,  # [K]
    context_ids,  # [N]
    target_ids,  # [M]
    row_max,  # [parts, K, L] by position: over the negatives of this part
    row_sum,  # [parts, K, L]: sum of exp(s - maximum)
    positives,  # [K, L] by task
    K,
    N,
    M,
    Tc,
    Tz,
    offset,  # the targets of clip n are those of clip n + offset
    tile_rows,  # of a tile, at most BLOCK_N
    D,
    OVER_CLIPS: tl.constexpr,  # across clips, not inside them
    PART: tl.constexpr,
    EVEN: tl.constexpr,  # whether BLOCK_D divides D
    WHOLE: tl.constexpr,  # whether BLOCK_D is at least D: the tile's rows stay on the chip
    HAS_IDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Running maximum and sum of the negatives of one tile's rows in this part; and the positives that are in it."""
    position, t, n, end_n = _tile(tile_rows, N, Tc, OVER_CLIPS)
    task, target = tl.load(sorted_tasks + position), tl.load(sorted_targets + position)
    shift = tl.load(shifts + task)
    looks, positive_here = _looks(tl.load(candidates + task), OVER_CLIPS)
    first, end_m = _columns(n, end_n, M, Tc, Tz, offset, looks, OVER_CLIPS)
    o_n = n + tl.arange(0, BLOCK_N)
    places = _places(o_n, end_n, t, N, Tc, OVER_CLIPS)
    o_row, o_own = o_n[:, None], _own(o_n, Tc, Tz, offset, shift, OVER_CLIPS)[:, None]
    b_scale = tl.load(scale)
    p_q = _pointers(q + tl.cast(position, tl.int64) * N * Tc * D, places, N * Tc, D)
    p_target = z + tl.cast(target, tl.int64) * M * Tz * D
    if WHOLE:
        b_q = _load(p_q, 0, D, EVEN, BLOCK_D)
    b_max = tl.full([BLOCK_N], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_positive = tl.zeros([BLOCK_N], tl.float32)
    for m in tl.range(first, end_m, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        p_z = _pointers(p_target, _places(o_m, end_m, t + shift, M, Tz, OVER_CLIPS), M * Tz, D)
        if WHOLE:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            s = _dot(b_q, tl.trans(_load(p_z, 0, D, EVEN, BLOCK_D)), acc, PRECISION) * b_scale
        else:
            s = _products(p_q, p_z, D, EVEN, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION) * b_scale
        o_column = o_m[None, :]
        ids_n, ids_m = _load_ids(context_ids, target_ids, o_row, o_column, N, M, HAS_IDS)
        s = _keep(s, o_row, o_column, o_own, ids_n, ids_m, end_n, end_m, Tc, Tz, offset, positive_here, OVER_CLIPS,
                  HAS_IDS)  # fmt: skip
        is_positive = o_column == o_own
        b_positive += tl.sum(tl.where(is_positive, s, 0.0), 1)
        s = tl.where(is_positive, float("-inf"), s)
        b_max, b_sum = _add_terms(b_max, b_sum, s)
    o_part = (tl.cast(K, tl.int64) * PART + position) * N * Tc + places
    tl.store(row_max + o_part, b_max, mask=o_n < end_n)
    tl.store(row_sum + o_part, b_sum, mask=o_n < end_n)
    p_positive = positives + tl.cast(task, tl.int64) * N * Tc + places
    tl.store(p_positive, b_positive, mask=(o_n < end_n) & looks & positive_here)


@triton.jit
def _moment_logit_gradient(
    s,  # [BLOCK_N, BLOCK_M], or transposed; the next five broadcast to it
    o_n,
    o_m,
    o_own,
    row_max,  # as are the next two: by _weights
    row_weight,
    du,
    context_ids,  # [N]
    target_ids,  # [M]
    end_n,
    end_m,
    N,
    M,
    Tc,
    Tz,
    offset,
    positive_here,
    OVER_CLIPS: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    """dS: each candidate's softmax term, less the positive's gradient if it is here."""
    ids_n, ids_m = _load_ids(context_ids, target_ids, o_n, o_m, N, M, HAS_IDS)
    s = _keep(s, o_n, o_m, o_own, ids_n, ids_m, end_n, end_m, Tc, Tz, offset, positive_here, OVER_CLIPS, HAS_IDS)
    ds = tl.exp2(s * LOG2E - row_max) * row_weight
    return tl.where((o_m == o_own) & (o_n < end_n) & positive_here, ds - du, ds)


@triton.jit(do_not_specialize=SIZES)
def moment_info_nce_bwd_dq_kernel(
    q,  # [K, L, D] by position
    z,  # [U, M Tz, D]
    dq,  # [K, L, D] by position, without the factors scale and amax
    dq_across,  # [K, L, D] float32: the other part, of sub-tasks that have it
    dscale,  # [programs]: a term of each tile, without the factor amax
    scale,  # []
    amax,  # []: what the upstream gradients are divided by
    sorted_tasks,  # [K]
    sorted_targets,  # [K]
    candidates,  # [K]
    shifts,  # [K]
    row_lse,  # [2, K, L]
    drows,  # [K, L]
    context_ids,  # [N]
    target_ids,  # [M]
    K,
    N,
    M,
    Tc,
    Tz,
    offset,
    tile_rows,
    D,
    OVER_CLIPS: tl.constexpr,
    ADD: tl.constexpr,  # whether dq_across is added
    EVEN: tl.constexpr,  # whether BLOCK_D and BLOCK_O divide D
    WHOLE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,  # columns of dq of one program; BLOCK_D where that is all
    PRECISION: tl.constexpr,
    HAS_DQ: tl.constexpr,  # False: for dscale alone
):
    """dq = dS z of one tile's rows, with logits computed again; the grid's second axis goes over parts of the width."""
    position, t, n, end_n = _tile(tile_rows, N, Tc, OVER_CLIPS)
    task, target = tl.load(sorted_tasks + position), tl.load(sorted_targets + position)
    code, shift = tl.load(candidates + task), tl.load(shifts + task)
    looks, positive_here = _looks(code, OVER_CLIPS)
    first, end_m = _columns(n, end_n, M, Tc, Tz, offset, looks, OVER_CLIPS)
    o_n = n + tl.arange(0, BLOCK_N)
    places = _places(o_n, end_n, t, N, Tc, OVER_CLIPS)
    o_own = _own(o_n, Tc, Tz, offset, shift, OVER_CLIPS)[:, None]
    b_scale = tl.load(scale)
    o_task = tl.cast(position, tl.int64) * N * Tc * D
    p_q = _pointers(q + o_task, places, N * Tc, D)
    p_target = z + tl.cast(target, tl.int64) * M * Tz * D
    row_max, row_weight, du = _weights(row_lse, drows, amax, task, places, K, N * Tc)
    o_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_dq = o_task + (tl.cast(places, tl.int64) * D)[:, None] + o_o[None, :]
    m_dq = (o_n < end_n)[:, None] & (o_o < D)[None, :]
    if WHOLE:
        b_q = _load(p_q, 0, D, EVEN, BLOCK_D)
    acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    b_dscale = tl.zeros([BLOCK_N], tl.float32)
    for m in tl.range(first, end_m, BLOCK_M):
        o_m = m + tl.arange(0, BLOCK_M)
        p_z = _pointers(p_target, _places(o_m, end_m, t + shift, M, Tz, OVER_CLIPS), M * Tz, D)
        if WHOLE:
            b_z = _load(p_z, 0, D, EVEN, BLOCK_D)
            dots = _dot(b_q, tl.trans(b_z), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
        else:
            dots = _products(p_q, p_z, D, EVEN, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION)
            b_z = _load(p_z, tl.program_id(1) * BLOCK_O, D, EVEN, BLOCK_O)
        ds = _moment_logit_gradient(
            dots * b_scale, o_n[:, None], o_m[None, :], o_own, row_max[:, None], row_weight[:, None], du[:, None],
            context_ids, target_ids, end_n, end_m, N, M, Tc, Tz, offset, positive_here, OVER_CLIPS, HAS_IDS,
        )  # fmt: skip
        b_dscale += tl.sum(ds * dots, 1)
        if HAS_DQ:
            acc = _dot(_narrow(ds, z.dtype.element_ty), b_z, acc, PRECISION)
    if tl.program_id(1) == 0:
        tl.store(dscale + tl.program_id(0), tl.sum(b_dscale, 0))
    if HAS_DQ:
        if ADD:
            acc += tl.load(dq_across + o_dq, mask=m_dq & ((code & ACROSS) != 0), other=0.0)
        tl.store(dq + o_dq, _narrow(acc, dq.dtype.element_ty), mask=m_dq)


@triton.jit(do_not_specialize=SIZES)
def moment_info_nce_bwd_dz_kernel(
    q,  # [K, L, D] by position
    z,  # [U, M Tz, D]
    dz,  # [U, M Tz, D]
    dz_across,  # [U, M Tz, D] float32: the other part, without the factor alpha
    alpha,  # []: scale * amax, a factor of dz
    scale,  # []
    amax,  # []
    sorted_tasks,  # [K]
    target_starts,  # [U + 1]: the positions of target u are target_starts[u] to target_starts[u + 1] - 1
    candidates,  # [K]
    shifts,  # [K]
    row_lse,  # [2, K, L]
    drows,  # [K, L]
    context_ids,  # [N]
    target_ids,  # [M]
    K,
    N,
    M,
    Tc,
    Tz,
    offset,
    tile_columns,  # of a tile, at most BLOCK_M
    D,
    OVER_CLIPS: tl.constexpr,
    ADD: tl.constexpr,  # whether dz_across is added
    FINAL: tl.constexpr,  # whether the factor alpha is in
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz: the sum of dS^T q over the rows of the target's sub-tasks, for one tile of its columns; logits transposed."""
    target, moment, m, end_m = _tile(tile_columns, M, Tz, OVER_CLIPS)
    if OVER_CLIPS:
        first, end = 0, N
    else:
        first, end = tl.maximum(m // Tz - offset, 0) * Tc, tl.minimum((end_m - 1) // Tz + 1 - offset, N) * Tc
    o_m = m + tl.arange(0, BLOCK_M)
    columns = _places(o_m, end_m, moment, M, Tz, OVER_CLIPS)
    b_scale = tl.load(scale)
    o_target = tl.cast(target, tl.int64) * M * Tz * D
    p_z = _pointers(z + o_target, columns, M * Tz, D)
    if WHOLE:
        b_z = _load(p_z, 0, D, EVEN, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    for position in tl.range(tl.load(target_starts + target), tl.load(target_starts + target + 1)):
        task = tl.load(sorted_tasks + position)
        shift = tl.load(shifts + task)
        looks, positive_here = _looks(tl.load(candidates + task), OVER_CLIPS)
        t = moment - shift
        if OVER_CLIPS:
            looks = looks & (t >= 0) & (t < Tc)
        end_n = tl.where(looks, end, first)
        p_context = q + tl.cast(position, tl.int64) * N * Tc * D
        for n in tl.range(first, end_n, BLOCK_N):
            o_n = n + tl.arange(0, BLOCK_N)
            rows = _places(o_n, end_n, t, N, Tc, OVER_CLIPS)
            p_q = _pointers(p_context, rows, N * Tc, D)
            if WHOLE:
                b_q = _load(p_q, 0, D, EVEN, BLOCK_D)
                dots = _dot(b_z, tl.trans(b_q), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
            else:
                dots = _products(p_z, p_q, D, EVEN, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
                b_q = _load(p_q, tl.program_id(1) * BLOCK_O, D, EVEN, BLOCK_O)
            row_max, row_weight, du = _weights(row_lse, drows, amax, task, rows, K, N * Tc)
            o_own = _own(o_n, Tc, Tz, offset, shift, OVER_CLIPS)[None, :]
            ds = _moment_logit_gradient(
                dots * b_scale, o_n[None, :], o_m[:, None], o_own, row_max[None, :], row_weight[None, :], du[None, :],
                context_ids, target_ids, end_n, end_m, N, M, Tc, Tz, offset, positive_here, OVER_CLIPS, HAS_IDS,
            )  # fmt: skip
            acc = _dot(_narrow(ds, q.dtype.element_ty), b_q, acc, PRECISION)
    o_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_dz = o_target + (tl.cast(columns, tl.int64) * D)[:, None] + o_o[None, :]
    m_dz = (o_m < end_m)[:, None] & (o_o < D)[None, :]
    if ADD:
        acc += tl.load(dz_across + o_dz, mask=m_dz, other=0.0)
    if FINAL:
        acc = acc * tl.load(alpha)
    tl.store(dz + o_dz, _narrow(acc, dz.dtype.element_ty), mask=m_dz)
