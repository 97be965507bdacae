"""What else computes the loss on a GPU: packages whose losses take one sub-task, and the products alone by cuBLAS.

A peer is a function of (queries [N, D], targets [N, D], labels [N]) that returns the mean loss of the rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from info_nce_baselines import Step
from torch import Tensor

Peer = Callable[[Tensor, Tensor, Tensor], Tensor]


def peers() -> dict[str, Peer]:
    """Those that are installed (`pip install -e .[bench-cuda]`)."""
    found: dict[str, Peer] = {}
    if _is_installed("inf_cl"):
        from inf_cl import cal_flash_loss

        found["inf-cl"] = lambda q, z, labels: cal_flash_loss(q, z, labels, 1.0, min(q.shape[1], 256)).mean()
    if _is_installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda q, z, labels: linear_cross_entropy(q, z, labels)
        found["cut-cross-entropy exact"] = lambda q, z, labels: linear_cross_entropy(q, z, labels, filter_eps=None)
    if _is_installed("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger-kernel"] = lambda q, z, labels: liger(z, q, labels)
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda q, z, labels: F.linear_cross_entropy(q, z, labels)
    return found


def open_clip_loss() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """open_clip's ClipLoss, without the rest of the package and what that needs; None where it is not installed."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        return None
    module = _load(Path(spec.submodule_search_locations[0]) / "loss.py")
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = module.ClipLoss()
    return loss


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def looped(peer: Peer) -> Callable[[Step], Tensor]:
    """The peer over all sub-tasks, the queries by torch."""

    def loss(step: Step) -> Tensor:
        contexts, targets, weights = step.contexts.unbind(), step.targets.unbind(), step.weights.unbind()
        losses = [peer(contexts[i] @ weights[k].T, targets[j], step.labels) for k, (i, j) in enumerate(step.pairs)]
        return torch.stack(losses).mean()

    return loss


def products(step: Step, backward: bool) -> Callable[[], None]:
    """The products of one step by cuBLAS, those of one target's sub-tasks together: what no loss of ours can beat."""
    N, D = step.contexts.shape[1:]
    c, z, w = step.contexts[0].detach(), step.targets[0].detach(), step.weights[0].detach()
    groups = [sum(target == u for _, target in step.pairs) for u in range(len(step.targets))]
    most = max(groups)
    queries, logits = c.repeat(most, 1), c.new_zeros(most * N, N)
    torch.mm(queries, z.T, out=logits)
    logits.mul_(0.01)
    narrow, wide, square = c.new_empty(N, D), c.new_empty(most * N, D), c.new_empty(D, D)

    def run() -> None:
        for group in groups:
            q, s = queries[: group * N], logits[: group * N]
            for _ in range(group):
                torch.mm(c, w.T, out=narrow)  # queries
            torch.mm(q, z.T, out=s)
            if backward:
                torch.mm(s, z, out=wide[: group * N])  # of the queries
                torch.mm(s.T, q, out=narrow)  # of the target
                for _ in range(group):
                    torch.mm(c, w, out=narrow)  # of the contexts
                    torch.mm(c.T, c, out=square)  # of the weights

    return run
