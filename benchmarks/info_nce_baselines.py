"""What else computes the bilinear InfoNCE of K sub-tasks: the ways one writes it in torch, and the products alone.

Each takes a `Step` and returns the loss; `products` runs the matrix products of one step and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from avppc import SUBTASKS, bilinear_info_nce


@dataclass(frozen=True)
class Step:
    """The inputs of one step: leaves that require gradients."""

    contexts: Tensor  # [C, N, D]
    targets: Tensor  # [U, N, D]
    weights: Tensor  # [K, D, D]
    pairs: list[tuple[int, int]]  # K
    labels: Tensor  # [N]

    @classmethod
    def make(cls, K: int, N: int, D: int, dtype: torch.dtype = torch.float32) -> Step:
        """Random embeddings and weights whose logits have unit variance: the 42 sub-tasks, or one."""
        torch.manual_seed(0)
        sets = list(dict.fromkeys(side for subtask in SUBTASKS for side in (subtask.inputs, subtask.targets)))
        pairs = [(sets.index(subtask.inputs), sets.index(subtask.targets)) for subtask in SUBTASKS]
        if K == 1:
            sets, pairs = sets[:1], [(0, 0)]
        assert len(pairs) == K
        return cls(
            contexts=torch.randn(len(sets), N, D).to(dtype).requires_grad_(),
            targets=torch.randn(len(sets), N, D).to(dtype).requires_grad_(),
            weights=(torch.randn(K, D, D) / D).to(dtype).requires_grad_(),
            pairs=pairs,
            labels=torch.arange(N),
        )

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.contexts, self.targets, self.weights

    def products_flop(self, backward: bool) -> float:
        """Useful floating-point operations: 2 K N^2 D for the logits and 2 K N D^2 for the queries, 3 times that with
        the backward; nothing for exponentials, nor for what is computed twice."""
        K, N, D = len(self.pairs), self.contexts.shape[1], self.contexts.shape[2]
        return (3 if backward else 1) * 2.0 * K * N * D * (N + D)


def ours(step: Step) -> Tensor:
    return bilinear_info_nce(step.contexts, step.targets, step.weights, step.pairs, backend="cpp")


def eager_bmm(step: Step) -> Tensor:
    """All sub-tasks in one batched product and one cross-entropy."""
    contexts, targets = step.contexts.unbind(), step.targets.unbind()
    queries = torch.bmm(torch.stack([contexts[i] for i, _ in step.pairs]), step.weights.mT)
    logits = torch.bmm(queries, torch.stack([targets[j] for _, j in step.pairs]).mT)
    return F.cross_entropy(logits.flatten(0, 1).float(), step.labels.repeat(len(step.pairs)))


def eager_loop(step: Step) -> Tensor:
    """Sub-task by sub-task. The stacks are taken apart once: indexing them in the loop is far slower still."""
    contexts, targets, weights = step.contexts.unbind(), step.targets.unbind(), step.weights.unbind()
    losses = [
        F.cross_entropy((contexts[i] @ weights[k].T @ targets[j].T).float(), step.labels)
        for k, (i, j) in enumerate(step.pairs)
    ]
    return torch.stack(losses).mean()


def checkpointed_loop(step: Step) -> Tensor:
    """The loop with the memory of one sub-task: each one's logits are computed again in the backward."""
    contexts, targets, weights = step.contexts.unbind(), step.targets.unbind(), step.weights.unbind()

    def one(c: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((c @ w.T @ z.T).float(), step.labels)

    losses = [
        checkpoint(one, contexts[i], targets[j], weights[k], use_reentrant=False) for k, (i, j) in enumerate(step.pairs)
    ]
    return torch.stack(losses).mean()


def linear_cross_entropy_loop(step: Step) -> Tensor:
    """The loop over torch's own chunked F.linear_cross_entropy (torch 2.13), with the targets as its classes."""
    contexts, targets, weights = step.contexts.unbind(), step.targets.unbind(), step.weights.unbind()
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=False)
    losses = [
        F.linear_cross_entropy(contexts[i] @ weights[k].T, targets[j], step.labels, options=options)
        for k, (i, j) in enumerate(step.pairs)
    ]
    return torch.stack(losses).mean()


def baselines(compiled: bool = True) -> dict[str, Callable[[Step], Tensor]]:
    """Every way to compute the loss, by name, ours last; compiled ones take up to a minute to compile."""
    torch._dynamo.reset()
    found: dict[str, Callable[[Step], Tensor]] = {
        "eager bmm": eager_bmm,
        "eager loop": eager_loop,
        "checkpointed loop": checkpointed_loop,
    }
    if compiled:
        found["compiled bmm"] = torch.compile(eager_bmm, dynamic=False)
        found["compiled loop"] = torch.compile(eager_loop, dynamic=False)
    if hasattr(F, "linear_cross_entropy"):
        found["linear_cross_entropy loop"] = linear_cross_entropy_loop
    return {**found, "ours": ours}


def products(step: Step, backward: bool) -> Callable[[], None]:
    """The torch.mm calls of one step, into memory that is there already: what a loss that writes its products to memory
    cannot beat."""
    N, D = step.contexts.shape[1:]
    c, z, w = step.contexts[0].detach(), step.targets[0].detach(), step.weights[0].detach()
    logits, wide, square = c.new_empty(N, N), c.new_empty(N, D), c.new_empty(D, D)
    logits.copy_(torch.mm(c, z.T) * 0.01)

    def run() -> None:
        for _ in range(len(step.pairs)):
            torch.mm(c, w.T, out=wide)  # queries
            torch.mm(c, z.T, out=logits)
            if backward:
                torch.mm(logits, z, out=wide)  # of the queries
                torch.mm(logits.T, c, out=wide)  # of the targets
                torch.mm(c, w, out=wide)  # of the contexts
                torch.mm(c.T, c, out=square)  # of the weights

    return run


def clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The formula of CLIP's loss as open_clip's ClipLoss computes it on one device: both directions, averaged."""
    labels = torch.arange(len(image), device=image.device)
    logits_per_image = scale * image @ text.T
    logits_per_text = scale * text @ image.T
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def clip_loss_of_one_product(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The same at its best on one device: the other direction's logits are the transpose, as in OpenAI's CLIP."""
    labels = torch.arange(len(image), device=image.device)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def batched_moments(
    contexts: Tensor, targets: Tensor, weights: Tensor, pairs: list[tuple[int, int]], candidates: str
) -> Tensor:
    """moment_info_nce by batched products and one cross-entropy; contexts and targets [sets, N, T, D]."""
    N, T = contexts.shape[1:3]
    K, device = len(pairs), contexts.device
    q = torch.einsum("kntd,ked->knte", contexts[[i for i, _ in pairs]], weights)
    z = targets[[j for _, j in pairs]]
    own, clips = torch.arange(T, device=device).repeat(K * N), torch.arange(N, device=device)
    if candidates == "clip":
        return F.cross_entropy(torch.einsum("knte,knue->kntu", q, z).flatten(0, 2).float(), own)
    across = torch.einsum("knte,kmte->kntm", q, z)
    if candidates == "moment":
        return F.cross_entropy(across.flatten(0, 2).float(), clips.repeat_interleave(T).repeat(K))
    twice = torch.eye(N, dtype=torch.bool, device=device)[:, None, :]
    both = torch.cat([torch.einsum("knte,knue->kntu", q, z), across.masked_fill(twice, -torch.inf)], 3)
    return F.cross_entropy(both.flatten(0, 2).float(), own)


def moment_products(
    contexts: Tensor, targets: Tensor, weights: Tensor, pairs: list[tuple[int, int]], candidates: str
) -> Callable[[], None]:
    """The products of one step of it, batched over sub-tasks and clips or moments."""
    c, z = (value.detach()[[pair[side] for pair in pairs]] for side, value in enumerate((contexts, targets)))
    w, rows = weights.detach(), c.flatten(1, 2)
    parts = [(c, z)] if candidates != "moment" else []
    parts += [(c.transpose(1, 2).contiguous(), z.transpose(1, 2).contiguous())] if candidates != "clip" else []
    scores = [torch.matmul(a, b.mT) for a, b in parts]

    def run() -> None:
        torch.bmm(rows, w.mT)  # queries
        for (a, b), s in zip(parts, scores, strict=True):
            torch.matmul(a, b.mT)
            torch.matmul(s, b)  # of the queries
            torch.matmul(s.mT, a)  # of the targets
        torch.bmm(rows, w)  # of the contexts
        torch.bmm(rows.mT, rows)  # of the weights

    return run
