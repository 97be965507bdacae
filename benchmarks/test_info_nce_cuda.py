"""How fast the bilinear InfoNCE is on a GPU, against torch's ways, other packages, and cuBLAS on the same products.

Contestants agree in loss and gradients before they are timed. `extra_info` of each result holds, of the same run:
milliseconds (median, 20% and 80% quantiles) eager and as a CUDA graph (null where it cannot be one, or takes so long
that launches are no part of it), useful TFLOP/s (recomputation not counted), our share of cuBLAS's speed, and peak
extra memory of every contestant; "out of memory" where one needs more than there is.
Random unnormalised embeddings in bfloat16, logits of unit variance, inputs not in the cache.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gpu_timing
import info_nce_baselines as baselines
import pytest
import torch
import torch.nn.functional as F
from info_nce_baselines import Step
from info_nce_cuda_peers import looped, open_clip_loss, peers, products
from torch import Tensor

from avppc import bilinear_info_nce, moment_info_nce
from avppc.ops.info_nce.moments import Candidates

MISSING = None if torch.cuda.is_available() else "no CUDA device is available to torch"
pytestmark = pytest.mark.skipif(MISSING is not None and os.environ.get("AVPPC_REQUIRE_GPU") != "1", reason=str(MISSING))

SIZES = [(4096, 512), (1024, 512), (256, 512), (1024, 256), (4096, 256), (4096, 1024), (16384, 512)]
COMPILED_SIZES = [(4096, 512), (1024, 512)]  # torch.compile takes a minute for each
PEER_SIZES = [(1024, 256), (1024, 512), (4096, 512), (16384, 512), (4096, 1024)]

MOMENT_SIZES = [(128, 12, 128), (512, 12, 256), (512, 26, 512)]  # N, T, D

SLOW_MS = 100.0  # of a step that is not worth a CUDA graph

Loss = Callable[[], Tensor]


def on_gpu(step: Step) -> Step:
    return replace(
        step,
        contexts=step.contexts.detach().cuda().requires_grad_(),
        targets=step.targets.detach().cuda().requires_grad_(),
        weights=step.weights.detach().cuda().requires_grad_(),
        labels=step.labels.cuda(),
    )


def ours(step: Step) -> Tensor:
    return bilinear_info_nce(step.contexts, step.targets, step.weights, step.pairs, backend="triton")


def of_step(step: Step, functions: dict[str, Callable[[Step], Tensor]]) -> dict[str, Loss]:
    """Ours first."""
    return {name: (lambda function=function: function(step)) for name, function in {"ours": ours, **functions}.items()}


def measured(name: str, run: Callable[[], Any], results: dict[str, Any]) -> Any:
    """What a contestant returns or None; its failure becomes its result, for a table must not end at a peer's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run()
    except torch.OutOfMemoryError:
        results[name] = "out of memory"
    except Exception as error:  # a peer that fails at this size is a result, too
        if name == "ours":
            raise
        results[name] = f"fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    torch.cuda.empty_cache()
    return None


def deviation_from(reference: list[Tensor], found: list[Tensor]) -> float:
    norm = torch.linalg.vector_norm
    deviations = [norm((a - b).float()) / norm(b.float()) for a, b in zip(found, reference, strict=True)]
    return float(torch.stack(deviations).max())  # NaN if one is


def compare(benchmark, losses: dict[str, Loss], leaves: tuple[Tensor, ...], cublas: Callable[[], None], flop: float):
    """Times whole steps, forward and backward, of all contestants."""
    results: dict[str, Any] = {}
    reference: list[Tensor] = []
    for name, loss_of in losses.items():

        def step(loss_of: Loss = loss_of) -> list[Tensor]:
            loss = loss_of()
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]

        found = measured(name, step, results)
        if found is None:
            continue
        if name == "ours":
            reference = found
        deviation = deviation_from(reference, found)
        if not deviation <= 5e-2:
            results[name] = f"disagrees by {deviation:.2g}"
            continue
        del found
        memory = measured(name, lambda step=step: gpu_timing.peak_extra_mib(step), results)
        eager = measured(name, lambda step=step: gpu_timing.times(step), results)
        if eager is None or memory is None:
            continue
        replay = None
        if eager.median < SLOW_MS:
            replay = measured(name, lambda step=step: gpu_timing.as_graph(step), results)
        graph = None if replay is None else gpu_timing.times(replay)
        best = min(eager.median, graph.median if graph else eager.median)
        results[name] = {
            "eager_ms": eager.rounded(),
            "graph_ms": graph.rounded() if graph else None,
            "useful_tflop_per_second": round(flop / best / 1e9, 1),
            "peak_extra_mib": round(memory, 1),
        }
        del replay
        torch.cuda.empty_cache()
    disagree = any(str(result).startswith("disagrees") for result in results.values())
    agree = [name for name, result in results.items() if name != "ours" and isinstance(result, dict)]
    assert agree or not disagree, f"ours agrees with none: {results}"
    replay = gpu_timing.as_graph(cublas)
    alone = gpu_timing.times(replay or cublas)
    best = {name: min(r["eager_ms"][0], (r["graph_ms"] or r["eager_ms"])[0]) for name, r in results.items()
            if isinstance(r, dict)}  # fmt: skip
    benchmark.extra_info.update(
        contestants=results,
        cublas_ms=alone.rounded(),
        share_of_cublas=round(alone.median / best["ours"], 3),
        times_faster={name: round(value / best["ours"], 2) for name, value in best.items() if name != "ours"},
    )

    def run() -> None:
        torch.autograd.grad(losses["ours"](), leaves)
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize(("N", "D"), SIZES, ids=lambda value: str(value))
def test_full_step(benchmark, N: int, D: int) -> None:
    """The 42 sub-tasks: loss and all gradients."""
    step = on_gpu(Step.make(42, N, D, torch.bfloat16))
    functions = {
        "eager bmm": baselines.eager_bmm,
        "eager loop": baselines.eager_loop,
        "checkpointed loop": baselines.checkpointed_loop,
        **{f"{name} loop": looped(peer) for name, peer in peers().items()},
    }
    benchmark.extra_info.update(K=42, N=N, D=D, dtype="bfloat16", mode="full")
    compare(benchmark, of_step(step, functions), step.leaves, products(step, backward=True), step.products_flop(True))


@pytest.mark.parametrize(("N", "D"), COMPILED_SIZES, ids=lambda value: str(value))
def test_compiled(benchmark, N: int, D: int) -> None:
    """The 42 sub-tasks against torch.compile, which takes long to compile."""
    step = on_gpu(Step.make(42, N, D, torch.bfloat16))
    torch._dynamo.reset()
    functions = {"compiled bmm": torch.compile(baselines.eager_bmm, dynamic=False)}
    if N <= 1024:
        functions["compiled loop"] = torch.compile(baselines.eager_loop, dynamic=False)
    benchmark.extra_info.update(K=42, N=N, D=D, dtype="bfloat16", mode="full")
    compare(benchmark, of_step(step, functions), step.leaves, products(step, backward=True), step.products_flop(True))


@pytest.mark.parametrize(("N", "D"), SIZES, ids=lambda value: str(value))
def test_forward(benchmark, N: int, D: int) -> None:
    """The loss alone, without gradients, against cuBLAS."""
    step = on_gpu(Step.make(42, N, D, torch.bfloat16))

    def run() -> None:
        with torch.no_grad():
            ours(step)

    run()
    mine = gpu_timing.times(gpu_timing.as_graph(run) or run)
    alone = gpu_timing.times(products(step, backward=False))
    benchmark.extra_info.update(
        K=42, N=N, D=D, dtype="bfloat16", mode="forward", graph_ms=mine.rounded(), cublas_ms=alone.rounded(),
        share_of_cublas=round(alone.median / mine.median, 3),
        useful_tflop_per_second=round(step.products_flop(backward=False) / mine.median / 1e9, 1),
    )  # fmt: skip
    benchmark.pedantic(lambda: (run(), torch.cuda.synchronize()), rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("candidates", ["clip", "moment", "both"])
@pytest.mark.parametrize(("N", "T", "D"), MOMENT_SIZES, ids=lambda value: str(value))
def test_moments(benchmark, N: int, T: int, D: int, candidates: Candidates) -> None:
    """The 42 sub-tasks between clips with moments, against batched products."""
    step = Step.make(42, 2, D, torch.bfloat16)
    sets = len(step.contexts)
    contexts, targets = (torch.randn(sets, N, T, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    leaves = contexts.requires_grad_(), targets.requires_grad_(), step.weights.detach().cuda().requires_grad_()
    losses: dict[str, Loss] = {
        "ours": lambda: moment_info_nce(*leaves, step.pairs, candidates=candidates, backend="triton"),
        "batched": lambda: baselines.batched_moments(*leaves, step.pairs, candidates),
    }
    benchmark.extra_info.update(K=42, N=N, T=T, D=D, dtype="bfloat16", mode="full", candidates=candidates)
    columns = {"clip": T, "moment": N, "both": T + N}[candidates]
    alone = baselines.moment_products(*leaves, step.pairs, candidates)
    compare(benchmark, losses, leaves, alone, 3 * 2.0 * 42 * N * T * D * (D + columns))


def plain_products(queries: Tensor, targets: Tensor) -> Callable[[], None]:
    """The three products of a step without weights, by cuBLAS."""
    q, z = queries.detach(), targets.detach()
    logits, wide = q.new_zeros(len(q), len(z)), torch.empty_like(q)

    def run() -> None:
        torch.mm(q, z.T, out=logits)
        torch.mm(logits, z, out=wide)
        torch.mm(logits.T, q, out=wide)

    return run


@pytest.mark.parametrize(("N", "D"), PEER_SIZES, ids=lambda value: str(value))
def test_one_task(benchmark, N: int, D: int) -> None:
    """K = 1 without weights, against packages whose losses are of this form."""
    torch.manual_seed(0)
    queries, targets = (torch.randn(N, D, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    labels = torch.arange(N, device="cuda")
    scale = D**-0.5
    losses: dict[str, Loss] = {"ours": lambda: bilinear_info_nce(queries, targets, scale=scale, backend="triton")}
    losses["eager"] = lambda: F.cross_entropy((scale * queries @ targets.T).float(), labels)
    for name, peer in peers().items():
        losses[name] = lambda peer=peer: peer(scale * queries, targets, labels)
    benchmark.extra_info.update(K=1, N=N, D=D, dtype="bfloat16", mode="full")
    compare(benchmark, losses, (queries, targets), plain_products(queries, targets), 3 * 2.0 * N * N * D)


@pytest.mark.parametrize("N", [1024, 4096, 16384], ids=lambda value: f"N{value}")
def test_clip(benchmark, N: int) -> None:
    """The symmetric loss with a learned scale, against open_clip's ClipLoss."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(N, 512, device="cuda"), dim=1).bfloat16().requires_grad_() for _ in range(2))
    scale = torch.tensor(14.3, device="cuda", requires_grad=True)
    losses: dict[str, Loss] = {
        "ours": lambda: bilinear_info_nce(image, text, scale=scale, symmetric=True, backend="triton"),
        "ClipLoss formula": lambda: baselines.clip_loss(image, text, scale.to(image.dtype)).float(),
        "one product": lambda: baselines.clip_loss_of_one_product(image, text, scale.to(image.dtype)).float(),
    }
    loss = open_clip_loss()
    if loss is not None:
        losses["open_clip"] = lambda: loss(image, text, scale.to(image.dtype))
    benchmark.extra_info.update(K=1, N=N, D=512, dtype="bfloat16", mode="full", symmetric=True)
    compare(benchmark, losses, (image, text), plain_products(image, text), 3 * 2.0 * N * N * 512)
