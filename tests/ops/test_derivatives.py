"""Derivatives of every kind, of every operator of our own: right, or refused; never zeros that nobody asked for."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from info_nce_cases import CPP_MISSING, Case, quietly
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import avppc
from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.ops.clips import (
    cut_spans,
    cut_spans_reference,
    local_motion_frames,
    local_motion_frames_reference,
    motion_frames,
    motion_frames_reference,
)
from avppc.ops.info_nce.distributed import _GatherRows, _SumRows
from avppc.ops.info_nce.op import bilinear_info_nce
from avppc.ops.log_mel.config import LogMelConfig
from avppc.ops.log_mel.op import log_mel
from avppc.ops.log_mel.reference import log_mel_reference

pytestmark = [
    pytest.mark.skipif(CPP_MISSING is not None, reason=f"no C++ kernels: {CPP_MISSING}"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # of torch.func, about torch itself
]

Function = Callable[[Tensor], Tensor]

WAYS: dict[str, Callable[[Function, Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "grad of grad": lambda f, x: torch.func.grad(lambda y: torch.func.grad(f)(y).square().sum())(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
}


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns once compiled to a single graph."""
    torch._dynamo.reset()
    return quietly(torch.compile(function, fullgraph=True, backend="aot_eager"), *args)


@pytest.mark.parametrize(("way", "reduction"), [*((way, "mean") for way in WAYS), ("grad", "task")])
def test_torch_func_inside_compile(way: str, reduction: str) -> None:
    arguments = {**Case(N=4, Dc=3, Dz=3).arguments(), "reduction": reduction}
    contexts = arguments.pop("contexts").detach()

    def loss(c: Tensor, backend: str = "auto") -> Tensor:
        return bilinear_info_nce(c, **arguments, backend=backend).sum()

    expected = quietly(WAYS[way], lambda c: loss(c, "reference"), contexts)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(compiled(lambda c: WAYS[way](loss, c), contexts), expected)


@pytest.mark.parametrize("name", ["targets", "weights", "scale"])
def test_torch_func_inside_compile_for_each_argument(name: str) -> None:
    arguments = {
        key: value.detach() if isinstance(value, Tensor) else value
        for key, value in Case(N=4, Dc=3, Dz=3, symmetric=True).arguments().items()
    }

    def loss(value: Tensor, backend: str = "auto") -> Tensor:
        return bilinear_info_nce(**{**arguments, name: value}, backend=backend)

    expected = torch.func.grad(lambda value: loss(value, "reference"))(arguments[name])
    torch.testing.assert_close(compiled(torch.func.grad(loss), arguments[name]), expected)


def test_functional_call_of_the_module_inside_compile() -> None:
    module = BilinearInfoNCE(3, 3, pairs=[(0, 1), (1, 0)], learn_scale=True)
    x, y = torch.randn(2, 2, 5, 3, generator=torch.Generator().manual_seed(0)).unbind()
    parameters = dict(module.named_parameters())

    def gradients(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(lambda v: torch.func.functional_call(module, v, (x, y)))(values)

    expected = torch.autograd.grad(module(x, y), list(parameters.values()))
    got = compiled(gradients, {name: value.detach() for name, value in parameters.items()})
    torch.testing.assert_close(list(got.values()), list(expected))


def test_the_compiled_backend_refuses_torch_func_inside_compile() -> None:
    x = torch.ones(4, 3)
    with pytest.raises(Exception, match=r"backend='cpp'\) has no torch.func transforms; use 'reference'"):
        compiled(torch.func.grad(lambda c: bilinear_info_nce(c, x, backend="cpp")), x)


def test_a_tangent_passes_through_a_compiled_call() -> None:
    x, y, tangent = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(0)).unbind()
    torch._dynamo.reset()
    function = torch.compile(lambda c: bilinear_info_nce(c, y), fullgraph=True, backend="aot_eager")
    plain = function(x)  # the graph of a call without tangents is not taken for one with
    with forward_ad.dual_level():
        dual = quietly(forward_ad.make_dual, x, tangent)
        got = forward_ad.unpack_dual(quietly(function, dual))
    torch.testing.assert_close(got.primal, plain)
    torch.testing.assert_close(got.tangent, torch.func.jvp(lambda c: bilinear_info_nce(c, y), (x,), (tangent,))[1])


@pytest.mark.parametrize("trace", ["torch.jit.trace", "make_fx"])
def test_records_made_by_other_tracers_keep_their_gradients(trace: str) -> None:
    x, y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).unbind()

    def recorded(backend: str) -> Any:
        def loss(c: Tensor) -> Tensor:
            return bilinear_info_nce(c, y, backend=backend)

        return (
            make_fx(loss, pre_dispatch=True)(x) if trace == "make_fx" else torch.jit.trace(loss, x, check_trace=False)
        )

    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(quietly(recorded, "auto")(leaf), leaf)
    torch.testing.assert_close(got, torch.func.grad(lambda c: bilinear_info_nce(c, y))(x))
    with pytest.raises(RuntimeError, match=rf"backend='cpp'\) has no gradients in {trace}; use 'reference'"):
        quietly(recorded, "cpp")


def _spans(function: Any) -> Function:
    return lambda video: function(video, torch.tensor([0, 2, 1, 1]), 3).square().sum()


def _motion(function: Any) -> Function:
    return lambda video: function(video).sin().sum()


OTHERS: dict[str, tuple[Function, Function]] = {
    "cut_spans": (_spans(cut_spans), _spans(cut_spans_reference)),
    "motion_frames": (_motion(motion_frames), _motion(motion_frames_reference)),
    "local_motion_frames": (
        _motion(lambda video: local_motion_frames(video, 1)),
        _motion(lambda video: local_motion_frames_reference(video, 1)),
    ),
    "log_mel": (lambda x: log_mel(x.flatten(1)).sum(), lambda x: log_mel_reference(x.flatten(1), LogMelConfig()).sum()),
}
"""Functions of [2, 5, 16, 16] with operators of our own in them, and their definitions."""


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("way", ["grad", "jvp"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_operators(name: str, way: str, compiling: bool) -> None:
    function, reference = OTHERS[name]
    x = torch.rand(2, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = quietly(WAYS[way], reference, x)
    assert expected.abs().max() > 1e-3
    run = compiled if compiling else quietly
    torch.testing.assert_close(run(lambda y: WAYS[way](function, y), x), expected)


def test_spans_pass_gradients_on() -> None:
    function, reference = OTHERS["cut_spans"]
    x = torch.rand(2, 5, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(function(x), x), torch.autograd.grad(reference(x), x))


def test_log_mel_refuses_derivatives_that_its_kernels_do_not_have() -> None:
    x = torch.rand(1, 800)
    with pytest.raises(
        RuntimeError, match=r"log_mel\(backend='cpp'\) has no derivatives by torch.func; use 'reference'"
    ):
        quietly(torch.func.jvp, lambda y: log_mel(y, backend="cpp"), (x,), (x,))
    with forward_ad.dual_level():
        dual = quietly(forward_ad.make_dual, x, x)
        with pytest.raises(RuntimeError, match=r"log_mel\(backend='cpp'\) has no forward-mode derivatives"):
            log_mel(dual, backend="cpp")


def autograd_functions() -> set[Any]:
    """All of the package's autograd functions."""
    found = set()
    for module in pkgutil.walk_packages(avppc.__path__, "avppc."):
        if ".ops." in module.name or ".models." in module.name or ".tasks." in module.name:
            for value in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(value) and issubclass(value, torch.autograd.Function):
                    found.add(value)
    return found


DIFFERENTIABLE_TWICE = (_GatherRows, _SumRows)  # each other's backward: the tests of gather="all" differentiate twice


def test_every_other_autograd_function_refuses_a_second_derivative() -> None:
    functions = autograd_functions()
    assert len(functions) >= 6, "some were not found"
    for function in functions:
        if function in DIFFERENTIABLE_TWICE:
            continue
        upstream = [None] * (len(inspect.signature(function.backward).parameters) - 1)
        with torch.enable_grad(), pytest.raises(RuntimeError, match="has no second derivative; "):
            function.backward(SimpleNamespace(function="a function", backend="a backend"), *upstream)


@pytest.mark.parametrize("reduction", ["mean", "task", "none"])
def test_an_undefined_upstream_gradient_is_no_gradient(reduction: str) -> None:
    """As of a model whose auxiliary loss alone is used, under DistributedDataParallel."""

    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> None:
            return None

    arguments = Case(N=6).arguments()
    contexts = arguments["contexts"]
    loss = bilinear_info_nce(**arguments, backend="cpp", reduction=reduction).sum()
    (Undefined.apply(loss) + contexts.sum()).backward()
    torch.testing.assert_close(contexts.grad, torch.ones_like(contexts))
