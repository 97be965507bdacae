"""What one of G processes computes for the tests of gather="all" and "ring"."""

from __future__ import annotations

import copy
import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, as avppc/train/distributed.py has it
from gloo_threads import check_gloo_has_ended
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.losses.permutative_info_nce import PermutativeInfoNCE
from avppc.ops.info_nce.op import bilinear_info_nce

ROWS = 7  # of each process
PAIRS = ((0, 0), (1, 1), (1, 2), (0, 1))


@dataclass(frozen=True)
class GatherCase:
    """One loss over processes."""

    gather: str
    backend: str
    dtype: torch.dtype
    symmetric: bool = False
    ids: bool = False
    reduction: str = "mean"
    moments: str = ""
    """What moments are told from; empty: there are none."""
    plain: bool = False
    """Dot products by the function itself, as CLIP-like code has them."""
    positives: int = 0
    """How many each row has, by index; 0: its own row."""
    dot: bool = False
    """Plain dot products of normalised embeddings, without W."""

    def __str__(self) -> str:
        flags = ["symmetric"] * self.symmetric + ["ids"] * self.ids + [self.moments] * bool(self.moments)
        flags += [f"positives{self.positives}"] * bool(self.positives) + ["dot"] * self.dot + ["plain"] * self.plain
        return "-".join([self.gather, self.backend, str(self.dtype).removeprefix("torch."), self.reduction, *flags])


def all_cases(backends: list[str]) -> list[GatherCase]:
    cases = []
    for gather in ("all", "ring"):
        for backend in backends:
            dtype = torch.float64 if backend == "reference" else torch.float32
            for symmetric in (False, True):
                cases.append(GatherCase(gather, backend, dtype, symmetric, ids=symmetric))
            cases.append(GatherCase(gather, backend, dtype, ids=True, reduction="task"))
            cases.append(GatherCase(gather, backend, dtype, symmetric=True, reduction="none"))
        cases.append(GatherCase(gather, backends[0], torch.bfloat16))
        cases += [GatherCase(gather, "reference", torch.float64, bool(ids), bool(ids), plain=True) for ids in (0, 1)]
        for moments, reduction in (("clip", "mean"), ("moment", "none"), ("both", "task")):
            cases.append(GatherCase(gather, "reference", torch.float64, False, True, reduction, moments))
    for backend in backends:
        dtype = torch.float64 if backend == "reference" else torch.float32
        for reduction, count, ids in (("mean", 1, False), ("none", 3, True)):
            cases.append(GatherCase("all", backend, dtype, ids=ids, reduction=reduction, positives=count))
        cases += [GatherCase(gather, backend, dtype, symmetric=True, dot=True) for gather in ("all", "ring")]
    if "cpp" in backends:
        cases.append(GatherCase("all", "cpp", torch.float32, moments="both"))
    return cases


class Model(nn.Module):
    """A small encoder for each side and the loss: what DistributedDataParallel wraps."""

    def __init__(self, case: GatherCase, gather: str, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.widths = (5, 5) if case.dot else (5, 6)
        self.context_encoder = nn.Linear(3, 2 * self.widths[0])
        self.target_encoder = nn.Linear(3, 3 * self.widths[1])
        task_weights = (1.0, 0.1, 0.5, 0.0) if case.reduction == "mean" else None
        self.loss = BilinearInfoNCE(
            *self.widths,
            pairs=PAIRS,
            weight=not case.dot,
            normalize="l2" if case.dot else "none",
            learn_scale=True,
            scale=1.5,
            gather=gather,
            group=group,
            symmetric=case.symmetric,
            reduction=case.reduction,
            task_weights=task_weights,
            backend=case.backend,
            return_stats=True,
        )
        with torch.no_grad():
            if self.loss.weight is not None:
                self.loss.weight += 0.3 * torch.randn_like(self.loss.weight)
        self.to(case.dtype)

    def forward(self, seen: Tensor, heard: Tensor, ids: Tensor | None, positives: Tensor | None) -> Any:
        contexts = self.context_encoder(seen).unflatten(1, (2, self.widths[0])).transpose(0, 1)
        targets = self.target_encoder(heard).unflatten(1, (3, self.widths[1])).transpose(0, 1)
        return self.loss(contexts, targets, ids, ids, positives=positives)


class PlainModel(nn.Module):
    """Two projections and a learned scale, without W."""

    def __init__(self, case: GatherCase, gather: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.ModuleList(nn.Linear(3, 5) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(0.3))
        self.options = {"gather": gather, "symmetric": case.symmetric, "backend": case.backend, "return_stats": True}
        self.to(case.dtype)

    def forward(self, seen: Tensor, heard: Tensor, ids: Tensor | None, _: Tensor | None) -> Any:
        image, text = (encoder(side) for encoder, side in zip(self.encoders, (seen, heard), strict=True))
        return bilinear_info_nce(
            image, text, scale=self.log_scale.exp(), context_ids=ids, target_ids=ids, **self.options
        )


class MomentModel(nn.Module):
    """The same with clips that have moments: two sub-tasks score them, two score the clips' first moments."""

    def __init__(self, case: GatherCase, gather: str, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.ModuleList(nn.Linear(3, 4 * 6) for _ in range(2))
        self.loss = PermutativeInfoNCE(
            6,
            subtasks=("Vp->Ap", "Vp->Vf", "Vp,Vf->Ap,Af", "Ap,Af->Vp,Vf"),
            candidates=case.moments,
            task_weights=(1.0, 0.1, 0.5, 2.0) if case.reduction == "mean" else None,
            learn_scale=True,
            gather=gather,
            group=group,
            reduction=case.reduction,
            backend=case.backend,
            return_stats=True,
        )
        with torch.no_grad():
            self.loss.score.weight += 0.3 * torch.randn_like(self.loss.score.weight)
        self.to(case.dtype)

    def forward(self, seen: Tensor, heard: Tensor, ids: Tensor | None, _: Tensor | None) -> Any:
        v_clip, a_clip = (
            encoder(side).unflatten(1, (4, 6)) for encoder, side in zip(self.encoders, (seen, heard), strict=True)
        )
        return self.loss(v_clip[:, 0], v_clip[:, 3], a_clip[:, 0], a_clip[:, 3], ids, v_clip=v_clip, a_clip=a_clip)


def make_model(case: GatherCase, gather: str, group: dist.ProcessGroup | None = None) -> nn.Module:
    if case.plain:
        return PlainModel(case, gather)
    return MomentModel(case, gather, group) if case.moments else Model(case, gather, group)


def batch(case: GatherCase, processes: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """The whole batch, an upstream gradient of each row's loss, positives; equal ids lie on different processes, too,
    and so do positives."""
    g = torch.Generator().manual_seed(1)
    rows = ROWS * processes
    seen, heard = (torch.randn(rows, 3, generator=g).to(case.dtype) for _ in range(2))
    ids = torch.randint(4, (rows,), generator=g) if case.ids else None
    upstream = torch.randn(len(PAIRS), rows, generator=g)
    positives = torch.randint(rows, (rows, case.positives), generator=g) if case.positives else None
    return seen, heard, ids, upstream, positives


def step(model: nn.Module, case: GatherCase, processes: int, rank: int | None = None) -> dict[str, Tensor]:
    """Loss, statistics and, after a backward, the gradients of the parameters, of one process or of the whole batch."""
    seen, heard, ids, upstream, positives = batch(case, processes)
    if rank is not None:
        own = slice(rank * ROWS, (rank + 1) * ROWS)
        seen, heard, upstream = seen[own], heard[own], upstream[:, own]
        ids, positives = (None if value is None else value[own] for value in (ids, positives))
    loss, stats = model(seen, heard, ids, positives)
    weight = {"mean": torch.tensor(1.0), "task": torch.tensor([1.0, -2.0, 0.5, 3.0]), "none": upstream}[case.reduction]
    total = (loss * weight.to(loss.dtype)).mean() if case.reduction == "none" else (loss * weight.to(loss.dtype)).sum()
    total.backward()
    gradients = {name.removeprefix("module."): value.grad for name, value in model.named_parameters()}
    return {"loss": loss.detach(), "task_loss": stats.task_loss, "accuracy": stats.accuracy, **gradients}


PAIR = (0, 2)
"""Two of three processes, which gather among themselves; the third is a group of its own."""


def group_cases(backends: list[str]) -> list[GatherCase]:
    """What is computed in groups: each kind of message."""
    kinds: list[dict[str, Any]] = [{}, {"symmetric": True, "ids": True}, {"moments": "both", "ids": True}]
    cases = [GatherCase(gather, "reference", torch.float64, **kind) for gather in ("all", "ring") for kind in kinds]
    return [*cases, GatherCase("all", backends[-1], torch.float32, positives=2)]


def steps_in_groups(rank: int, backends: list[str]) -> dict[str, Any]:
    """This process's results among those of its group, and the errors of uneven batches and of the others' group."""
    groups = [dist.new_group(list(PAIR)), dist.new_group([1])]
    group, place = (groups[0], PAIR.index(rank)) if rank in PAIR else (groups[1], 0)
    found: dict[str, Any] = {}
    for case in group_cases(backends):
        model = make_model(case, case.gather, group)
        wrapped = DistributedDataParallel(model, process_group=group)
        found[str(case)] = step(wrapped, case, dist.get_world_size(group), place)
        copy.deepcopy(model)
    if rank in PAIR:
        case = GatherCase("all", "reference", torch.float64)
        seen, heard, *_ = batch(case, 2)
        try:
            Model(case, "all", group)(seen[: 3 + place], heard[: 3 + place], None, None)
        except ValueError as error:
            found["uneven"] = str(error)
    return found


def work(rank: int, processes: int, folder: str, backends: list[str]) -> None:
    """One process: all cases under DistributedDataParallel, results into folder/rank.pt."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes)
    results: dict[str, Any] = {}
    for case in all_cases(backends):
        results[str(case)] = step(DistributedDataParallel(make_model(case, case.gather)), case, processes, rank)
    if processes > 1:
        for gather in ("all", "ring"):
            case = GatherCase(gather, backends[0], torch.float32)
            model = Model(case, gather)
            seen, heard, *_ = batch(case, processes)
            try:
                model(seen[: 3 + rank], heard[: 3 + rank], None, None)
            except ValueError as error:
                results[f"uneven {gather}"] = str(error)
    if processes == 3:
        results["groups"] = steps_in_groups(rank, backends)
    torch.save(results, Path(folder) / f"{rank}.pt")
    gc.collect()  # the wrapped models, which hold the group
    dist.destroy_process_group()
    check_gloo_has_ended()
