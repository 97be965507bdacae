"""bilinear_info_nce inside torch: torch.compile, autocast, torch.func, the dispatcher's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from info_nce_cases import CPP_MISSING, Case, assert_one_graph_for_changing_sizes, leaves, quietly, with_gradients
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.ops import _library
from avppc.ops.info_nce import cpu
from avppc.ops.info_nce.op import bilinear_info_nce
from avppc.ops.info_nce.problem import Problem, make_problem

pytestmark = pytest.mark.skipif(CPP_MISSING is not None, reason=f"no C++ kernels: {CPP_MISSING}")


def problem_of(case: Case) -> Problem:
    """The operators' arguments; their gradients are the business of autograd functions around them."""
    return Problem(*(x.detach() if isinstance(x, Tensor) else x for x in make_problem(**case.arguments())))


CASES = [Case(N=10, Dc=8, Dz=6), Case(N=10, extra=3, offset=1, ids=4), Case(N=10, symmetric=True, weighted=False)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_the_rows(case: Case) -> None:
    opcheck(torch.ops.avppc.info_nce_cpu, tuple(problem_of(case)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_of_the_mean(case: Case) -> None:
    opcheck(torch.ops.avppc.info_nce_cpu_mean, (*problem_of(case), torch.rand(3), True, True, case.weighted, True))


@pytest.mark.parametrize("needs", [(True, True, True, True), (False, True, False, False)], ids=str)
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_opcheck_of_the_backward(case: Case, needs: tuple[bool, ...]) -> None:
    problem = problem_of(case)
    _, _, row_lse, column_lse = torch.ops.avppc.info_nce_cpu(*problem)
    opcheck(torch.ops.avppc.info_nce_cpu_backward, (*problem, row_lse, column_lse, torch.rand(3, 10), *needs))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph_for_changing_sizes(reduction: str) -> None:
    assert_one_graph_for_changing_sizes("cpp", reduction)


def test_module_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = BilinearInfoNCE(8, 6, pairs=[(0, 1), (1, 0)], learn_scale=True, normalize="layer_norm")
    contexts, targets = torch.randn(2, 9, 8), torch.randn(2, 9, 6)
    function = torch.compile(module, fullgraph=True)
    expected = torch.autograd.grad(module(contexts, targets), list(module.parameters()))
    got = torch.autograd.grad(quietly(function, contexts, targets), list(module.parameters()))
    torch.testing.assert_close(got, expected)


def test_one_tensor_as_contexts_and_targets_compiles() -> None:
    torch._dynamo.reset()
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = torch.autograd.grad(bilinear_info_nce(x, x, scale=2.0), x)
    function = torch.compile(lambda y: bilinear_info_nce(y, y, scale=2.0), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(quietly(function, x), x), expected)


def test_a_compiled_graph_still_checks_the_pairs() -> None:
    torch._dynamo.reset()
    arguments = Case(N=6).arguments()

    def step(pairs: Tensor) -> Tensor:
        return bilinear_info_nce(arguments["contexts"], arguments["targets"], arguments["weights"], pairs)

    function = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert quietly(function, torch.tensor([[0, 0], [1, 1], [2, 0]])).shape == ()
    with pytest.raises(RuntimeError, match="pairs must hold context indices from 0 to 2, got 3"):
        quietly(function, torch.tensor([[0, 0], [1, 1], [3, 0]]))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(backend: str, dtype: torch.dtype) -> None:
    arguments = Case(N=30).arguments()
    with torch.autocast("cpu", dtype):
        loss = bilinear_info_nce(**arguments, backend=backend)
    got = with_gradients(loss, torch.tensor(1.0), arguments)
    cast = {
        name: value.detach().to(dtype).requires_grad_() for name, value in leaves(arguments).items() if name != "scale"
    }
    expected = bilinear_info_nce(**{**arguments, **cast}, backend=backend)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(got["loss"], expected.detach())
    assert all(got[name].dtype == torch.float32 for name in cast)
    for name, gradient in zip(cast, torch.autograd.grad(expected, list(cast.values())), strict=True):
        torch.testing.assert_close(got[name], gradient.float())


def test_autocast_leaves_float64_alone() -> None:
    arguments = {**Case(N=5).arguments(), "scale": 0.7}
    doubles = {name: arguments[name].detach().double() for name in ("contexts", "targets", "weights")}
    with torch.autocast("cpu", torch.bfloat16):
        assert bilinear_info_nce(**{**arguments, **doubles}).dtype == torch.float64


def test_auto_falls_back_under_torch_func_and_cpp_says_so() -> None:
    """vmap, grad and their like see through plain torch alone."""
    arguments = Case(N=6).arguments()
    contexts = arguments.pop("contexts")

    def loss(c: Tensor, backend: str = "auto") -> Tensor:
        return bilinear_info_nce(c, **arguments, backend=backend)

    torch.testing.assert_close(torch.func.grad(loss)(contexts), torch.autograd.grad(loss(contexts), contexts)[0])
    batch = torch.stack([contexts, 2 * contexts])
    torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(c) for c in batch]))
    with pytest.raises(RuntimeError, match=r"backend='cpp'\) has no torch.func transforms; use 'reference'"):
        torch.func.grad(loss)(contexts, "cpp")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused_not_wrong(reduction: str) -> None:
    arguments = Case(N=6).arguments()
    loss = bilinear_info_nce(**arguments, reduction=reduction, backend="cpp").sum()
    with pytest.raises(RuntimeError, match="has no second derivative; use backend='reference'"):
        torch.autograd.grad(loss, arguments["contexts"], create_graph=True)


def test_forward_mode_falls_back_and_cpp_says_so() -> None:
    arguments = Case(N=6).arguments()
    value = arguments.pop("contexts").detach()
    leaf = value.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(bilinear_info_nce(leaf, **arguments), leaf)
    with forward_ad.dual_level():
        dual = quietly(forward_ad.make_dual, value, value)
        tangent = forward_ad.unpack_dual(bilinear_info_nce(dual, **arguments)).tangent
        torch.testing.assert_close(tangent, (gradient * value).sum())
        with pytest.raises(RuntimeError, match=r"backend='cpp'\) has no forward-mode derivatives; use 'reference'"):
            bilinear_info_nce(dual, **arguments, backend="cpp")
        plain = bilinear_info_nce(value, **arguments, backend="cpp")  # no tangent to lose
    torch.testing.assert_close(plain, bilinear_info_nce(value, **arguments))


def test_each_backward_of_a_retained_graph_gives_gradients_of_its_own() -> None:
    arguments = Case(N=6).arguments()
    loss = bilinear_info_nce(**arguments, backend="cpp")
    first = torch.autograd.grad(loss, list(leaves(arguments).values()), retain_graph=True)
    expected = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.data.mul_(0)
    torch.testing.assert_close(torch.autograd.grad(loss, list(leaves(arguments).values()), retain_graph=True), expected)
    for _ in range(3):
        loss.backward(retain_graph=True)
    for leaf, gradient in zip(leaves(arguments).values(), expected, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * gradient)


@pytest.mark.parametrize("upstream", [1.0, -0.3])
def test_a_freed_graph_gives_its_gradients_away(upstream: float) -> None:
    """No second copy of the gradients; and they are the same as those of a retained graph."""
    arguments = Case(N=300, Dc=128, Dz=128).arguments()
    wanted = list(leaves(arguments).values())
    loss = bilinear_info_nce(**arguments, backend="cpp")
    expected = torch.autograd.grad(loss, wanted, torch.tensor(upstream), retain_graph=True)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        got = torch.autograd.grad(loss, wanted, torch.tensor(upstream))
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < min(gradient.nbytes for gradient in got if gradient.ndim > 0)
    torch.testing.assert_close(got, expected)


def test_batched_upstream_gradients() -> None:
    arguments = Case(N=6).arguments()
    loss = bilinear_info_nce(**arguments, backend="cpp")
    contexts = arguments["contexts"]
    (once,) = torch.autograd.grad(loss, contexts, retain_graph=True)
    upstream = torch.tensor([1.0, -2.0])
    (batch,) = torch.autograd.grad(loss, contexts, upstream, is_grads_batched=True)
    torch.testing.assert_close(batch, torch.stack([once, -2 * once]))


def test_changing_scales_share_a_graph() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda a, b, scale: bilinear_info_nce(a, b, scale=scale), fullgraph=True, dynamic=True, backend=counter
    )
    for n, scale in ((5, 0.5), (6, 0.7), (7, 2.5)):
        x, y = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(n)).unbind()
        torch.testing.assert_close(quietly(function, x, y, scale), bilinear_info_nce(x, y, scale=scale))
    assert counter.frame_count == 1


def test_module_compiles_for_dynamic_shapes() -> None:
    torch._dynamo.reset()
    module = BilinearInfoNCE(3, 4, scale=0.7, normalize="layer_norm")
    function = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 6):
        x, y = torch.randn(n, 3), torch.randn(n, 4)
        torch.testing.assert_close(quietly(function, x, y), module(x, y))


class Loss(torch.nn.Module):
    """bilinear_info_nce as torch.export takes it."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, contexts: Tensor, targets: Tensor) -> Any:
        return bilinear_info_nce(contexts, targets, scale=0.7, backend=self.backend)


@pytest.mark.parametrize("trace", ["export", "strict export", "make_fx"])
def test_traced_graphs_keep_their_gradients(trace: str) -> None:
    def traced(backend: str) -> Any:
        if trace == "make_fx":
            return make_fx(Loss(backend))(x.detach(), y)
        return torch.export.export(Loss(backend), (x.detach(), y), strict=trace.startswith("strict")).module()

    x, y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).unbind()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(bilinear_info_nce(x, y, scale=0.7), x)
    (got,) = torch.autograd.grad(quietly(traced, "auto")(x, y), x)
    torch.testing.assert_close(got, expected)
    with pytest.raises(Exception, match=r"backend='cpp'\) has no gradients in"):
        quietly(traced, "cpp")


def test_backends_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3, 2)
    with pytest.raises(
        TypeError, match="contexts must be float32, bfloat16 or float16 with backend='cpp', got float64"
    ):
        bilinear_info_nce(x.double(), x.double(), backend="cpp")
    monkeypatch.setattr(_library, "_find", lambda _: "it was not built")
    monkeypatch.setattr(cpu, "MISSING", "it was not built")
    with pytest.raises(RuntimeError, match=r"backend='cpp'\) needs the compiled extension: it was not built"):
        bilinear_info_nce(x, x, backend="cpp")
    assert bilinear_info_nce(x, x) > 1.0  # auto: the reference


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pairs": torch.tensor([[0, 0], [0, 2], [0, 0]])}, "pairs must hold target indices from 0 to 1, got 2"),
        ({"pairs": torch.zeros(0, 2, dtype=torch.int64)}, r"pairs must have shape \[K, 2\], got \[0, 2\]"),
        ({"positive_offset": 1}, "positive_offset must be from 0 to M - N = 0, got 1"),
        ({"contexts": torch.ones(3, 6, 8, dtype=torch.float64)}, "contexts must be float32, bfloat16 or float16"),
        ({"contexts": torch.ones(3, 0, 8)}, "must not be empty"),
        ({"weights": torch.ones(3, 8, 7)}, r"weights must have shape \[3, 8, 8\]"),
        ({"context_ids": torch.arange(6)}, "must be given together"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_the_operator_trusts_nobody(changes: dict[str, Any], text: str) -> None:
    """Called past the Python checks it still never reads out of bounds."""
    with pytest.raises(RuntimeError, match=text):
        torch.ops.avppc.info_nce_cpu(*problem_of(Case(N=6))._replace(**changes))
