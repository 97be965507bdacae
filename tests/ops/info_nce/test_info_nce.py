"""bilinear_info_nce: values and gradients of each backend against float64, over shapes, dtypes and options."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cpu_levels import set_level
from info_nce_cases import (
    BACKENDS,
    Case,
    as_double,
    assert_as_good_as,
    needs_cpp,
    plain_rows,
    plain_terms,
    solve,
    with_gradients,
)

from avppc.ops.info_nce.op import REDUCTIONS, bilinear_info_nce

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

SHAPES = [
    Case(N=1, Dc=1, Dz=1),
    Case(N=1, extra=5, offset=3, Dc=3, Dz=2),
    Case(N=2, Dc=3, Dz=3),
    Case(N=2, extra=1, offset=1, Dc=123, Dz=1),
    Case(N=127, Dc=123, Dz=3),
    Case(N=127, extra=1, Dc=3, Dz=123),
    Case(N=128, extra=129, offset=128, Dc=123, Dz=123),
    Case(N=128, Dc=256, Dz=256, K=7),
    Case(N=1000, Dc=3, Dz=3, K=2),
    Case(N=1000, extra=47, offset=20, Dc=256, Dz=123, K=2),
]
OPTIONS = [
    Case(N=127, symmetric=True),
    Case(N=1, symmetric=True),
    Case(N=1000, symmetric=True, Dc=123, Dz=256, K=2),
    Case(N=127, ids=20),
    Case(N=127, extra=70, offset=33, ids=60),
    Case(N=127, symmetric=True, ids=20),
    Case(N=130, ids=1),
    Case(N=2, symmetric=True, ids=1),
    Case(N=127, weighted=False, Dc=123, Dz=123),
    Case(N=127, weighted=False, symmetric=True, ids=50),
    Case(N=40, extra=9, offset=4, weighted=False, K=6),
    # a single sub-task without weights, small enough for one unit of work, or not
    Case(N=200, extra=50, offset=30, weighted=False, Dc=24, Dz=24, K=1, ids=60),
    Case(N=200, weighted=False, Dc=24, Dz=24, K=1, symmetric=True, ids=60),
    Case(N=300, weighted=False, Dc=24, Dz=24, K=1, symmetric=True),
    # more logits than are kept from the first round of a symmetric loss to the second
    Case(N=1500, symmetric=True, Dc=3, Dz=3, K=2),
]
STDS = [Case(N=128, Dc=64, Dz=64, std=std, symmetric=s) for std in (4.0, 16.0, 64.0) for s in (False, True)]


def in_dtypes(cases: list[Case], *dtypes: torch.dtype) -> list[Case]:
    return [dataclasses.replace(case, dtype=dtype) for case in cases for dtype in dtypes]


def check_against_truth(case: Case, backend: str) -> None:
    """All three reductions, with a random upstream gradient each, against float64."""
    arguments = case.arguments()
    shapes = {"mean": (), "task": (case.K,), "none": (case.K, case.N)}
    generator = torch.Generator().manual_seed(1)
    upstreams = {reduction: torch.randn(shapes[reduction], generator=generator) for reduction in REDUCTIONS}
    truth, plain = plain_terms(as_double(arguments), upstreams), plain_terms(arguments, upstreams)
    for reduction, upstream in upstreams.items():
        loss = solve(arguments, backend, reduction=reduction)
        assert loss.dtype == F32
        got = with_gradients(loss, upstream, arguments)
        for name, expected in truth[reduction].items():
            assert name == "loss" or got[name].dtype == arguments[name].dtype
            dtype = F32 if name == "loss" else case.dtype  # the scale's gradient is float32, a sum of products
            assert_as_good_as(got[name], plain[reduction][name], expected, f"{reduction}: {name}", dtype)


@needs_cpp
@pytest.mark.parametrize("case", in_dtypes([*SHAPES, *OPTIONS, *STDS], F32, BF16), ids=str)
def test_cpp_is_as_good_as_plain_torch(case: Case) -> None:
    check_against_truth(case, "cpp")


@needs_cpp
@pytest.mark.parametrize("case", in_dtypes([*SHAPES[:4], *OPTIONS[:2], OPTIONS[5], STDS[-1]], F16), ids=str)
def test_cpp_is_as_good_as_plain_torch_in_float16(case: Case) -> None:
    """(Plain torch takes seconds over larger ones.)"""
    check_against_truth(case, "cpp")


@pytest.mark.parametrize("case", in_dtypes([*SHAPES[:7], *OPTIONS[:2], *OPTIONS[3:], *STDS], F32, BF16), ids=str)
def test_reference_is_as_good_as_plain_torch(case: Case) -> None:
    check_against_truth(case, "reference")


@needs_cpp
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("case", in_dtypes([SHAPES[6], OPTIONS[5]], F32, F16), ids=str)
def test_every_instruction_set_agrees(case: Case, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case.arguments()
    upstream = torch.randn(case.K, case.N, generator=torch.Generator().manual_seed(1))
    best = with_gradients(solve(arguments, "cpp", reduction="none"), upstream, arguments)
    set_level(level, monkeypatch)
    rows = solve(arguments, "cpp", reduction="none")
    for name, value in with_gradients(rows, upstream, arguments).items():
        torch.testing.assert_close(value, best[name], atol=1e-5, rtol={F32: 1e-4, F16: 2e-3}[value.dtype])


@needs_cpp
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("case", in_dtypes([*SHAPES[6:8], OPTIONS[5], OPTIONS[8]], BF16), ids=str)
def test_every_instruction_set_is_as_good_as_plain_torch_in_bfloat16(
    case: Case, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels differ by more than their own rounding here: below avx512 the products are those of float32."""
    set_level(level, monkeypatch)
    check_against_truth(case, "cpp")


@needs_cpp
def test_any_number_of_subtasks_in_any_order() -> None:
    """More than are put in order at a time; neighbours that share a context, then a target, then both."""
    g = torch.Generator().manual_seed(0)
    pairs = [*((k % 3, k // 3 % 40) for k in range(120)), *((k // 40, k % 40) for k in range(120)), *[(0, 0)] * 70]
    K = len(pairs)
    tensors = [torch.randn(shape, generator=g) for shape in ((3, 5, 6), (40, 5, 6), (K, 6, 6))]
    names = ("contexts", "targets", "weights")
    arguments = {name: value.requires_grad_() for name, value in zip(names, tensors, strict=True)}
    arguments |= {"scale": torch.tensor(0.3, requires_grad=True), "pairs": pairs}
    upstream = torch.randn(K, generator=g)
    got = with_gradients(solve(arguments, "cpp", reduction="task"), upstream, arguments)
    expected = with_gradients(solve(arguments, "reference", reduction="task"), upstream, arguments)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [Case(N=60), Case(N=60, symmetric=True), Case(N=60, ids=9)], ids=str)
def test_statistics_are_those_of_the_rows(case: Case, backend: str) -> None:
    arguments = case.arguments()
    loss, stats = solve(arguments, backend, return_stats=True)
    rows = plain_rows(arguments).detach()
    torch.testing.assert_close(stats.task_loss, rows.mean(1))
    torch.testing.assert_close(loss.detach(), rows.mean())
    assert not stats.task_loss.requires_grad
    assert not stats.accuracy.requires_grad
    for k, (context, target) in enumerate(arguments["pairs"]):
        scores = arguments["contexts"][context] @ arguments["weights"][k].T @ arguments["targets"][target].T
        if case.ids:
            same = arguments["context_ids"][:, None] == arguments["target_ids"]
            scores = scores.masked_fill(same & ~torch.eye(60, dtype=torch.bool), -torch.inf)
        hits = (scores.argmax(1) == torch.arange(60)).float().mean()
        torch.testing.assert_close(stats.accuracy[k], hits)
    for reduction in ("task", "none"):
        _, same_stats = solve(arguments, backend, reduction=reduction, return_stats=True)
        torch.testing.assert_close(same_stats, stats)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_identical_embeddings_cost_log_n(backend: str, symmetric: bool) -> None:
    for n in (1, 2, 100):
        same = torch.ones(n, 8)
        loss, stats = bilinear_info_nce(
            same, same, 3 * torch.eye(8), symmetric=symmetric, backend=backend, return_stats=True
        )
        torch.testing.assert_close(loss, torch.tensor(math.log(n)))
        assert stats.accuracy.item() == (1.0 if n == 1 else 0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_loss_keeps_its_digits(backend: str) -> None:
    """The aligned positive wins by 12: the loss is 7 e^-12, far below the rounding of the log-sum-exp itself."""
    code = math.sqrt(12) * torch.eye(8)
    loss, stats = bilinear_info_nce(code, code, backend=backend, return_stats=True)
    expected = math.log1p(7 * math.exp(-12))
    assert loss.item() == pytest.approx(expected, rel=1e-5 if backend == "cpp" else 1e-2)
    assert stats.accuracy.item() == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_alignment_drives_the_loss_to_zero(backend: str) -> None:
    losses = [bilinear_info_nce(a * torch.eye(16), torch.eye(16), backend=backend).item() for a in (1, 5, 20, 200)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits_overflow_nowhere(backend: str) -> None:
    case = Case(N=50, std=1e6)
    arguments = case.arguments()
    got = with_gradients(solve(arguments, backend), torch.tensor(1.0), arguments)
    assert all(torch.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_nan_is_not_swallowed(backend: str, symmetric: bool) -> None:
    arguments = Case(N=40, symmetric=symmetric).arguments()
    arguments["targets"] = arguments["targets"].detach().clone()
    arguments["targets"][0, 17, 3] = torch.nan
    rows = solve(arguments, backend, reduction="none")
    assert rows[0].isnan().all()
    assert not rows[1].isnan().any()


@needs_cpp
def test_a_nan_of_any_payload_stays_one_in_bfloat16() -> None:
    """CUDA's NaN has all bits set: rounding it to bfloat16 must not carry into the sign."""
    contexts = torch.ones(16, 32, dtype=BF16, requires_grad=True)
    rows = bilinear_info_nce(contexts, torch.ones(16, 32, dtype=BF16), reduction="none", backend="cpp")
    rows.backward(torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(F32).expand(rows.shape))
    assert contexts.grad is not None
    assert contexts.grad.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_are_compared_in_full(backend: str) -> None:
    """Ids that agree in their low 32 bits are different ids."""
    arguments = Case(N=4).arguments()
    ids = torch.tensor([5, 5 + 2**32, 5 - 2**33, 6])
    got = solve({**arguments, "context_ids": ids, "target_ids": ids}, backend)
    torch.testing.assert_close(got, solve(arguments, backend))
    small = ids.to(torch.int32)  # here they are equal
    assert solve({**arguments, "context_ids": small, "target_ids": small}, backend) < got


@needs_cpp
@pytest.mark.parametrize("case", in_dtypes([Case(K=12, N=600), Case(K=1, N=1000, symmetric=True)], F32, BF16), ids=str)
def test_two_runs_are_bitwise_equal(case: Case) -> None:
    """Whichever thread gets which block, sums are added in one order."""
    runs = []
    for _ in range(6):
        arguments = case.arguments()
        runs.append(with_gradients(solve(arguments, "cpp"), torch.tensor(0.3), arguments))
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


@needs_cpp
def test_one_thread_or_more_agree() -> None:
    arguments = Case(K=6, N=300, symmetric=True).arguments()
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            runs.append(with_gradients(solve(arguments, "cpp"), torch.tensor(1.0), arguments))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        for name, value in run.items():
            torch.testing.assert_close(value, runs[0][name], msg=name)


@needs_cpp
def test_memory_holds_a_few_blocks_of_logits() -> None:
    """Allocations of a whole step, forward and backward, against the K N M logits that it never holds."""
    case = Case(K=40, N=512, Dc=4, Dz=4)
    arguments = case.arguments()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        solve(arguments, "cpp").backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    logits = case.K * case.N * case.N * 4
    assert 0 < allocated < logits / 4
