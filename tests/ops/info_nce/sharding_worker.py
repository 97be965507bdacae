"""What one of two processes gets whose loss modules are sharded by FSDP."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before there is a group, as avppc/train/distributed.py has it
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.losses.permutative_info_nce import PermutativeInfoNCE

N, D = 5, 4


def initialised(tasks: int, mesh: Any, dim: int) -> dict[str, Any]:
    """The parameters of a module made on the meta device, sharded along dim (vectors: 0) and then initialised."""
    with torch.device("meta"):
        module = BilinearInfoNCE(D, D + 2, tasks=tasks, learn_scale=True, scale=2.0)
    fully_shard(module, mesh=mesh, shard_placement_fn=lambda value: Shard(dim if value.ndim == 3 else 0))
    module.to_empty(device="cpu")
    module.reset_parameters()
    return {name: value.full_tensor().detach() for name, value in module.named_parameters()}


def embeddings(rank: int, count: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(count, N, D, generator=torch.Generator().manual_seed(rank)).unbind()


def in_bfloat16(mesh: Any, rank: int) -> float:
    """The loss of a module whose parts are sharded one by one, with FSDP's mixed precision."""
    torch.manual_seed(0)
    module = PermutativeInfoNCE(D)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for part in (module.context_fusion, module.target_fusion, module.score, module):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    loss = module(*embeddings(rank, 4))
    loss.backward()
    return loss.item()


def scale_gradient(rank: int, how: str, mesh: Any) -> float:
    """The gradient of a learned scale, averaged over processes by FSDP."""
    module: Any = BilinearInfoNCE(D, D, learn_scale=True)
    if how == "fully_shard":
        fully_shard(module, mesh=mesh)
    else:
        module = FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)
    module(*embeddings(rank, 2)).backward()
    gradients = [value.grad for name, value in module.named_parameters() if name.endswith("log_scale")]
    own = torch.zeros(())
    for gradient in gradients:
        if gradient is not None:  # FSDP1 leaves none where this process has no part of the scale
            own = own + (gradient.to_local() if how == "fully_shard" else gradient).sum()
    dist.all_reduce(own)
    return float(own)


def work(rank: int, folder: str) -> None:
    """One process: everything it found, into folder/rank.pt."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("ignore")  # FSDP on a CPU warns of the backends it does not use
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {
        f"{tasks} tasks along {dim}": initialised(tasks, mesh, dim) for tasks, dim in ((1, 0), (3, 0), (2, 1))
    }
    found["bfloat16"] = in_bfloat16(mesh, rank)
    for how in ("fully_shard", "FullyShardedDataParallel"):
        found[how] = scale_gradient(rank, how, mesh)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    # FSDP keeps Gloo's threads beyond their group; one that frees a tensor while Python shuts down aborts the process.
    os._exit(0)
