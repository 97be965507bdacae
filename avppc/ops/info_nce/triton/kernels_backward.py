"""Triton kernels of the bilinear InfoNCE's backward: logits computed again, dS on the chip or by waves in a workspace.

Letters, names and positions are those of kernels_forward.py. dS is the gradient of the logits, divided by `amax`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from avppc.ops.info_nce.triton.kernels_forward import (
    LOG2E,
    _candidates,
    _dot,
    _has_positives,
    _is_edge,
    _load,
    _load_ids,
    _narrow,
    _products,
    _row_pointers,
)


@triton.jit
def _weights(lse, dlosses, amax, task, o, K, L):
    """Of rows or columns o of a task: maximum in base 2, upstream gradient over the sum of exponentials, and itself.

    Past the end the weights are 0, and the maximum is so high that no exponential overflows.
    """
    o_task = tl.cast(task, tl.int64) * L + o
    b_du = tl.load(dlosses + o_task, mask=o < L, other=0.0) / tl.load(amax)
    b_max = tl.load(lse + o_task, mask=o < L, other=float("inf"))
    b_log = tl.load(lse + tl.cast(K, tl.int64) * L + o_task, mask=o < L, other=0.0)
    return b_max * LOG2E, b_du * tl.exp2(-b_log * LOG2E), b_du


@triton.jit
def _logit_gradient(
    s,  # [BLOCK_N, BLOCK_M], or [BLOCK_M, BLOCK_N] if TRANSPOSED
    n,
    m,
    row_max,  # [BLOCK_N], as are the next two: by _weights
    row_weight,
    du,
    column_lse,  # [2, K, M]
    drows,  # [K, N]
    amax,  # []
    task,
    context_ids,  # [N]
    target_ids,  # [M]
    K,
    N,
    M,
    offset,
    TRANSPOSED: tl.constexpr,
    HAS_IDS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dS of the tile from row n and column m on: each candidate's softmax term, less the positive's gradient."""
    ACROSS_N: tl.constexpr = 0 if TRANSPOSED else 1  # the axis along which values of rows are repeated
    ACROSS_M: tl.constexpr = 1 if TRANSPOSED else 0
    columns = m + tl.arange(0, BLOCK_M)
    o_n, o_m = tl.expand_dims(n + tl.arange(0, BLOCK_N), ACROSS_N), tl.expand_dims(columns, ACROSS_M)
    if HAS_IDS or _is_edge(n, m, N, M, BLOCK_N, BLOCK_M):
        ids_n, ids_m = _load_ids(context_ids, target_ids, o_n, o_m, N, M, HAS_IDS)
        s = _candidates(s, o_n, o_m, ids_n, ids_m, N, M, offset, HAS_IDS)
    ds = tl.exp2(s * LOG2E - tl.expand_dims(row_max, ACROSS_N)) * tl.expand_dims(row_weight, ACROSS_N)
    if SYMMETRIC:
        column_max, column_weight, _ = _weights(column_lse, drows, amax, task, columns, K, M)
        other = tl.exp2(s * LOG2E - tl.expand_dims(column_max, ACROSS_M)) * tl.expand_dims(column_weight, ACROSS_M)
        ds = (ds + other) * 0.5
    if _has_positives(n, m, offset, BLOCK_N, BLOCK_M):
        ds = tl.where((o_m == o_n + offset) & (o_n < N), ds - tl.expand_dims(du, ACROSS_N), ds)
    return ds


@triton.jit
def info_nce_bwd_dq_kernel(
    q,  # [K, N, D] by position
    z,  # [U, M, D]
    dq,  # [K, N, D] by position, without the factors scale and amax
    dscale,  # [K T]: a term of each tile, without the factor amax
    scale,  # []
    amax,  # []: what the upstream gradients are divided by
    sorted_tasks,  # [K]
    sorted_targets,  # [K]
    row_lse,  # [2, K, N]
    column_lse,  # [2, K, M]
    drows,  # [K, N]
    context_ids,  # [N]
    target_ids,  # [M]
    K,
    N,
    M,
    offset,
    D,
    EVEN: tl.constexpr,  # whether BLOCK_D (and BLOCK_O) divide D
    WHOLE: tl.constexpr,  # whether BLOCK_D is at least D: the tile's rows stay on the chip
    HAS_IDS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,  # columns of dq of one program; BLOCK_D where that is all
    PRECISION: tl.constexpr,
    HAS_DQ: tl.constexpr,  # False: for dscale alone
):
    """dq = dS z of one row tile, with logits computed again; the grid's second axis goes over parts of the width."""
    tiles = tl.cdiv(N, BLOCK_N)
    position, n = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_N
    task, target = tl.load(sorted_tasks + position), tl.load(sorted_targets + position)
    o_n = n + tl.arange(0, BLOCK_N)
    o = tl.program_id(1) * BLOCK_O
    b_scale = tl.load(scale)
    o_task = tl.cast(position, tl.int64) * N * D
    p_q = _row_pointers(q + o_task, n, N, D, BLOCK_N)
    p_target = z + tl.cast(target, tl.int64) * M * D
    row_max, row_weight, du = _weights(row_lse, drows, amax, task, o_n, K, N)
    if WHOLE:
        b_q = _load(p_q, 0, D, EVEN, BLOCK_D)
    acc = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
    b_dscale = tl.zeros([BLOCK_N], tl.float32)
    for m in tl.range(0, M, BLOCK_M):
        p_z = _row_pointers(p_target, m, M, D, BLOCK_M)
        if WHOLE:
            b_z = _load(p_z, 0, D, EVEN, BLOCK_D)
            dots = _dot(b_q, tl.trans(b_z), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
        else:
            dots = _products(p_q, p_z, D, EVEN, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION)
            b_z = _load(p_z, o, D, EVEN, BLOCK_O)
        ds = _logit_gradient(
            dots * b_scale, n, m, row_max, row_weight, du, column_lse, drows, amax, task, context_ids, target_ids,
            K, N, M, offset, False, HAS_IDS, SYMMETRIC, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        b_dscale += tl.sum(ds * dots, 1)
        if HAS_DQ:
            acc = _dot(_narrow(ds, z.dtype.element_ty), b_z, acc, PRECISION)
    if tl.program_id(1) == 0:
        tl.store(dscale + tl.program_id(0), tl.sum(b_dscale, 0))
    if HAS_DQ:
        o_o = o + tl.arange(0, BLOCK_O)
        p_dq = dq + o_task + (tl.cast(o_n, tl.int64) * D)[:, None] + o_o[None, :]
        tl.store(p_dq, _narrow(acc, dq.dtype.element_ty), mask=(o_n < N)[:, None] & (o_o < D)[None, :])


@triton.jit
def info_nce_bwd_dz_kernel(
    q,  # [K, N, D] by position
    z,  # [U, M, D]
    dz,  # [U, M, D]
    alpha,  # []: scale * amax, a factor of dz
    scale,  # []
    amax,  # []
    sorted_tasks,  # [K]
    target_starts,  # [U + 1]: the positions of target u are target_starts[u] to target_starts[u + 1] - 1
    row_lse,  # [2, K, N]
    column_lse,  # [2, K, M]
    drows,  # [K, N]
    context_ids,  # [N]
    target_ids,  # [M]
    K,
    N,
    M,
    offset,
    D,
    EVEN: tl.constexpr,  # whether BLOCK_D (and BLOCK_O) divide D
    WHOLE: tl.constexpr,  # whether BLOCK_D is at least D: the tile's rows stay on the chip
    HAS_IDS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz: the sum of dS^T q over all rows of the target's sub-tasks, for one tile of its rows; logits transposed."""
    tiles_n, tiles_m = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    target, m = tl.program_id(0) // tiles_m, (tl.program_id(0) % tiles_m) * BLOCK_M
    o_m = m + tl.arange(0, BLOCK_M)
    o = tl.program_id(1) * BLOCK_O
    b_scale = tl.load(scale)
    o_target = tl.cast(target, tl.int64) * M * D
    p_z = _row_pointers(z + o_target, m, M, D, BLOCK_M)
    if WHOLE:
        b_z = _load(p_z, 0, D, EVEN, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    first, last = tl.load(target_starts + target) * tiles_n, tl.load(target_starts + target + 1) * tiles_n
    for tile in tl.range(first, last):
        position, n = tile // tiles_n, (tile % tiles_n) * BLOCK_N
        task = tl.load(sorted_tasks + position)
        p_q = _row_pointers(q + tl.cast(position, tl.int64) * N * D, n, N, D, BLOCK_N)
        if WHOLE:
            b_q = _load(p_q, 0, D, EVEN, BLOCK_D)
            dots = _dot(b_z, tl.trans(b_q), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        else:
            dots = _products(p_z, p_q, D, EVEN, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)
            b_q = _load(p_q, o, D, EVEN, BLOCK_O)
        o_n = n + tl.arange(0, BLOCK_N)
        row_max, row_weight, du = _weights(row_lse, drows, amax, task, o_n, K, N)
        ds = _logit_gradient(
            dots * b_scale, n, m, row_max, row_weight, du, column_lse, drows, amax, task, context_ids, target_ids,
            K, N, M, offset, True, HAS_IDS, SYMMETRIC, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        acc = _dot(_narrow(ds, q.dtype.element_ty), b_q, acc, PRECISION)
    o_o = o + tl.arange(0, BLOCK_O)
    p_dz = dz + o_target + (tl.cast(o_m, tl.int64) * D)[:, None] + o_o[None, :]
    b_dz = _narrow(acc * tl.load(alpha), dz.dtype.element_ty)
    tl.store(p_dz, b_dz, mask=(o_m < M)[:, None] & (o_o < D)[None, :])


@triton.jit
def info_nce_bwd_ds_kernel(
    q,  # [K, N, D] by position
    z,  # [M, D], the target of this wave
    ds_wave,  # [rows of the wave, row_stride]
    dscale,  # [programs]
    scale,  # []
    amax,  # []
    sorted_tasks,  # [K]
    first_tile,  # the wave is the row tiles first_tile.., counted from position 0
    tiles,  # of the wave
    row_stride,
    row_lse,  # [2, K, N]
    column_lse,  # [2, K, M]
    drows,  # [K, N]
    context_ids,  # [N]
    target_ids,  # [M]
    K,
    N,
    M,
    offset,
    D,
    EVEN: tl.constexpr,  # whether BLOCK_D divides D
    HAS_IDS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,  # row tiles that walk the columns together, for the cache
    PRECISION: tl.constexpr,
):
    """dS of one tile of a wave of rows, with the logits computed again, into the workspace."""
    tiles_n, tiles_m = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    first = (pid // (GROUP * tiles_m)) * GROUP
    height = tl.minimum(tiles - first, GROUP)
    i_tile, m = first + (pid % (GROUP * tiles_m)) % height, ((pid % (GROUP * tiles_m)) // height) * BLOCK_M
    tile = first_tile + i_tile
    position, n = tile // tiles_n, (tile % tiles_n) * BLOCK_N
    task = tl.load(sorted_tasks + position)
    o_n, o_m = n + tl.arange(0, BLOCK_N), m + tl.arange(0, BLOCK_M)
    o_task = tl.cast(position, tl.int64) * N
    p_q = _row_pointers(q + o_task * D, n, N, D, BLOCK_N)
    dots = _products(p_q, _row_pointers(z, m, M, D, BLOCK_M), D, EVEN, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION)
    row_max, row_weight, du = _weights(row_lse, drows, amax, task, o_n, K, N)
    ds = _logit_gradient(
        dots * tl.load(scale), n, m, row_max, row_weight, du, column_lse, drows, amax, task, context_ids, target_ids,
        K, N, M, offset, False, HAS_IDS, SYMMETRIC, BLOCK_N, BLOCK_M,
    )  # fmt: skip
    tl.store(dscale + pid, tl.sum(ds * dots))
    o_first = tl.cast(first_tile // tiles_n, tl.int64) * N + (first_tile % tiles_n) * BLOCK_N  # the wave's first row
    p_ds = ds_wave + ((o_task + o_n - o_first) * row_stride)[:, None] + o_m[None, :]
    tl.store(p_ds, _narrow(ds, ds_wave.dtype.element_ty), mask=(o_n < N)[:, None] & (o_m < M)[None, :])
