"""The checked arguments of one bilinear InfoNCE, in the one form that every backend takes."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from avppc.checks import FLOAT_DTYPES, INTEGER_DTYPES, check_bool, check_tensor, dtype_name, product_dtype
from avppc.ops.modes import constant, is_plain

NO_POSITIVE = -1
"""The positive_offset of rows whose positive is elsewhere, so that their loss is their log-sum-exp: where positives are
given by index, and in a ring, where the targets are another process's. M may then be less than N."""
NORMALIZATIONS = ("none", "layer_norm", "l2")

Pairs = Tensor | Sequence[Sequence[int]]


class Problem(NamedTuple):
    """K bilinear InfoNCE losses over shared embeddings; every shape, dtype and device has been checked."""

    contexts: Tensor
    """[C, N, Dc]"""
    targets: Tensor
    """[U, M, Dz], of the contexts' dtype and device"""
    weights: Tensor | None
    """[K, Dz, Dc], or None for plain dot products"""
    pairs: Tensor
    """[K, 2] int64 on the CPU: the context and the target of each sub-task"""
    scale: Tensor
    """0-d, multiplies the logits"""
    positive_offset: int
    """The positive of row i is column i + positive_offset; NO_POSITIVE: it is elsewhere."""
    context_ids: Tensor | None
    """[N] int64, or None"""
    target_ids: Tensor | None
    """[M] int64, or None exactly where context_ids is None"""
    symmetric: bool
    """Whether the losses of rows and of columns are averaged; then M == N."""

    @property
    def tasks(self) -> int:
        """The number of sub-tasks, K."""
        return self.pairs.shape[0]

    @property
    def rows(self) -> int:
        """The number of contexts of each sub-task, N."""
        return self.contexts.shape[1]


class MomentProblem(NamedTuple):
    """K losses over clips with moments, checked; the moments of a clip lie one after another."""

    contexts: Tensor
    """[C, N Tc, Dc]"""
    targets: Tensor
    """[U, M Tz, Dz]"""
    weights: Tensor | None
    """[K, Dz, Dc], or None for plain dot products"""
    pairs: Tensor
    """[K, 2] int64 on the CPU: the context and the target of each sub-task"""
    scale: Tensor
    """0-d, multiplies the logits"""
    positive_offset: int
    """The positives of clip n are moments of clip n + positive_offset."""
    context_ids: Tensor | None
    """[N] int64, or None"""
    target_ids: Tensor | None
    """[M] int64, or None exactly where context_ids is None"""
    context_moments: int
    """Tc"""
    target_moments: int
    """Tz"""
    candidates: Tensor
    """[K] int64 on the CPU: 1 for the moments of the own clip, 2 for the same moment of all clips, 3 for both"""
    shifts: Tensor
    """[K] int64 on the CPU: the positive of moment t is moment t + shift"""


def without_aliases(problem: Problem | MomentProblem) -> Problem | MomentProblem:
    """The same as torch.compile takes it: no tensor twice, as it would be if it were both contexts and targets."""
    if not torch.compiler.is_compiling():
        return problem
    ids = None if problem.target_ids is None else problem.target_ids.view_as(problem.target_ids)
    return problem._replace(targets=problem.targets.view_as(problem.targets), target_ids=ids)


def make_problem(
    contexts: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    pairs: Pairs | None = None,
    *,
    scale: float | Tensor = 1.0,
    positive_offset: int = 0,
    context_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    symmetric: bool = False,
    normalize: str = "none",
    with_offset: bool = True,
) -> Problem:
    """The arguments of bilinear_info_nce, checked, and in autocast's dtype where autocast is on.

    Embeddings are first brought to mean 0 and variance 1 by normalize="layer_norm", to length 1 by "l2". Without
    with_offset no row has a positive at the offset, which must be 0, and M may be anything. Raises ValueError or
    TypeError naming the argument.
    """
    check_bool("symmetric", symmetric)
    contexts = check_embeddings("contexts", contexts, "C", "N, Dc")
    targets = check_embeddings("targets", targets, "U", "M, Dz")
    if normalize != "none":
        contexts, targets = normalized(contexts, normalize), normalized(targets, normalize)
    contexts, targets = (value.to(product_dtype(value)) for value in (contexts, targets))
    _check_alike("targets", targets, contexts)
    if weights is not None:
        weights = _check_weights(weights, contexts, targets)
    elif contexts.shape[2] != targets.shape[2]:
        raise ValueError(
            f"weights may be None only where contexts and targets are equally wide; got widths {contexts.shape[2]} "
            f"and {targets.shape[2]}"
        )
    pairs = _check_pairs(pairs, contexts, targets, weights)
    if with_offset:
        _check_offset(positive_offset, contexts.shape[1], targets.shape[1], symmetric)
    elif symmetric or type(positive_offset) is not int or positive_offset != 0:
        argument, value = ("symmetric", symmetric) if symmetric else ("positive_offset", positive_offset)
        raise ValueError(f"{argument} must be left out where positives are given by index, got {value!r}")
    context_ids, target_ids = check_both_ids(context_ids, target_ids, contexts, targets)
    return Problem(
        contexts,
        targets,
        weights,
        pairs,
        _check_scale(scale, contexts),
        positive_offset if with_offset else NO_POSITIVE,
        context_ids,
        target_ids,
        symmetric,
    )


def normalized(embeddings: Tensor, normalize: str) -> Tensor:
    """Embeddings as they are scored, by one of NORMALIZATIONS, in their own dtype; rounded once."""
    if normalize == "layer_norm":
        return F.layer_norm(embeddings, embeddings.shape[-1:])
    if normalize == "l2":
        return F.normalize(embeddings.to(loss_dtype(embeddings)), dim=-1).to(embeddings.dtype)
    return embeddings


def check_embeddings(name: str, value: Tensor, sets: str, shape: str) -> Tensor:
    """The embeddings as [`sets`, `shape`], two texts such as "C" and "N, Dc"; a single set may come as [`shape`]."""
    check_tensor(name, value)
    letters, ndim = f"[{sets}, {shape}] or [{shape}]", 2 + shape.count(",")
    if value.ndim not in (ndim - 1, ndim):
        raise ValueError(f"{name} must have shape {letters}, got {list(value.shape)}")
    if 0 in value.shape:
        raise ValueError(f"{name} must not be empty: shape {letters}, got {list(value.shape)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {_names(FLOAT_DTYPES)}; got {_names([value.dtype])}")
    return value if value.ndim == ndim else value.unsqueeze(0)


def _check_alike(name: str, value: Tensor, contexts: Tensor) -> None:
    if value.dtype != contexts.dtype:
        raise TypeError(f"{name} must have dtype {_names([contexts.dtype])} like contexts, got {_names([value.dtype])}")
    if value.device != contexts.device:
        raise ValueError(f"{name} must be on {contexts.device} like contexts, got {value.device}")


def _check_weights(weights: Tensor, contexts: Tensor, targets: Tensor) -> Tensor:
    """The weights as [K, Dz, Dc]."""
    check_tensor("weights", weights)
    weights = weights.to(product_dtype(weights))
    _check_alike("weights", weights, contexts)
    allowed = f"[K, {targets.shape[2]}, {contexts.shape[2]}] (K, width of targets, width of contexts)"
    if weights.ndim == 2:
        weights = weights.unsqueeze(0)
    if weights.ndim != 3 or weights.shape[0] == 0 or weights.shape[1:] != (targets.shape[2], contexts.shape[2]):
        raise ValueError(f"weights must have shape {allowed}, got {list(weights.shape)}")
    return weights


def _check_pairs(pairs: Pairs | None, contexts: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """The pairs as [K, 2] int64 on the CPU, where backends read them without waiting for a device."""
    sets = contexts.shape[0], targets.shape[0]
    if pairs is None:
        tasks = sets[0] if weights is None else weights.shape[0]
        if sets != (tasks, tasks):
            raise ValueError(
                f"pairs may be None only where sub-task k uses context k and target k; got {sets[0]} contexts, "
                f"{sets[1]} targets" + ("" if weights is None else f" and {tasks} weights")
            )
        return constant(
            "own pairs", tasks, lambda: torch.arange(tasks, device="cpu").unsqueeze(1).repeat(1, 2), contexts
        )
    if not isinstance(pairs, Tensor) and not hasattr(pairs, "__array__"):
        pairs = constant_pairs(pairs, contexts)
    else:
        pairs = as_pairs(pairs)
    if weights is not None and weights.shape[0] != pairs.shape[0]:
        raise ValueError(
            f"weights must hold one matrix a sub-task: {pairs.shape[0]} pairs need {pairs.shape[0]} "
            f"matrices, got {weights.shape[0]}"
        )
    if not torch.compiler.is_compiling():  # a compiled graph must not read values; the backends check again
        _check_pair_range(pairs, *sets)
    return pairs


def constant_pairs(pairs: Sequence[Sequence[int]], contexts: Tensor) -> Tensor:
    """as_pairs of pairs that are no tensor, kept for further calls."""
    rows = _read_pairs(pairs)
    return constant("pairs", rows, lambda: as_pairs(_to_tensor(rows)), contexts)


def as_pairs(pairs: Pairs) -> Tensor:
    """The pairs as [K, 2] int64 on the CPU; raises TypeError or ValueError unless they are K >= 1 pairs of integers."""
    if not isinstance(pairs, Tensor):
        pairs = _pairs_of_array(pairs) if hasattr(pairs, "__array__") else _to_tensor(_read_pairs(pairs))
    check_tensor("pairs", pairs)
    if pairs.is_meta:
        raise ValueError("pairs must have values: they cannot be on the device meta")
    if pairs.dtype not in INTEGER_DTYPES:
        raise TypeError(f"pairs must hold integers, got dtype {_names([pairs.dtype])}")
    if pairs.ndim != 2 or pairs.shape[0] == 0 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must have shape [K, 2] (context index, target index), got {list(pairs.shape)}")
    return pairs.to("cpu", torch.int64)


def _pairs_of_array(pairs: Any) -> Tensor:
    import numpy as np  # whoever passes an array has numpy; the op itself does without

    try:
        return torch.as_tensor(np.ascontiguousarray(pairs))
    except (TypeError, ValueError) as error:
        raise TypeError(f"pairs must be an array of integers: {error}") from error


def _read_pairs(pairs: Any) -> tuple[tuple[int, int], ...]:
    """Pairs of integers in sequences; TypeError or ValueError for anything else."""
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise TypeError(f"pairs must be [K, 2] integers (context index, target index), got {type(pairs).__name__}")
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence):
            raise TypeError(f"pairs must hold pairs (context index, target index), got {pair!r}")
        if len(pair) != 2:
            raise ValueError(f"pairs must hold two indices each (context index, target index), got {pair!r}")
        for index in pair:
            if type(index) is not int and (isinstance(index, bool) or not isinstance(index, numbers.Integral)):
                raise TypeError(f"pairs must hold integers, got {index!r}")
            if not -(1 << 63) <= int(index) < 1 << 63:
                raise ValueError(f"pairs must hold indices of at most 64 bits, got {index}")
    return tuple([(pair[0], pair[1]) for pair in pairs])


def _to_tensor(pairs: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.int64, device="cpu").reshape(-1, 2)


def _check_pair_range(pairs: Tensor, contexts: int, targets: int) -> None:
    """Raises ValueError unless the indices lie in 0..contexts-1 and 0..targets-1."""
    for pair in pairs.tolist():
        for name, index, count in (("context", pair[0], contexts), ("target", pair[1], targets)):
            if not 0 <= index < count:
                raise ValueError(
                    f"pairs must hold {name} indices from 0 to {count - 1}, got {index} with {count} {name}s"
                )


def _check_offset(positive_offset: int, rows: int, columns: int, symmetric: bool) -> None:
    if isinstance(positive_offset, bool) or not isinstance(positive_offset, (int, torch.SymInt)):
        raise TypeError(f"positive_offset must be an int, got {type(positive_offset).__name__}")
    if columns < rows:
        raise ValueError(f"targets must have at least as many rows as contexts: got M = {columns} < N = {rows}")
    if not 0 <= positive_offset <= columns - rows:
        raise ValueError(
            f"positive_offset must be from 0 to M - N = {columns - rows} (M = {columns}, N = {rows}), "
            f"got {positive_offset}"
        )
    if symmetric and columns != rows:
        raise ValueError(f"symmetric needs as many targets as contexts: got M = {columns} and N = {rows}")


def check_both_ids(
    context_ids: Tensor | None, target_ids: Tensor | None, contexts: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Both ids as int64, one for each context [sets, N, ...] and each target [sets, M, ...], or neither."""
    if context_ids is not None and target_ids is not None:
        return check_ids("context_ids", context_ids, contexts), check_ids("target_ids", target_ids, targets)
    if context_ids is None and target_ids is None:
        return None, None
    missing = "context_ids" if context_ids is None else "target_ids"
    raise ValueError(f"context_ids and target_ids must be given together; {missing} is None")


def check_ids(name: str, ids: Tensor, embeddings: Tensor) -> Tensor:
    """The ids as int64; one for each of the N rows of embeddings [sets, N, width]."""
    check_tensor(name, ids)
    if ids.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must have one of the dtypes {_names(INTEGER_DTYPES)}; got {_names([ids.dtype])}")
    if ids.ndim != 1 or ids.shape[0] != embeddings.shape[1]:
        raise ValueError(f"{name} must have shape [{embeddings.shape[1]}], one id a row; got {list(ids.shape)}")
    if ids.device != embeddings.device:
        raise ValueError(f"{name} must be on {embeddings.device} like the embeddings, got {ids.device}")
    return ids.to(torch.int64)


def check_positives(positives: Tensor, contexts: Tensor, columns: int) -> Tensor:
    """The positives as [N, P] int64: numbers of targets, or -1 for none.

    Raises ValueError unless they are from -1 to columns - 1, at least one of each row from 0 on. Where values cannot be
    read at once, on a GPU or in a compiled graph, the device does it: RuntimeError, or an assertion on the GPU.
    """
    check_tensor("positives", positives)
    if positives.dtype not in INTEGER_DTYPES:
        raise TypeError(
            f"positives must have one of the dtypes {_names(INTEGER_DTYPES)}; got {_names([positives.dtype])}"
        )
    rows = contexts.shape[-2]
    if positives.ndim not in (1, 2) or positives.shape[0] != rows or 0 in positives.shape:
        raise ValueError(f"positives must have shape [{rows}] or [{rows}, P > 0], got {list(positives.shape)}")
    if positives.device != contexts.device:
        raise ValueError(f"positives must be on {contexts.device} like the embeddings, got {positives.device}")
    positives = positives.to(torch.int64).reshape(rows, -1)
    inside, found = (positives >= -1) & (positives < columns), positives.amax(1) >= 0
    if not (positives.is_cpu and is_plain(positives)):  # no number in the text: a compiled graph would be for it alone
        text = "positives must hold numbers of targets, or -1 for none, and at least one target for each row"
        torch._assert_async(inside.all() & found.all(), text)
    elif not inside.all():
        number = int(positives[~inside][0])
        raise ValueError(f"positives must hold numbers of targets, 0 to {columns - 1}, or -1 for none; got {number}")
    elif not found.all():
        row = int(found.int().argmin())
        raise ValueError(f"positives must hold at least one target for each row, got none for row {row}")
    return positives


def _check_scale(scale: float | Tensor, contexts: Tensor) -> Tensor:
    """The scale as a 0-d tensor in the precision of the losses."""
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale must be a number or a 0-d torch.Tensor, got {type(scale).__name__}")
        return scale_tensor(scale, contexts)
    check_tensor("scale", scale)
    if scale.ndim != 0:
        raise ValueError(f"scale must be a number or a 0-d tensor, got shape {list(scale.shape)}")
    if scale.dtype not in FLOAT_DTYPES:
        raise TypeError(f"scale must have one of the dtypes {_names(FLOAT_DTYPES)}; got {_names([scale.dtype])}")
    if scale.device != contexts.device:
        raise ValueError(f"scale must be on {contexts.device} like contexts, got {scale.device}")
    return scale.to(loss_dtype(contexts))


def scale_tensor(scale: float, contexts: Tensor) -> Tensor:
    """The number as a 0-d tensor in the precision of the losses, kept for further calls; raises unless it is finite."""

    def make() -> Tensor:
        dtype = loss_dtype(contexts)
        # one compiled graph serves all floats, unless they are checked or go through torch.full
        if not torch.compiler.is_compiling() and not abs(scale) <= torch.finfo(dtype).max:
            raise ValueError(f"scale must be finite in {_names([dtype])}, got {scale}")
        factor = float(scale) if isinstance(scale, int) else scale  # torch takes no int of more than 64 bits
        return factor * torch.ones((), dtype=dtype, device=contexts.device)

    return constant("scale", (scale, contexts.dtype, contexts.device), make, contexts)


def loss_dtype(embeddings: Tensor) -> torch.dtype:
    """The precision of losses and statistics: float32, and float64 where the embeddings are float64."""
    return torch.promote_types(embeddings.dtype, torch.float32)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(dtype_name, dtypes))
