"""The 42 sub-tasks of audio-visual permutative predictive coding, and the loss that learns them together.

A clip gives four elements: its past and its future, each seen (V) and heard (A). Every set of one or two elements
predicts every disjoint set of one or two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from avppc.checks import FLOAT_DTYPES, check_bool, check_choice, check_integer, check_tensor, dtype_name
from avppc.losses.bilinear_info_nce import MAX_WIDTH, BilinearInfoNCE, check_like_module, check_weight_list
from avppc.ops.info_nce.op import InfoNCEStats
from avppc.ops.info_nce.problem import check_ids, product_dtype
from avppc.ops.info_nce.reference import info_nce_logits_reference

ELEMENTS = ("Vp", "Vf", "Ap", "Af")
ARGUMENTS = ("v_past", "v_future", "a_past", "a_future")  # where each element is given
FUSIONS = ("mlp", "sum", "concat-linear")
SIZE_GROUPS = ("1to1", "1to2", "2to1", "2to2")  # how many elements predict how many
OTHER_TIME = {"Vp": "Vf", "Vf": "Vp", "Ap": "Af", "Af": "Ap"}

ElementNames = tuple[str, ...]


class SubTask(NamedTuple):
    """One sub-task: a set of elements predicts a disjoint set."""

    name: str
    """For example "Vp,Ap->Vf"."""
    inputs: ElementNames
    """The elements of the context."""
    targets: ElementNames
    """The elements that are predicted."""
    group: str
    """"1to1", "1to2", "2to1" or "2to2": how many elements predict how many."""

    @property
    def between_modalities(self) -> bool:
        """Whether what is seen alone predicts what is heard alone, or the other way round."""
        seen, heard = ({element[0] for element in side} for side in (self.inputs, self.targets))
        return len(seen) == len(heard) == 1 and seen != heard


def _all_subtasks() -> tuple[SubTask, ...]:
    singles, doubles = ([*itertools.combinations(ELEMENTS, size)] for size in (1, 2))
    subtasks = []
    for inputs_sets, targets_sets in itertools.product((singles, doubles), repeat=2):
        # combinations() keeps the order of ELEMENTS, so the product is lexicographic by (inputs, targets)
        for inputs, targets in itertools.product(inputs_sets, targets_sets):
            if not set(inputs) & set(targets):
                name = f"{','.join(inputs)}->{','.join(targets)}"
                subtasks.append(SubTask(name, inputs, targets, f"{len(inputs)}to{len(targets)}"))
    return tuple(subtasks)


SUBTASKS = _all_subtasks()
"""The 42 sub-tasks: 12 "1to1", 12 "1to2", 12 "2to1", 6 "2to2", in the order of ELEMENTS inside each group."""

_BY_NAME = {subtask.name: subtask for subtask in SUBTASKS}


class PairFusion(nn.Module):
    """The embeddings of P sets of two elements, each set with parameters of its own.

    Args:
        pairs: P sets of two elements.
        dim: the width D of elements and of embeddings.
        kind: "mlp": two layers with a ReLU over the two elements side by side; "concat-linear": one linear layer;
            "sum": their plain sum, without parameters.
    """

    def __init__(self, pairs: Sequence[ElementNames], dim: int, kind: str) -> None:
        super().__init__()
        check_choice("fusion", kind, FUSIONS)
        self.pairs = tuple(pairs)
        self.kind = kind
        if kind == "sum" or not self.pairs:
            return
        self.weight1 = nn.Parameter(torch.empty(len(pairs), 2 * dim, dim))
        self.bias1 = nn.Parameter(torch.empty(len(pairs), 1, dim))
        if kind == "mlp":
            self.weight2 = nn.Parameter(torch.empty(len(pairs), dim, dim))
            self.bias2 = nn.Parameter(torch.empty(len(pairs), 1, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / fan in, zero biases: unit variance in, about unit variance out."""
        for name, parameter in self.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))

    def forward(self, elements: Mapping[str, Tensor]) -> Tensor:  # each [N, D] -> [P, N, D]
        first, second = (torch.stack([elements[pair[side]] for pair in self.pairs]) for side in (0, 1))
        if self.kind == "sum":
            return first + second
        check_like_module("the elements' embeddings", first, self.weight1)
        hidden = torch.baddbmm(self.bias1, torch.cat([first, second], 2), self.weight1)
        return hidden if self.kind == "concat-linear" else torch.baddbmm(self.bias2, hidden.relu(), self.weight2)

    def extra_repr(self) -> str:
        return f"{' '.join(','.join(pair) for pair in self.pairs)}, kind={self.kind!r}"


class PermutativeInfoNCE(nn.Module):
    """The loss of audio-visual permutative predictive coding: the mean of its sub-tasks' bilinear InfoNCE losses.

    Each set of elements has one embedding as a context and one as a target (10 and 10 for all 42 sub-tasks, each
    computed once): an element stands for itself, a pair goes through a learned fusion. Each sub-task has its own W.

    Args:
        dim: the width D of the elements' embeddings.
        subtasks: which of SUBTASKS to learn, as SubTasks or by name.
        task_weights: weights of the sub-tasks in the mean, one each, at least 0, or a mapping from names (those not
            named weigh 1): loss = sum(w_k loss_k) / sum(w_k). None: equal weights.
        fusion: how two elements become one embedding: "mlp", two layers over both side by side; "concat-linear", one
            layer; "sum". Each pair of elements has layers of its own, one set as context and one as target.
        swapped_negatives: whether each target is also told from the targets with past and future swapped, of all clips,
            its own included: 2 N candidates, of which one shares speaker, light and pose.
        scale, learn_scale, normalize, reduction, backend, gather, return_stats: as in BilinearInfoNCE. The defaults are
            the method's: no temperature, no normalisation.
        symmetric: as in bilinear_info_nce; not beside swapped_negatives.

    A state_dict holds the W in the order of `subtasks`: load it into a module with the same sub-tasks in that order.

    Reference: Tellamekala, Valstar, Pound, Giesbrecht, "Audio-Visual Predictive Coding for Self-Supervised Visual
    Representation Learning", ICPR 2020.
    """

    def __init__(
        self,
        dim: int,
        *,
        subtasks: Sequence[SubTask | str] = SUBTASKS,
        task_weights: Sequence[float] | Mapping[str, float] | None = None,
        fusion: str = "mlp",
        swapped_negatives: bool = False,
        scale: float = 1.0,
        learn_scale: bool = False,
        normalize: str = "none",
        symmetric: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        gather: str = "none",
        return_stats: bool = False,
    ) -> None:
        super().__init__()
        check_integer("dim", dim, 1, MAX_WIDTH)
        check_bool("swapped_negatives", swapped_negatives)
        if swapped_negatives and symmetric:
            raise ValueError(
                "swapped_negatives and symmetric must not both be True: with 2 N candidates for N contexts, a target's "
                "own contexts are no second set of losses"
            )
        self.swapped_negatives = swapped_negatives
        self.dim = dim
        self.subtasks = _check_subtasks(subtasks)
        contexts = _used([subtask.inputs for subtask in self.subtasks])
        targets = _used([subtask.targets for subtask in self.subtasks])
        self.context_singles = [elements[0] for elements in contexts if len(elements) == 1]
        self.target_singles = [elements[0] for elements in targets if len(elements) == 1]
        self.context_fusion = PairFusion([pair for pair in contexts if len(pair) == 2], dim, fusion)
        self.target_fusion = PairFusion([pair for pair in targets if len(pair) == 2], dim, fusion)
        self.elements = [name for name in ELEMENTS if any(name in used for used in (*contexts, *targets))]
        swapped = {OTHER_TIME[name] for side in targets for name in side}
        self.swapped_elements = [name for name in ELEMENTS if name in self.elements or name in swapped]
        self.score = BilinearInfoNCE(
            dim,
            dim,
            pairs=[(contexts.index(subtask.inputs), targets.index(subtask.targets)) for subtask in self.subtasks],
            scale=scale,
            learn_scale=learn_scale,
            normalize=normalize,
            task_weights=_check_task_weights(task_weights, self.subtasks),
            symmetric=symmetric,
            reduction=reduction,
            backend=backend,
            gather=gather,
            return_stats=return_stats,
        )

    def forward(
        self,
        v_past: Tensor | None,  # [N, D]
        v_future: Tensor | None,
        a_past: Tensor | None,
        a_future: Tensor | None,
        clip_ids: Tensor | None = None,  # [N]
        *,
        return_stats: bool | None = None,
    ) -> Tensor | tuple[Tensor, InfoNCEStats]:
        """The loss, or (loss, InfoNCEStats) with one entry for each of self.subtasks.

        Args:
            v_past: [N, D] embeddings of N clips' pasts as seen; this and the others may be None where no sub-task uses
                them.
            v_future: [N, D], their futures as seen.
            a_past: [N, D], their pasts as heard.
            a_future: [N, D], their futures as heard.
            clip_ids: [N] integers; clips with equal ids are not negatives of each other. With swapped_negatives -2**63
                counts as -2**63 + 1.
            return_stats: overrides the setting of the same name.
        """
        given = (v_past, v_future, a_past, a_future)
        first = next((value for value in given if isinstance(value, Tensor)), None)
        device = self.score.weight.device if first is None else first.device
        with self.score.refusal_told(device):
            if clip_ids is not None:
                clip_ids = clip_ids if first is None else check_ids("clip_ids", clip_ids, first.unsqueeze(0))
            contexts, targets = self._sides(given, self.swapped_negatives)
        target_ids = clip_ids
        if self.swapped_negatives and clip_ids is not None:
            # An id that no context has, so that the swapped targets are negatives of their own clip, too. All 64 bits
            # may be in use, so the lowest id gives way to its neighbour.
            nobody = torch.iinfo(clip_ids.dtype).min
            clip_ids = clip_ids.clamp_min(nobody + 1)
            target_ids = torch.cat([clip_ids, torch.full_like(clip_ids, nobody)])
        loss: Tensor | tuple[Tensor, InfoNCEStats]
        loss = self.score(contexts, targets, clip_ids, target_ids, return_stats=return_stats)
        return loss

    def logits(
        self,
        v_past: Tensor | None,  # [N, D]
        v_future: Tensor | None,
        a_past: Tensor | None,
        a_future: Tensor | None,
        *,
        swapped: bool = False,
    ) -> Tensor:
        """[K, N, N] scores of each context with each clip's target, in plain torch: for measurements, not for training.

        Args:
            swapped: gives [K, N, 2 N] instead: after the true targets, those with past and future swapped.
        """
        contexts, targets = self._sides((v_past, v_future, a_past, a_future), swapped)
        if self.score.normalize == "layer_norm":
            contexts, targets = (functional.layer_norm(side, side.shape[-1:]) for side in (contexts, targets))
        pairs = torch.as_tensor(self.score.pairs)
        scale = torch.as_tensor(self.score.scale)
        return info_nce_logits_reference(contexts, targets, self.score.weight, pairs, scale, 0, None, None)

    def _sides(self, given: Sequence[Tensor | None], swapped: bool) -> tuple[Tensor, Tensor]:
        """Contexts [C, N, D] and targets [U, N, D], or [U, 2 N, D] with the swapped ones after the true ones."""
        elements = self._check_elements(dict(zip(ELEMENTS, given, strict=True)), swapped)
        contexts = self._embed(elements, self.context_singles, self.context_fusion)
        targets = self._embed(elements, self.target_singles, self.target_fusion)
        if swapped:
            other = {name: elements[other] for name, other in OTHER_TIME.items() if other in elements}
            targets = torch.cat([targets, self._embed(other, self.target_singles, self.target_fusion)], 1)
        return contexts, targets

    def _embed(self, elements: Mapping[str, Tensor], singles: Sequence[str], fusion: PairFusion) -> Tensor:
        """[sets, N, D]: the single elements, then the pairs."""
        parts = []
        if singles:
            parts.append(torch.stack([elements[name] for name in singles]))
        if fusion.pairs:
            parts.append(fusion(elements))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _check_elements(self, given: Mapping[str, Tensor | None], swapped: bool) -> dict[str, Tensor]:
        """The elements that the sub-tasks use, checked."""
        needed = self.swapped_elements if swapped else self.elements
        used: dict[str, Tensor] = {}
        rows = None
        for element, argument in zip(ELEMENTS, ARGUMENTS, strict=True):
            if element not in needed:
                continue
            value = given[element]
            if value is None:
                raise TypeError(f"{argument} must be a torch.Tensor [N, {self.dim}] for these sub-tasks, got NoneType")
            check_tensor(argument, value)
            rows = value.shape[0] if rows is None and value.ndim == 2 else rows
            if value.ndim != 2 or value.shape[1] != self.dim or value.shape[0] != rows or rows == 0:
                allowed = f"[{rows or 'N > 0'}, {self.dim}]"
                raise ValueError(f"{argument} must have shape {allowed}, got {list(value.shape)}")
            _check_kind(argument, value, next(iter(used.items()), None))
            used[element] = value
        return used


def _check_kind(argument: str, value: Tensor, first: tuple[str, Tensor] | None) -> None:
    """Raises unless value is of a floating point dtype and, unless autocast makes them alike, like the first element.

    What it has in common with the weights, the modules that own them ask: elsewhere they may be sharded.
    """
    if value.dtype not in FLOAT_DTYPES:
        allowed, got = ", ".join(map(dtype_name, FLOAT_DTYPES)), dtype_name(value.dtype)
        raise TypeError(f"{argument} must have one of the dtypes {allowed}; got {got}")
    if first is None:
        return
    element, other = first
    like = ARGUMENTS[ELEMENTS.index(element)]
    if value.device != other.device:
        raise ValueError(f"{argument} must be on {other.device} like {like}, got {value.device}")
    if value.dtype != other.dtype and product_dtype(value) != product_dtype(other):
        wanted, got = dtype_name(other.dtype), dtype_name(value.dtype)
        raise TypeError(f"{argument} must have dtype {wanted} like {like} where there is no autocast, got {got}")


def _used(sides: Sequence[ElementNames]) -> list[ElementNames]:
    """The distinct sets of elements: singles before pairs, in the order of ELEMENTS."""
    return sorted(set(sides), key=lambda side: (len(side), [ELEMENTS.index(element) for element in side]))


def _check_subtasks(subtasks: Sequence[SubTask | str]) -> tuple[SubTask, ...]:
    if isinstance(subtasks, (str, SubTask, Tensor)) or not isinstance(subtasks, Collection):
        raise TypeError(f"subtasks must be a sequence of SubTask or names, got {subtasks!r}")
    chosen = []
    for subtask in subtasks:
        if not isinstance(subtask, (str, SubTask)):
            raise TypeError(f"subtasks must hold SubTask or names, got {subtask!r}")
        name = subtask if isinstance(subtask, str) else str(subtask.name)
        if name not in _BY_NAME or subtask not in (name, _BY_NAME[name]):
            raise ValueError(f"subtasks must be taken from SUBTASKS, such as 'Vp,Ap->Vf'; got {subtask!r}")
        chosen.append(_BY_NAME[name])
    if not chosen:
        raise ValueError("subtasks must hold at least one sub-task, got none")
    if len(set(chosen)) < len(chosen):
        twice = next(subtask.name for subtask in chosen if chosen.count(subtask) > 1)
        raise ValueError(f"subtasks must not repeat one, got {twice!r} more than once")
    return tuple(chosen)


def _check_task_weights(
    weights: Sequence[float] | Mapping[str, float] | None, subtasks: Sequence[SubTask]
) -> tuple[float, ...] | None:
    """One weight a sub-task; BilinearInfoNCE checks the values."""
    if weights is None:
        return None
    check_weight_list(weights)
    names = [subtask.name for subtask in subtasks]
    if isinstance(weights, Mapping):
        unknown = [name for name in weights if name not in names]
        if unknown:
            raise ValueError(f"task_weights must name sub-tasks that are learned, such as {names[0]!r}; got {unknown}")
        return tuple(weights.get(name, 1.0) for name in names)
    if len(weights) != len(names):
        raise ValueError(f"task_weights must hold {len(names)} weights, one a sub-task; got {len(weights)}")
    return tuple(weights)
