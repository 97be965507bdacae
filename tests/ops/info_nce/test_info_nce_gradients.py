"""Gradients of bilinear_info_nce: who gets one, in which layout, and that nothing stale is in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from info_nce_cases import BACKENDS, SHORT, Case, as_double, leaves, needs_cpp, reduced, solve, with_gradients
from torch import Tensor

from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.ops.info_nce.op import REDUCTIONS, bilinear_info_nce


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
def test_small_gradients_in_float16_survive_until_upstream_scales_them(backend: str) -> None:
    """As torch.amp.GradScaler does: most of the unscaled ones would be 0 or have few digits."""
    arguments = Case(K=42, N=300, Dc=16, Dz=16, std=0.1, dtype=torch.float16).arguments()
    upstream = torch.tensor(65536.0)
    exact = as_double(arguments)
    expected = with_gradients(solve(exact, "reference"), upstream.double(), exact)
    loss = solve(arguments, backend)
    for retain_graph in (True, False):  # the last time what was saved may be changed
        got = with_gradients(loss, upstream, arguments, retain_graph=retain_graph)
        for name, value in got.items():
            deviation = torch.linalg.vector_norm(value.double() - expected[name])
            assert deviation < 6e-4 * torch.linalg.vector_norm(expected[name]), name


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize(
    "case",
    [
        Case(N=128, extra=129, offset=128, Dc=123, Dz=123),
        Case(N=127, symmetric=True, ids=20),
        Case(N=127, weighted=False, Dc=123, Dz=123),
    ],
    ids=str,
)
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
