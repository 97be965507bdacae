"""Settings of the loss, and checks of those of its modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from avppc.checks import check_integer, check_number, check_offsets, check_types
from avppc.ops.info_nce.moments import Candidates

__all__ = ["ObjectiveConfig"]

MomentsName = Literal["none", "element", "clip"]
WeightingName = Literal["modality", "equal", "group", "uncertainty", "gradient-norm"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss: embeddings, their fusion and the weights of the 42 sub-tasks."""

    BEFORE: ClassVar[dict[str, Any]] = {"moments": "none", "moment_offsets": ()}
    """What a file means that lacks a field: it was written before there was one."""

    dim: int = 128
    """Width of the embeddings that are scored."""
    fusion: Literal["mlp", "sum", "concat-linear"] = "mlp"
    """How two elements become one embedding."""
    normalize: Literal["layer_norm", "none"] = "layer_norm"
    """What is done to the embeddings before they are scored; the method as published does nothing."""
    learn_scale: bool = True
    """Learns one factor for all logits."""
    between_weight: float = 1.0
    """Weight of the sub-tasks that predict sound from picture alone or picture from sound alone."""
    other_weight: float = 0.1
    """Weight of the others. Equal weights let "who speaks and how it is lit" solve most sub-tasks at this size."""
    weighting: WeightingName = "modality"
    """"modality": between_weight and other_weight, and moment_share; "equal": 1 each; "group": group_weights, shared
    out evenly inside each group; "uncertainty": learned, exp(-s) loss + s / 2; "gradient-norm": sub-tasks pull in
    proportion to their loss, raised to gradient_norm_power."""
    group_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Total weights of the groups 1to1, 1to2, 2to1 and 2to2 under weighting="group"."""
    gradient_norm_power: float = 1.0
    """The power to which losses are raised under "gradient-norm"; 0: all sub-tasks pull alike."""
    chunks: Literal[2, 4] = 2
    """Parts into which the task "visual-permutative" cuts a clip: past and future, or four chunks, of which every one
    or two predict every other one or two."""
    moments: MomentsName = "clip"
    """Which sub-tasks between picture and sound are scored moment by moment: "element", those of the same time (Vp->Ap,
    Vf->Af and back), with elements that are sequences of moments; "clip", those of all seen and all heard
    (Vp,Vf->Ap,Af and back), over the moments of the whole clip, and at moment_offsets Vp->Af, Vf->Ap and back;
    "none"."""
    moment_offsets: tuple[int, ...] = (2, 4)
    """With moments "clip": by how many moments later (Vp->Af, Ap->Vf) or earlier (Vf->Ap, Af->Vp) than its own a moment
    predicts the other modality, by a W for each; none: these four score spans."""
    candidates: Candidates = "both"
    """What a moment is told from: "clip", the other moments of its clip; "moment", the same moment of other clips;
    "both"."""
    moment_share: float = 0.85
    """Share of all weights that the sub-tasks by moments have together."""
    offset_share: float = 0.3
    """Share of these that those at moment_offsets have together."""
    negatives: Literal["clips", "same-clip"] = "clips"
    """What a target is told from: the targets of other clips, or also targets with past and future swapped."""
    leave_out: Literal["none", "clip", "word"] = "none"
    """Clips that are not used as negatives: other appearances of the same clip, or (an oracle: it needs labels) all
    clips of the same word."""

    def __post_init__(self) -> None:
        check_types(self)
        check_integer("dim", self.dim, 2)
        check_number("between_weight", self.between_weight, 0)
        check_number("other_weight", self.other_weight, 0)
        if not isinstance(self.group_weights, tuple) or len(self.group_weights) != 4:
            raise ValueError(f"group_weights must be four numbers, got {self.group_weights!r}")
        for weight in self.group_weights:
            check_number("group_weights", weight, 0)
        check_number("gradient_norm_power", self.gradient_norm_power, 0, 4)
        check_number("moment_share", self.moment_share, 0, 1)
        check_number("offset_share", self.offset_share, 0, 1)
        check_offsets("moment_offsets", self.moment_offsets)
        if self.between_weight == self.other_weight == 0:
            raise ValueError("between_weight and other_weight must not both be 0")


def check_weight_list(weights: object) -> None:
    """Raises TypeError unless it is a collection, such as a list, and no tensor; BilinearInfoNCE checks the numbers."""
    if not isinstance(weights, Collection) or isinstance(weights, Tensor):
        raise TypeError(f"task_weights must hold one number a sub-task, got {weights!r}")


def check_factor(name: str, value: float) -> None:
    check_number(name, value, 0.0)
    if value > torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be finite in float32, got {value}")


def check_task_weights(weights: Sequence[float], tasks: int) -> None:
    check_weight_list(weights)
    for weight in weights:
        check_factor("task_weights", weight)
    if not any(weights):
        raise ValueError("task_weights must hold a weight above 0, got none")
    if len(weights) != tasks:
        raise ValueError(f"task_weights must hold {tasks} weights, one a sub-task; got {len(weights)}")
