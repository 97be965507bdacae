"""The loss of audio-visual permutative predictive coding, which learns the 42 sub-tasks together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avppc.checks import (
    FLOAT_DTYPES,
    check_bool,
    check_choice,
    check_integer,
    check_like_module,
    check_offsets,
    check_tensor,
    dtype_name,
    product_dtype,
)
from avppc.losses.bilinear_info_nce import MAX_WIDTH, MomentInfoNCE
from avppc.losses.config import check_weight_list
from avppc.losses.subtasks import ELEMENTS, OTHER_TIME, SUBTASKS, ElementNames, SubTask, check_subtasks
from avppc.ops.info_nce.moments import CANDIDATES, Candidates, Moments
from avppc.ops.info_nce.op import InfoNCEStats
from avppc.ops.info_nce.problem import check_ids, normalized
from avppc.ops.info_nce.reference import info_nce_logits_reference

ARGUMENTS = ("v_past", "v_future", "a_past", "a_future")  # where each element is given
FUSIONS = ("mlp", "sum", "concat-linear")


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

    An element may have one embedding, [N, D], or one for each of T moments, [N, T, D]. With moments, the sub-tasks from
    picture to sound of the same time and back (Vp->Ap, Vf->Af, Ap->Vp, Af->Vf) are scored moment by moment, as in
    moment_info_nce: which moment of the sound belongs to this picture? All others score the span, the mean of its
    moments. In Vp,Vf->Ap,Af and Ap,Af->Vp,Vf nothing is predicted through time: where the moments of whole clips are
    given, these two are scored by them; with moment_offsets so are Vp->Af, Vf->Ap, Ap->Vf and Af->Vp: a moment then
    predicts the other modality so many moments later, or earlier.

    Args:
        dim: the width D of the elements' embeddings.
        subtasks: which of SUBTASKS to learn, as SubTasks or by name.
        task_weights: weights of the sub-tasks in the mean, one each, at least 0, or a mapping from names (those not
            named weigh 1): loss = sum(w_k loss_k) / sum(w_k). None: equal weights.
        fusion: how two elements become one embedding: "mlp", two layers over both side by side; "concat-linear", one
            layer; "sum". Each pair of elements has layers of its own, one set as context and one as target.
        swapped_negatives: whether each target is also told from the targets with past and future swapped, of all clips,
            its own included: 2 N candidates, of which one shares speaker, light and pose. By moments: from the clip's
            own moments of past and future, 2 T candidates.
        candidates: what a moment is told from: "clip", the moments of its own clip; "moment", the same moment of other
            clips; "both".
        moment_offsets: by how many moments later or earlier; each has W of its own, and the loss is the mean over them.
        scale, learn_scale, normalize, reduction, backend, gather, group, return_stats: as in BilinearInfoNCE. The
            defaults are the method's: no temperature, no normalisation.
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
        candidates: Candidates = "clip",
        moment_offsets: Sequence[int] = (),
        scale: float = 1.0,
        learn_scale: bool = False,
        normalize: str = "none",
        symmetric: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        gather: str = "none",
        group: dist.ProcessGroup | None = None,
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
        check_choice("candidates", candidates, CANDIDATES)
        check_offsets("moment_offsets", moment_offsets)
        self.moment_offsets = tuple(moment_offsets)
        self.swapped_negatives = swapped_negatives
        self.dim = dim
        self.subtasks = check_subtasks(subtasks)
        contexts = _used([subtask.inputs for subtask in self.subtasks])
        targets = _used([subtask.targets for subtask in self.subtasks])
        self.context_singles = [elements[0] for elements in contexts if len(elements) == 1]
        self.target_singles = [elements[0] for elements in targets if len(elements) == 1]
        self.context_fusion = PairFusion([pair for pair in contexts if len(pair) == 2], dim, fusion)
        self.target_fusion = PairFusion([pair for pair in targets if len(pair) == 2], dim, fusion)
        self.elements = [name for name in ELEMENTS if any(name in used for used in (*contexts, *targets))]
        swapped = {OTHER_TIME[name] for side in targets for name in side}
        self.swapped_elements = [name for name in ELEMENTS if name in self.elements or name in swapped]
        self.score = MomentInfoNCE(
            dim,
            [(contexts.index(subtask.inputs), targets.index(subtask.targets)) for subtask in self.subtasks],
            candidates,
            several=tuple(task for task, subtask in enumerate(self.subtasks) if subtask.crosses_both),
            ways=max(1, len(self.moment_offsets)),
            scale=scale,
            learn_scale=learn_scale,
            normalize=normalize,
            task_weights=_check_task_weights(task_weights, self.subtasks),
            symmetric=symmetric,
            reduction=reduction,
            backend=backend,
            gather=gather,
            group=group,
            return_stats=return_stats,
        )

    def forward(
        self,
        v_past: Tensor | None,  # [N, D] or [N, T, D]
        v_future: Tensor | None,
        a_past: Tensor | None,
        a_future: Tensor | None,
        clip_ids: Tensor | None = None,  # [N]
        *,
        v_clip: Tensor | None = None,  # [N, T, D]
        a_clip: Tensor | None = None,
        return_stats: bool | None = None,
    ) -> Tensor | tuple[Tensor, InfoNCEStats]:
        """The loss, or (loss, InfoNCEStats) with one entry for each of self.subtasks.

        Args:
            v_past: [N, D] embeddings of N clips' pasts as seen, or [N, T, D] of their moments; this and the others may
                be None where no sub-task uses them.
            v_future: of the same shape, their futures as seen.
            a_past: their pasts as heard.
            a_future: their futures as heard.
            clip_ids: [N] integers; clips with equal ids are not negatives of each other. With swapped_negatives -2**63
                counts as -2**63 + 1.
            v_clip: [N, T, D] embeddings of the moments of the whole clips as seen, given together with a_clip.
            a_clip: [N, T, D], the same moments as heard.
            return_stats: overrides the setting of the same name.
        """
        given = (v_past, v_future, a_past, a_future)
        first = next((value for value in given if isinstance(value, Tensor)), None)
        device = self.score.weight.device if first is None else first.device
        with self.score.refusal_told(device):
            if clip_ids is not None:
                clip_ids = clip_ids if first is None else check_ids("clip_ids", clip_ids, first.unsqueeze(0))
            elements = self._check_elements(dict(zip(ELEMENTS, given, strict=True)), self.swapped_negatives)
            contexts, targets = self._sides(elements, self.swapped_negatives)
            moments = self._moments(elements, v_clip, a_clip, self.swapped_negatives)
        context_ids = target_ids = clip_ids
        if self.swapped_negatives and clip_ids is not None:
            # An id that no context has, so that the swapped targets are negatives of their own clip, too. All 64 bits
            # may be in use, so the lowest id gives way to its neighbour.
            nobody = torch.iinfo(clip_ids.dtype).min
            context_ids = clip_ids.clamp_min(nobody + 1)
            target_ids = torch.cat([context_ids, torch.full_like(clip_ids, nobody)])
        return self.score(
            contexts, targets, context_ids, target_ids, moments=moments, clip_ids=clip_ids, return_stats=return_stats
        )

    def logits(
        self,
        v_past: Tensor | None,  # [N, D] or [N, T, D]
        v_future: Tensor | None,
        a_past: Tensor | None,
        a_future: Tensor | None,
        *,
        v_clip: Tensor | None = None,  # [N, T, D]
        a_clip: Tensor | None = None,
        swapped: bool = False,
    ) -> Tensor:
        """[K, N, N] scores of each context with each clip's target, in plain torch: for measurements, not for training.

        Where a sub-task scores moments, the mean over them of a moment's score with the same moment of the other clip.

        Args:
            swapped: gives [K, N, 2 N] instead: after the true targets, those with past and future swapped.
        """
        given = dict(zip(ELEMENTS, (v_past, v_future, a_past, a_future), strict=True))
        elements = self._check_elements(given, swapped)
        contexts, targets = self._normalized(self._sides(elements, swapped))
        pairs, scale = torch.as_tensor(self.score.pairs), torch.as_tensor(self.score.scale)
        logits = info_nce_logits_reference(contexts, targets, self.score.weight, pairs, scale, 0, None, None)
        for part in self._moments(elements, v_clip, a_clip, swapped):
            contexts, targets = self._normalized((part.contexts, part.targets))
            count, ways = contexts.shape[2], len(self.moment_offsets) if part.tasks == self.score.several else 1
            if targets.shape[2] == count and swapped:  # of whole clips: their halves change places
                targets = torch.cat([targets, targets.roll(count // 2, 2)], 2)
            for place, (task, weight) in enumerate(zip(part.tasks, self.score.weight_of(*part[::3]), strict=True)):
                queries = contexts[place] @ weight.T
                scores = [torch.einsum("ntd,mtd->nm", queries, side) for side in targets[place].split(count, 1)]
                others = logits[task] if part.further else 0.0
                logits[task] = others + scale / count / ways * torch.cat(scores, 1)
        return logits

    def _normalized(self, sides: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings as the scores take them."""
        return [normalized(side, self.score.normalize) for side in sides]

    def _moments(
        self, elements: Mapping[str, Tensor], v_clip: Tensor | None, a_clip: Tensor | None, swapped: bool
    ) -> list[Moments]:
        """What is scored by moments; targets [P, N, 2 T, D] where swapped ones follow the true ones."""
        found = []
        tasks = tuple(task for task, subtask in enumerate(self.subtasks) if subtask.same_time)
        if tasks and elements[self.subtasks[tasks[0]].inputs[0]].ndim == 3:
            contexts = torch.stack([elements[self.subtasks[task].inputs[0]] for task in tasks])
            names = [self.subtasks[task].targets[0] for task in tasks]
            targets = torch.stack([elements[name] for name in names])
            if swapped:
                targets = torch.cat([targets, torch.stack([elements[OTHER_TIME[name]] for name in names])], 2)
            found.append(Moments(tasks, contexts, targets))
        tasks = tuple(task for task, subtask in enumerate(self.subtasks) if subtask.whole_clip)
        if v_clip is not None or a_clip is not None:
            sides = self._check_clips(v_clip, a_clip, elements)
            if tasks:
                contexts = torch.stack([sides[self.subtasks[task].inputs[0][0]] for task in tasks])
                targets = torch.stack([sides[self.subtasks[task].targets[0][0]] for task in tasks])
                found.append(Moments(tasks, contexts, targets))
            found += self._across_time(sides)
        return found

    def _across_time(self, sides: Mapping[str, Tensor]) -> list[Moments]:
        """What is scored at moment_offsets: a moment of the past as context predicts later ones, else earlier ones."""
        found, tasks = [], self.score.several
        for way, offset in enumerate(self.moment_offsets if tasks else ()):
            count = sides["V"].shape[1] - offset
            if count < 1:
                raise ValueError(
                    f"v_clip must have more moments than moment_offsets reach, {offset}; got {count + offset}"
                )
            early = {side: value[:, :count] for side, value in sides.items()}
            late = {side: value[:, offset:] for side, value in sides.items()}
            contexts, targets = [], []
            for task in tasks:
                (context,), (target,) = self.subtasks[task].inputs, self.subtasks[task].targets
                contexts.append((early if context[1] == "p" else late)[context[0]])
                targets.append((late if context[1] == "p" else early)[target[0]])
            found.append(Moments(tasks, torch.stack(contexts), torch.stack(targets), way))
        return found

    def _check_clips(
        self, v_clip: Tensor | None, a_clip: Tensor | None, elements: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Moments of whole clips, checked: "V" and "A"."""
        if v_clip is None or a_clip is None:
            raise ValueError(f"v_clip and a_clip must be given together; {'v' if v_clip is None else 'a'}_clip is None")
        clips = len(next(iter(elements.values())))
        for argument, value in (("v_clip", v_clip), ("a_clip", a_clip)):
            check_tensor(argument, value)
            wanted = [clips, *v_clip.shape[1:2], self.dim]
            if value.ndim != 3 or list(value.shape) != wanted or 0 in wanted:
                allowed = f"[{clips}, T > 0, {self.dim}]" if argument == "v_clip" else f"{wanted}"
                raise ValueError(f"{argument} must have shape {allowed}, got {list(value.shape)}")
            _check_kind(argument, value, next(iter(elements.items()), None))
        return {"V": v_clip, "A": a_clip}

    def _sides(self, elements: Mapping[str, Tensor], swapped: bool) -> tuple[Tensor, Tensor]:
        """Contexts [C, N, D] and targets [U, N, D] of spans, or [U, 2 N, D] with the swapped ones after the true."""
        spans = {name: value if value.ndim == 2 else value.mean(1) for name, value in elements.items()}
        contexts = self._embed(spans, self.context_singles, self.context_fusion)
        targets = self._embed(spans, self.target_singles, self.target_fusion)
        if swapped:
            other = {name: spans[other] for name, other in OTHER_TIME.items() if other in spans}
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
        shape: list[int] | None = None
        for element, argument in zip(ELEMENTS, ARGUMENTS, strict=True):
            if element not in needed:
                continue
            value = given[element]
            if value is None:
                raise TypeError(f"{argument} must be a torch.Tensor [N, {self.dim}] for these sub-tasks, got NoneType")
            check_tensor(argument, value)
            shape = list(value.shape) if shape is None else shape
            if value.ndim not in (2, 3) or list(value.shape) != shape or value.shape[-1] != self.dim or 0 in shape:
                allowed = f"{shape}" if used else f"[N > 0, {self.dim}] or [N > 0, T > 0, {self.dim}]"
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
