"""What one of two processes gets that calls for another loss than its neighbour, or for second derivatives."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, as avppc/train/distributed.py has it
from gloo_threads import check_gloo_has_ended
from torch import Tensor

from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.losses.permutative_info_nce import PermutativeInfoNCE
from avppc.models.batch_norm import SynchronisedBatchNorm
from avppc.ops.info_nce.agreement import rows_known_even

N, D = 5, 4
DISAGREEMENTS = {
    "16-bit kinds": "dtype is bfloat16 on rank 0 and float16 on rank 1",
    "autocast": "dtype is bfloat16 on rank 0 and float32 on rank 1",
    "same bytes": "C is 1 on rank 0 and 2 on rank 1; Dc is 4 on rank 0 and 2 on rank 1; U is 1 on rank 0 and 2 on",
    "width": "Dc is 4 on rank 0 and 6 on rank 1; Dz is 4 on rank 0 and 6 on rank 1",
    "rows": "N is 5 on rank 0 and 6 on rank 1; M is 5 on rank 0 and 6 on rank 1",
    "ids": "ids is None on rank 0 and given on rank 1",
    "symmetric": "symmetric is False on rank 0 and True on rank 1",
    "reduction": "reduction is 'mean' on rank 0 and 'task' on rank 1",
    "task_weights": "task_weights is (hash ",
    "pairs": "pairs is (hash ",
    "gather": "gather is 'all' on rank 0 and 'ring' on rank 1",
    "gradient": "targets_gradient is needed on rank 0 and not needed on rank 1",
}
"""Where the two processes differ, and what each says."""


def disagree(name: str, gather: str, rank: int) -> Tensor:
    """The loss of a call in which the processes differ as named."""
    options: dict[str, Any] = {"gather": gather, "tasks": 1}
    sets, rows, width = 1, N, D
    autocast: Any = contextlib.nullcontext()
    if name in ("16-bit kinds", "autocast"):
        kind = torch.float16 if name == "16-bit kinds" and rank == 1 else torch.bfloat16
        autocast = torch.autocast("cpu", kind, enabled=name == "16-bit kinds" or rank == 0)
    elif name == "same bytes" and rank == 1:
        sets, width, options["tasks"] = 2, D // 2, 2
    elif name == "width":
        width = D + 2 * rank
    elif name == "rows":
        rows = N + rank
    elif name in ("symmetric", "reduction"):
        options[name] = {"symmetric": rank == 1, "reduction": ("mean", "task")[rank]}[name]
    elif name in ("task_weights", "pairs"):
        sets, options["tasks"] = 2, 2
        options[name] = {"task_weights": (1.0, 1.0 + rank), "pairs": [(0, rank), (1, 1 - rank)]}[name]
    elif name == "gather":
        options["gather"] = ("all", "ring")[rank]
    contexts, targets = torch.randn(2, sets, rows, width)
    frozen = name == "gradient" and rank == 1
    targets.requires_grad_(not frozen)
    model = BilinearInfoNCE(width, width, **options).requires_grad_(not frozen)
    ids = torch.arange(rows) if name == "ids" and rank == 1 else None
    with autocast:
        loss: Tensor = model(contexts, targets, ids, ids)
    return loss


def refuse_alone(gather: str, rank: int) -> None:
    """Process 1 has an argument that is refused before any message."""
    targets = torch.ones(N, D - rank)
    BilinearInfoNCE(D, D, gather=gather)(torch.ones(N, D), targets)


def refuse_element_alone(gather: str, rank: int) -> None:
    """The same in a loss that checks arguments before it has contexts and targets."""
    loss_fn = PermutativeInfoNCE(D, subtasks=["Vp->Vf"], gather=gather)
    loss_fn(torch.ones(N, D), torch.ones(N, D - rank), None, None)


def raised(work: Any, *args: Any) -> str:
    """What a call raised."""
    try:
        work(*args)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def second_derivatives(gather: str, backend: str, rank: int | None) -> list[Tensor]:
    """Gradients of the penalty, summed over processes, at one process's rows, or at those of both without a rank."""
    contexts, targets = torch.randn(2, 2 * N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = slice(None) if rank is None else slice(rank * N, (rank + 1) * N)
    own = [value[rows].requires_grad_() for value in (contexts, targets)]
    model = BilinearInfoNCE(D, D, gather=gather, backend=backend).double()
    gradients = torch.autograd.grad(model(*own), own, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in gradients), own))


def through_batch_norm() -> None:
    """A second derivative of a batch norm over processes."""
    x = torch.randn(N, 3, requires_grad=True)
    y = SynchronisedBatchNorm(torch.nn.BatchNorm1d(3))(x)
    torch.autograd.grad(y.square().sum(), x, create_graph=True)


def through_torch_func(gather: str) -> None:
    """A forward-mode derivative that would have to pass through messages."""
    model = BilinearInfoNCE(D, D, gather=gather)
    x = torch.ones(N, D)
    torch.func.jvp(lambda contexts: model(contexts, x), (x,), (x,))


def work(rank: int, folder: str) -> None:
    """One process: everything it was told, into folder/rank.pt."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for gather in ("all", "ring"):
        for name in DISAGREEMENTS:
            found[f"{name} {gather}"] = raised(disagree, name, gather, rank)
        found[f"refused {gather}"] = raised(refuse_alone, gather, rank)
        found[f"refused element {gather}"] = raised(refuse_element_alone, gather, rank)
        found[f"torch.func {gather}"] = raised(through_torch_func, gather)
        with rows_known_even():  # which holds from the second call on
            found[f"first call {gather}"] = raised(disagree, "autocast", gather, rank)
            found[f"second call {gather}"] = raised(disagree, "nothing", gather, rank)
    found["second derivatives"] = second_derivatives("all", "reference", rank)
    found["second derivatives ring"] = raised(second_derivatives, "ring", "reference", rank)
    found["second derivatives batch norm"] = raised(through_batch_norm)
    torch.save(found, Path(folder) / f"{rank}.pt")
    gc.collect()
    dist.destroy_process_group()
    check_gloo_has_ended()
