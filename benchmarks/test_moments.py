"""How fast moment_info_nce is on the CPU, against the batched products and cross-entropy that one would write.

As in test_info_nce.py: contestants agree before they are timed, take turns, and `extra_info` holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from info_nce_baselines import Step, batched_moments
from test_info_nce import check_agreement, quietly, report
from timing import peak_extra_mib, take_turns
from torch import Tensor

from avppc.ops.info_nce.moments import Candidates, moment_info_nce

pytestmark = pytest.mark.timeout(1200)

SIZES = [(42, 128, 12, 128), (42, 128, 4, 128), (42, 512, 7, 256), (4, 128, 7, 128)]  # K, N, T, D


@pytest.mark.parametrize("candidates", ["clip", "moment", "both"])
@pytest.mark.parametrize(("K", "N", "T", "D"), SIZES, ids=lambda value: str(value))
def test_moments(benchmark, K: int, N: int, T: int, D: int, candidates: Candidates) -> None:
    """Loss and all gradients."""
    sub_tasks = Step.make(42, 2, D)
    weights, pairs = sub_tasks.weights[:K].detach().requires_grad_(), torch.tensor(sub_tasks.pairs[:K])
    contexts, targets = (torch.randn(len(sub_tasks.contexts), N, T, D, requires_grad=True) for _ in range(2))
    leaves = (contexts, targets, weights)

    def ours() -> Tensor:
        return moment_info_nce(*leaves, pairs, candidates=candidates)

    def batched() -> Tensor:
        return batched_moments(*leaves, sub_tasks.pairs[:K], candidates)

    losses: dict[str, Callable[[], Tensor]] = {"ours": ours, "batched": batched}
    check_agreement(losses, leaves)
    steps = {name: (lambda loss=loss: torch.autograd.grad(loss(), leaves)) for name, loss in losses.items()}
    memory = {name: quietly(lambda step=step: peak_extra_mib(step)) for name, step in steps.items()}
    columns = {"clip": T, "moment": N, "both": T + N}[candidates]
    flop = 3 * 2 * K * N * T * D * (D + columns)
    report(benchmark, take_turns(steps), flop, memory)
    benchmark.extra_info.update(K=K, N=N, T=T, D=D, candidates=candidates, threads=torch.get_num_threads())
    benchmark.pedantic(steps["ours"], rounds=3)
