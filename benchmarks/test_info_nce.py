"""How fast the bilinear InfoNCE is on the CPU, against the ways one writes it in torch and against its products alone.

Contestants agree in loss and gradients before they are timed, and take turns. `extra_info` of each result holds, of the
same run: milliseconds (median and best) and peak extra memory of every contestant, how many times slower each is than
ours, useful GFLOP/s, and our share of the speed of torch.mm on the same products. Unnormalised random embeddings;
logits of unit variance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from info_nce_baselines import Step, baselines, clip_loss, clip_loss_of_one_product, products
from plot_tables import TABLE_D
from timing import Contestant, Times, peak_extra_mib, take_turns
from torch import Tensor

from avppc import bilinear_info_nce

pytestmark = pytest.mark.timeout(3600)  # a full step of N = 2048 by every contestant takes minutes

K_VALUES, N_VALUES, D_VALUES = (1, 42), (128, 256, 512, 1024, 2048), (128, 256, 512)
MEMORY_FROM_N = 512


def quietly(function: Callable[[], Any]) -> Any:
    """Calls what makes torch's compiler or profiler warn about torch itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()


def check_agreement(losses: dict[str, Callable[[], Tensor]], leaves: tuple[Tensor, ...]) -> None:
    """Raises unless all contestants have the same loss and gradients; bfloat16 to its own rounding."""
    rough = leaves[0].dtype != torch.float32
    reference = None
    for name, loss_of in losses.items():
        loss = quietly(loss_of)
        found = (loss, *torch.autograd.grad(loss, leaves))
        reference = reference or found
        for got, expected in zip(found, reference, strict=True):
            deviation = torch.linalg.vector_norm((got - expected).float()) / torch.linalg.vector_norm(expected.float())
            assert deviation < (3e-2 if rough else 1e-4), f"{name} deviates by {deviation:.2g}"


def report(benchmark, times: dict[str, Times], flop: float, memory: dict[str, float] | None = None) -> None:
    """Puts the comparison into the benchmark's extra_info."""
    others = {name: value for name, value in times.items() if name not in ("ours", "products")}
    mine = times["ours"]
    benchmark.extra_info.update(
        rounds=len(mine.seconds),
        milliseconds={name: round(value.median * 1e3, 3) for name, value in times.items()},
        best_milliseconds={name: round(value.best * 1e3, 3) for name, value in times.items()},
        times_faster={name: round(value.median / mine.median, 3) for name, value in others.items()},
        times_faster_best={name: round(value.best / mine.best, 3) for name, value in others.items()},
        useful_gflop_per_second=round(flop / mine.median / 1e9, 1),
    )
    if "products" in times:
        benchmark.extra_info.update(
            share_of_mm=round(times["products"].median / mine.median, 3),
            share_of_mm_best=round(times["products"].best / mine.best, 3),
        )
    if memory is not None:
        benchmark.extra_info["peak_extra_mib"] = {name: round(value, 2) for name, value in memory.items()}


def compare(benchmark, step: Step, mode: str) -> None:
    """Times one mode of every contestant: "forward" without gradients, "backward" alone, or "full"."""
    width = step.contexts.shape[2]
    functions = quietly(lambda: baselines(compiled=width == TABLE_D and mode == "full"))
    losses: dict[str, Callable[[], Tensor]] = {
        name: (lambda function=function: function(step)) for name, function in functions.items()
    }
    check_agreement(losses, step.leaves)
    graphs: dict[str, Tensor] = {}

    def forward(name: str) -> object:
        with torch.no_grad():
            return losses[name]()

    def build(name: str) -> None:
        graphs[name] = losses[name]()

    def backward(name: str) -> object:
        return torch.autograd.grad(graphs.pop(name), step.leaves)

    def full(name: str) -> object:
        return torch.autograd.grad(losses[name](), step.leaves)

    run = {"forward": forward, "backward": backward, "full": full}[mode]
    contestants: dict[str, Contestant] = {name: (lambda name=name: run(name)) for name in losses}
    prepare: dict[str, Contestant] = {}
    if mode == "backward":
        prepare = {name: (lambda name=name: build(name)) for name in losses}
    else:
        contestants["products"] = products(step, backward=mode == "full")
    memory = None
    if mode == "full" and width == TABLE_D and step.contexts.shape[1] >= MEMORY_FROM_N:
        memory = {name: quietly(lambda name=name: peak_extra_mib(contestants[name])) for name in losses}
    times = quietly(lambda: take_turns(contestants, prepare=prepare))
    flop = step.products_flop(backward=mode == "full") if mode != "backward" else 2 * step.products_flop(False)
    report(benchmark, times, flop, memory)
    benchmark.extra_info.update(
        K=len(step.pairs),
        N=step.contexts.shape[1],
        D=width,
        dtype=str(step.contexts.dtype).removeprefix("torch."),
        mode=mode,
        threads=torch.get_num_threads(),
    )
    setup = (lambda: build("ours")) if mode == "backward" else None
    benchmark.pedantic(contestants["ours"], setup=setup, rounds=3)


@pytest.mark.parametrize("D", D_VALUES, ids=lambda value: f"D{value}")
@pytest.mark.parametrize("N", N_VALUES, ids=lambda value: f"N{value}")
@pytest.mark.parametrize("K", K_VALUES, ids=lambda value: f"K{value}")
def test_full_step(benchmark, K: int, N: int, D: int) -> None:
    """Loss and all gradients."""
    compare(benchmark, Step.make(K, N, D), "full")


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("N", N_VALUES, ids=lambda value: f"N{value}")
@pytest.mark.parametrize("K", K_VALUES, ids=lambda value: f"K{value}")
def test_half_step(benchmark, K: int, N: int, mode: str) -> None:
    """The loss alone, without gradients; and the backward alone, after a forward that in ours has done its work."""
    compare(benchmark, Step.make(K, N, TABLE_D), mode)


@pytest.mark.parametrize("N", N_VALUES, ids=lambda value: f"N{value}")
def test_full_step_in_bfloat16(benchmark, N: int) -> None:
    compare(benchmark, Step.make(42, N, TABLE_D, torch.bfloat16), "full")


def compare_peer(benchmark, losses: dict[str, Callable[[], Tensor]], leaves: tuple[Tensor, ...], flop: float) -> None:
    check_agreement(losses, leaves)
    contestants: dict[str, Contestant] = {
        name: (lambda loss_of=loss_of: torch.autograd.grad(loss_of(), leaves)) for name, loss_of in losses.items()
    }
    report(benchmark, take_turns(contestants), flop)
    N, D = leaves[0].shape
    benchmark.extra_info.update(K=1, N=N, D=D, dtype="float32", mode="full", threads=torch.get_num_threads())
    benchmark.pedantic(contestants["ours"], rounds=3)


@pytest.mark.parametrize("N", N_VALUES, ids=lambda value: f"N{value}")
def test_info_nce_pytorch(benchmark, N: int) -> None:
    """The package info-nce-pytorch: cosine similarities over a temperature, in batch negatives."""
    peer = pytest.importorskip("info_nce", reason="needs `pip install info-nce-pytorch`")
    torch.manual_seed(0)
    query, key = (torch.randn(N, 256, requires_grad=True) for _ in range(2))
    losses: dict[str, Callable[[], Tensor]] = {
        "info-nce-pytorch": lambda: peer.info_nce(query, key, temperature=0.1),
        "ours": lambda: bilinear_info_nce(F.normalize(query, dim=1), F.normalize(key, dim=1), scale=10.0),
    }
    compare_peer(benchmark, losses, (query, key), 3 * 2.0 * N * N * 256)


@pytest.mark.parametrize("D", [256, 512], ids=lambda value: f"D{value}")
@pytest.mark.parametrize("N", N_VALUES, ids=lambda value: f"N{value}")
def test_clip_loss(benchmark, N: int, D: int) -> None:
    """CLIP's symmetric loss with a learned scale."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(N, D), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(14.3, requires_grad=True)
    losses: dict[str, Callable[[], Tensor]] = {
        "ClipLoss formula": lambda: clip_loss(image, text, scale),
        "one product": lambda: clip_loss_of_one_product(image, text, scale),
        "ours": lambda: bilinear_info_nce(image, text, scale=scale, symmetric=True),
    }
    compare_peer(benchmark, losses, (image, text, scale), 3 * 2.0 * N * N * D)


@pytest.mark.parametrize("classes", [4, 64], ids=lambda value: f"classes{value}")
@pytest.mark.parametrize("N", [256, 1024], ids=lambda value: f"N{value}")
def test_supervised_contrastive(benchmark, N: int, classes: int) -> None:
    """SupConLoss of pytorch-metric-learning: N embeddings, each told from the others, positives of the same class."""
    peer = pytest.importorskip("pytorch_metric_learning.losses", reason="needs `pip install pytorch-metric-learning`")
    torch.manual_seed(0)
    x, labels, rows = torch.randn(N, 256, requires_grad=True), torch.arange(N) % classes, torch.arange(N)
    others = torch.eye(N) == 0
    same = (labels[:, None] == labels) & others
    positives = same.nonzero()[:, 1].view(N, -1)
    sup_con = peer.SupConLoss(temperature=0.1)

    def plain() -> Tensor:
        embeddings = F.normalize(x, dim=1)
        s = (10.0 * embeddings @ embeddings.T).masked_fill(~others, -torch.inf)
        return -(s.log_softmax(1).masked_fill(~same, 0.0).sum(1) / same.sum(1)).mean()

    def ours() -> Tensor:
        embeddings = F.normalize(x, dim=1)
        return bilinear_info_nce(
            embeddings, embeddings, scale=10.0, positives=positives, context_ids=rows, target_ids=rows
        )

    losses: dict[str, Callable[[], Tensor]] = {
        "pytorch-metric-learning": lambda: sup_con(x, labels),
        "plain torch": plain,
        "ours": ours,
    }
    compare_peer(benchmark, losses, (x,), 3 * 2.0 * N * N * 256)
    benchmark.extra_info.update(positives=positives.shape[1])
