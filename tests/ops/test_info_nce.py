"""bilinear_info_nce: values and gradients of each backend against float64, over shapes, dtypes and options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from info_nce_cases import (
    CPP_MISSING,
    SHORT,
    Case,
    as_double,
    assert_as_good_as,
    leaves,
    plain_rows,
    plain_terms,
    reduced,
    with_gradients,
)
from torch import Tensor

from avppc.ops import _library
from avppc.ops.info_nce import bilinear_info_nce
from avppc.ops.info_nce_module import BilinearInfoNCE

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
needs_cpp = pytest.mark.skipif(CPP_MISSING is not None, reason=f"no C++ kernels: {CPP_MISSING}")
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
REDUCTIONS = ("mean", "task", "none")

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
]
STDS = [Case(N=128, Dc=64, Dz=64, std=std, symmetric=s) for std in (4.0, 16.0, 64.0) for s in (False, True)]


def in_dtypes(cases: list[Case], *dtypes: torch.dtype) -> list[Case]:
    return [dataclasses.replace(case, dtype=dtype) for case in cases for dtype in dtypes]


def solve(arguments: dict[str, Any], backend: str, **options: Any) -> Any:
    return bilinear_info_nce(**arguments, backend=backend, **options)


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


def set_level(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the kernels use this instruction set and no better one; skips where the machine lacks it."""
    monkeypatch.setenv("AVPPC_CPU_LEVEL", level)
    try:
        _library.build_info()
    except RuntimeError as error:
        pytest.skip(str(error))


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout_of_the_inputs_does_not_matter(backend: str) -> None:
    case = Case(N=33, extra=4, offset=2, Dc=24, Dz=24, ids=7)
    arguments = case.arguments()
    expected = with_gradients(solve(arguments, backend), torch.tensor(1.5), arguments)
    strided = dict(arguments)
    for name in ("contexts", "targets", "weights"):
        value = arguments[name].detach()
        # transposed storage, and every second element of a wider one
        wide = torch.full((*value.mT.shape[:-1], 2 * value.shape[1]), torch.nan)
        wide[..., ::2] = value.mT
        strided[name] = wide[..., ::2].mT.requires_grad_()
        assert not strided[name].is_contiguous()
    for name in ("context_ids", "target_ids"):
        strided[name] = torch.stack([arguments[name], arguments[name] + 1], 1)[:, 0]
    got = with_gradients(solve(strided, backend), torch.tensor(1.5), strided)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs_get_the_sum_of_gradients(backend: str) -> None:
    arguments = Case(N=9, K=2).arguments()
    one = arguments["contexts"].detach()[:1].requires_grad_()
    arguments["contexts"] = one.expand(3, 9, 8)
    got = torch.autograd.grad(solve(arguments, backend), one)[0]
    copies = one.detach().repeat(3, 1, 1).requires_grad_()
    expected = torch.autograd.grad(solve({**arguments, "contexts": copies}, backend), copies)[0]
    torch.testing.assert_close(got, expected.sum(0, keepdim=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_may_be_contexts_and_targets(backend: str) -> None:
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    got = torch.autograd.grad(bilinear_info_nce(x, x, backend=backend), x)[0]
    da, db = torch.autograd.grad(bilinear_info_nce(a, b, backend=backend), (a, b))
    torch.testing.assert_close(got, da + db)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", [("contexts",), ("targets", "scale"), ("weights",), ("scale",)], ids="+".join)
def test_only_what_requires_a_gradient_gets_one(backend: str, reduction: str, wanted: tuple[str, ...]) -> None:
    arguments = Case(N=20).arguments()
    upstream = torch.randn(reduced(torch.zeros(3, 20), reduction).shape, generator=torch.Generator().manual_seed(0))
    expected = with_gradients(solve(arguments, backend, reduction=reduction), upstream, arguments)
    for name, value in leaves(arguments).items():
        value.requires_grad_(name in wanted)
    solve(arguments, backend, reduction=reduction).backward(upstream)
    for name, value in leaves(arguments).items():
        if name in wanted:
            torch.testing.assert_close(value.grad, expected[name])
        else:
            assert value.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_may_be_walked_twice(backend: str) -> None:
    arguments = Case(N=20).arguments()
    loss = solve(arguments, backend)
    wanted = list(leaves(arguments).values())
    once = torch.autograd.grad(loss, wanted, torch.tensor(1.0), retain_graph=True)
    twice = torch.autograd.grad(loss, wanted, torch.tensor(-2.0))
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(-2 * a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_the_loss_is_the_same(backend: str) -> None:
    arguments = Case(N=200).arguments()
    loss = solve(arguments, backend)
    with torch.no_grad():
        torch.testing.assert_close(solve(arguments, backend), loss.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_and_contexts_that_no_subtask_uses_get_zeros(backend: str) -> None:
    arguments = {**Case(N=20, K=1).arguments(), "pairs": [(1, 0)]}
    got = with_gradients(solve(arguments, backend), torch.tensor(1.0), arguments)
    assert got["contexts"][[0, 2]].abs().max() == 0
    assert got["targets"][1].abs().max() == 0
    assert got["contexts"][1].abs().max() > 0


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Every freshly allocated tensor is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@needs_cpp
@pytest.mark.parametrize("dtype", [F32, BF16], ids=SHORT.get)
@pytest.mark.parametrize("case", [SHAPES[6], OPTIONS[5], OPTIONS[8]], ids=str)
def test_nothing_stale_is_read(case: Case, dtype: torch.dtype, nan_filled_memory: None) -> None:
    arguments = dataclasses.replace(case, dtype=dtype).arguments()
    for reduction in ("mean", "none"):
        loss = solve(arguments, "cpp", reduction=reduction)
        got = with_gradients(loss, torch.ones_like(loss), arguments)
        assert all(torch.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_subtasks_of_weight_zero_leave_no_trace(backend: str, symmetric: bool, nan_filled_memory: None) -> None:
    """Target 1 has the sub-tasks 1 and 3 alone, both of weight 0; the others are as if these were not there."""
    torch.manual_seed(0)
    pairs, weights = [(0, 0), (1, 1), (2, 0), (0, 1)], (1.0, 0.0, 0.5, 0.0)
    contexts, targets = torch.randn(3, 150, 8, requires_grad=True), torch.randn(2, 150, 8, requires_grad=True)
    module = BilinearInfoNCE(8, 8, pairs=pairs, task_weights=weights, symmetric=symmetric, backend=backend)
    module(contexts, targets).backward()
    few = BilinearInfoNCE(8, 8, pairs=pairs[::2], task_weights=weights[::2], symmetric=symmetric, backend=backend)
    expected = torch.autograd.grad(few(contexts, targets), (contexts, targets, few.weight))
    torch.testing.assert_close(contexts.grad, expected[0])
    torch.testing.assert_close(targets.grad, expected[1])
    torch.testing.assert_close(module.weight.grad[::2], expected[2])
    assert not module.weight.grad[1::2].any()
    assert not targets.grad[1].any()


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
    with torch.profiler.profile(profile_memory=True) as profile:
        solve(arguments, "cpp").backward()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    logits = case.K * case.N * case.N * 4
    assert 0 < allocated < logits / 4


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "case",
    [
        Case(K=2, N=3, extra=2, offset=1, Dc=3, Dz=2),
        Case(K=2, N=4, Dc=3, Dz=2, symmetric=True, ids=2),
    ],
    ids=str,
)
def test_reference_gradients_are_those_of_finite_differences(case: Case, reduction: str) -> None:
    arguments = as_double(case.arguments())
    names = list(leaves(arguments))

    def loss(*values: Tensor) -> Tensor:
        return solve({**arguments, **dict(zip(names, values, strict=True))}, "reference", reduction=reduction)

    assert torch.autograd.gradcheck(loss, tuple(leaves(arguments).values()))
