"""Triton kernels of the bilinear InfoNCE; forward.py calls them, info_nce/reference.py defines the result.

Letters as everywhere (N rows, M columns, D width of targets and queries, K sub-tasks, U targets). A query q is a
context times its sub-task's weights, a logit s = scale q z for a target z, dS the gradient of the logits. Sub-tasks are
sorted by target, so that the queries [K, N, D] of one target's sub-tasks lie side by side; the sub-task at `position`
is sorted_tasks[position]. A row tile is BLOCK_N rows of one sub-task; tile t belongs to position t // T, T = ceil(N /
BLOCK_N). In names `i_` is a program's index, `o_` offsets, `m_` masks, `p_` pointers, `b_` blocks. Logits are float32
and never leave the chip; only `info_nce_bwd_ds_kernel` writes their gradient. There are no atomics: every sum has one
order.

Rows and columns past the end are read as the last one, so that loads need no mask, and are left out of every result.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)  # a maximum over nothing: finite, so that neither x - maximum nor its multiple is NaN


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """float32 x in dtype, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _row_pointers(p, first, rows, D, BLOCK: tl.constexpr):
    """[BLOCK] pointers to the rows from `first` on of a matrix [rows, D]; int64 up to the tile, int32 inside it."""
    o = tl.minimum(tl.arange(0, BLOCK), rows - 1 - first)
    return p + tl.cast(first, tl.int64) * D + o * D


@triton.jit
def _load(p_rows, d, D, EVEN: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]: the columns from d on of rows of width D, zeros past the end."""
    o_d = d + tl.arange(0, BLOCK_D)
    if EVEN:
        b = tl.load(p_rows[:, None] + o_d[None, :])
    else:
        b = tl.load(p_rows[:, None] + o_d[None, :], mask=(o_d < D)[None, :], other=0.0)
    return b


@triton.jit
def _products(
    p_a,  # [BLOCK_A] rows of width D
    p_b,  # [BLOCK_B] rows of width D
    D,
    EVEN: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a b^T, float32 [BLOCK_A, BLOCK_B], in steps of BLOCK_D."""
    acc = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for d in tl.range(0, D, BLOCK_D):
        acc = _dot(_load(p_a, d, D, EVEN, BLOCK_D), tl.trans(_load(p_b, d, D, EVEN, BLOCK_D)), acc, PRECISION)
    return acc


@triton.jit
def _load_ids(context_ids, target_ids, o_n, o_m, N, M, HAS_IDS: tl.constexpr):
    """The ids of rows and columns, in the shapes of o_n and o_m; anything if there are no ids."""
    if HAS_IDS:
        ids_n, ids_m = tl.load(context_ids + tl.minimum(o_n, N - 1)), tl.load(target_ids + tl.minimum(o_m, M - 1))
    else:
        ids_n, ids_m = o_n, o_m
    return ids_n, ids_m


@triton.jit
def _candidates(s, o_n, o_m, ids_n, ids_m, N, M, offset, HAS_IDS: tl.constexpr):
    """s where column o_m is a candidate of row o_n, and -inf elsewhere; o_n and o_m broadcast to s."""
    keep = (o_n < N) & (o_m < M)
    if HAS_IDS:
        keep = keep & ((ids_n != ids_m) | (o_m == o_n + offset))
    return tl.where(keep, s, float("-inf"))


@triton.jit
def _add_terms(b_max, b_sum, s):
    """Running maxima of rows, and sums of exp(s - maximum), with the columns of a tile added."""
    new_max = tl.maximum(b_max, tl.max(s, 1))
    p = tl.exp2(s * LOG2E - (new_max * LOG2E)[:, None])
    return new_max, b_sum * tl.exp2((b_max - new_max) * LOG2E) + tl.sum(p, 1)


@triton.jit
def _is_edge(n, m, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    return (n + BLOCK_N > N) | (m + BLOCK_M > M)


@triton.jit
def _has_positives(n, m, offset, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether the tile of rows from n on and columns from m on holds some row's positive."""
    return (m < n + BLOCK_N + offset) & (m + BLOCK_M > n + offset)


@triton.jit
def info_nce_product_kernel(
    a,  # [.., rows, depth], any strides
    b,  # [.., depth, columns], any strides
    out,  # [outputs, rows, columns]
    alpha,  # []
    starts,  # [outputs + 1]: output o is the sum of the products starts[o] to starts[o + 1] - 1
    a_index,  # [products]: which a and
    b_index,  # [products]: which b are the factors of a product
    rows,
    columns,
    depth,
    a_matrix,
    a_row,
    a_depth,
    b_matrix,
    b_depth,
    b_column,
    FULL_N: tl.constexpr,  # whether BLOCK_N divides rows
    FULL_M: tl.constexpr,  # whether BLOCK_M divides columns
    EVEN: tl.constexpr,  # whether BLOCK_D divides depth
    HAS_ALPHA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[o] = alpha * the sum of its a[a_index] b[b_index]: queries, and gradients of contexts and weights."""
    tiles_n, tiles_m = tl.cdiv(rows, BLOCK_N), tl.cdiv(columns, BLOCK_M)
    pid = tl.program_id(0)
    i_out, i_tile = pid // (tiles_n * tiles_m), pid % (tiles_n * tiles_m)
    n, m = (i_tile // tiles_m) * BLOCK_N, (i_tile % tiles_m) * BLOCK_M
    o_n, o_m = n + tl.arange(0, BLOCK_N), m + tl.arange(0, BLOCK_M)
    # masks past the end, not the last row again: along memory that would hide what lies side by side from the compiler
    o_a, o_b = tl.cast(o_n, tl.int64) * a_row, tl.cast(o_m, tl.int64) * b_column
    m_a, m_b = (o_n < rows)[:, None], (o_m < columns)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i_product in tl.range(tl.load(starts + i_out), tl.load(starts + i_out + 1)):
        p_a = a + tl.load(a_index + i_product).to(tl.int64) * a_matrix + o_a
        p_b = b + tl.load(b_index + i_product).to(tl.int64) * b_matrix + o_b
        for d in tl.range(0, depth, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D)
            p_ad = p_a[:, None] + (tl.cast(o_d, tl.int64) * a_depth)[None, :]
            p_bd = p_b[None, :] + (tl.cast(o_d, tl.int64) * b_depth)[:, None]
            m_ad, m_bd = m_a, m_b
            if not EVEN:
                m_ad, m_bd = m_a & (o_d < depth)[None, :], m_b & (o_d < depth)[:, None]
            b_a = tl.load(p_ad) if FULL_N and EVEN else tl.load(p_ad, mask=m_ad, other=0.0)
            b_b = tl.load(p_bd) if FULL_M and EVEN else tl.load(p_bd, mask=m_bd, other=0.0)
            acc = _dot(b_a, b_b, acc, PRECISION)
    if HAS_ALPHA:
        acc = acc * tl.load(alpha)
    p_out = out + tl.cast(i_out, tl.int64) * rows * columns
    p_out = p_out + (tl.cast(o_n, tl.int64) * columns)[:, None] + o_m[None, :]
    tl.store(p_out, _narrow(acc, out.dtype.element_ty), mask=m_a & m_b)


@triton.jit
def info_nce_fwd_kernel(
    q,  # [K, N, D] queries, by position
    z,  # [U, M, D]
    scale,  # []
    sorted_tasks,  # [K]
    sorted_targets,  # [K]
    context_ids,  # [N]
    target_ids,  # [M]
    row_max,  # [splits, tasks, N], for the sub-tasks of this launch: over the negatives in a split's columns
    row_sum,  # [splits, tasks, N]: sum of exp(s - maximum)
    positives,  # [K, N] by task
    column_max,  # [T, tasks, M]: over the negatives in a tile's rows
    column_sum,  # [T, tasks, M]
    first_position,
    tasks,
    N,
    M,
    offset,  # the positive of row n is column n + offset; below -N: it is elsewhere
    split_columns,  # of each split; a multiple of BLOCK_M
    D,
    EVEN: tl.constexpr,  # whether BLOCK_D divides D
    WHOLE: tl.constexpr,  # whether BLOCK_D is at least D: the tile's rows stay on the chip
    HAS_IDS: tl.constexpr,
    COLUMNS: tl.constexpr,  # whether statistics of columns are wanted
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Running maximum and sum of the negatives of one row tile over one split of the columns; and the positives."""
    tiles = tl.cdiv(N, BLOCK_N)
    i_task, i_tile, i_split = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    position = first_position + i_task
    task, target = tl.load(sorted_tasks + position), tl.load(sorted_targets + position)
    n = i_tile * BLOCK_N
    o_n = n + tl.arange(0, BLOCK_N)
    b_scale = tl.load(scale)
    p_q = _row_pointers(q + tl.cast(position, tl.int64) * N * D, n, N, D, BLOCK_N)
    p_target = z + tl.cast(target, tl.int64) * M * D
    if WHOLE:
        b_q = _load(p_q, 0, D, EVEN, BLOCK_D)
    b_max = tl.full([BLOCK_N], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_positive = tl.zeros([BLOCK_N], tl.float32)
    first = i_split * split_columns
    for m in tl.range(first, tl.minimum(first + split_columns, M), BLOCK_M):
        p_z = _row_pointers(p_target, m, M, D, BLOCK_M)
        if WHOLE:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            s = _dot(b_q, tl.trans(_load(p_z, 0, D, EVEN, BLOCK_D)), acc, PRECISION) * b_scale
        else:
            s = _products(p_q, p_z, D, EVEN, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION) * b_scale
        o_m = m + tl.arange(0, BLOCK_M)
        o_row, o_column = o_n[:, None], o_m[None, :]
        ids_n, ids_m = _load_ids(context_ids, target_ids, o_row, o_column, N, M, HAS_IDS)
        if HAS_IDS:
            s = _candidates(s, o_row, o_column, ids_n, ids_m, N, M, offset, HAS_IDS)
        if _is_edge(n, m, N, M, BLOCK_N, BLOCK_M) | _has_positives(n, m, offset, BLOCK_N, BLOCK_M):
            if not HAS_IDS:
                s = _candidates(s, o_row, o_column, ids_n, ids_m, N, M, offset, HAS_IDS)
            is_positive = o_column == o_row + offset
            b_positive += tl.sum(tl.where(is_positive, s, 0.0), 1)
            s = tl.where(is_positive, float("-inf"), s)
        b_max, b_sum = _add_terms(b_max, b_sum, s)
        if COLUMNS:
            c_max = tl.maximum(tl.max(s, 0), LOWEST)
            c_sum = tl.sum(tl.exp2(s * LOG2E - (c_max * LOG2E)[None, :]), 0)
            o_c = (tl.cast(i_tile, tl.int64) * tasks + i_task) * M + o_m
            tl.store(column_max + o_c, c_max, mask=o_m < M)
            tl.store(column_sum + o_c, c_sum, mask=o_m < M)
    o_r = (tl.cast(i_split, tl.int64) * tasks + i_task) * N + o_n
    tl.store(row_max + o_r, b_max, mask=o_n < N)
    tl.store(row_sum + o_r, b_sum, mask=o_n < N)
    o_positive = o_n + offset
    is_here = (o_positive >= first) & (o_positive < first + split_columns)
    tl.store(positives + tl.cast(task, tl.int64) * N + o_n, b_positive, mask=(o_n < N) & is_here)


@triton.jit
def info_nce_lse_kernel(
    part_max,  # [parts, tasks, L]
    part_sum,  # [parts, tasks, L]
    positives,  # [K, L]
    lse,  # [2, K, L]: maximum, log of the sum of exp(s - maximum)
    losses,  # [K, L]
    correct,  # [K, L]
    sorted_tasks,  # [K]
    first_position,
    tasks,
    K,
    L,
    parts,
    HAS_POSITIVE: tl.constexpr,
    IS_COLUMN: tl.constexpr,  # whether these are losses of columns, averaged into the row losses that are there
    BLOCK: tl.constexpr,
):
    """Log-sum-exps, losses and hits from the statistics of the negatives in each part."""
    tiles = tl.cdiv(L, BLOCK)
    i_task, i_tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o = i_tile * BLOCK + tl.arange(0, BLOCK)
    mask = o < L
    task = tl.load(sorted_tasks + first_position + i_task)
    o_task = tl.cast(task, tl.int64) * L + o
    b_max = tl.full([BLOCK], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for part in tl.range(0, parts):
        o_part = (tl.cast(part, tl.int64) * tasks + i_task) * L + o
        p_max = tl.load(part_max + o_part, mask=mask, other=LOWEST)
        p_sum = tl.load(part_sum + o_part, mask=mask, other=0.0)
        new_max = tl.maximum(b_max, p_max)
        b_sum = b_sum * tl.exp2((b_max - new_max) * LOG2E) + p_sum * tl.exp2((p_max - new_max) * LOG2E)
        b_max = new_max
    if HAS_POSITIVE:
        b_positive = tl.load(positives + o_task, mask=mask, other=0.0)
        # log(exp(positive) + exp(negatives)) - positive = log(1 + exp(x)), which keeps the digits of a small loss
        x = b_max - b_positive + tl.log(b_sum)
        e = tl.exp(-tl.abs(x))
        u = 1.0 + e
        log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
        b_loss = tl.maximum(x, 0.0) + log1p
        is_correct = tl.where(b_positive > b_max, 1.0, 0.0)
        new_max = tl.maximum(b_max, b_positive)
        b_sum = b_sum * tl.exp2((b_max - new_max) * LOG2E) + tl.exp2((b_positive - new_max) * LOG2E)
        b_max = new_max
    else:
        b_loss = b_max + tl.log(b_sum)
        is_correct = tl.zeros([BLOCK], tl.float32)
    tl.store(lse + o_task, b_max, mask=mask)
    tl.store(lse + tl.cast(K, tl.int64) * L + o_task, tl.log(b_sum), mask=mask)
    if IS_COLUMN:
        b_loss = (b_loss + tl.load(losses + o_task, mask=mask, other=0.0)) * 0.5
    else:
        tl.store(correct + o_task, is_correct, mask=mask)
    tl.store(losses + o_task, b_loss, mask=mask)
