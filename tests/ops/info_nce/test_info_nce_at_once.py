"""Plain calls go straight to the C++ operator of the mean: the same bits as by the checks one by one, and no fewer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from info_nce_cases import CPP_MISSING, Case, leaves, quietly
from torch import Tensor
from torch.library import opcheck

from avppc.losses import bilinear_info_nce as module_file
from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.ops.info_nce import cpu, op

pytestmark = pytest.mark.skipif(CPP_MISSING is not None, reason=f"no C++ kernels: {CPP_MISSING}")


def lone(**changes: Any) -> dict[str, Any]:
    """A single sub-task, its sets as matrices."""
    g = torch.Generator().manual_seed(0)
    contexts, targets, weights = (torch.randn(shape, generator=g) for shape in ((9, 5), (9, 7), (7, 5)))
    tensors = {"contexts": contexts, "targets": targets, "weights": weights}
    return {**{name: value.requires_grad_() for name, value in tensors.items()}, **changes}


CALLS = {
    "matrices": lone(),
    "scale learned": lone(scale=torch.tensor(0.7, requires_grad=True)),
    "some without gradient": lone(contexts=torch.ones(9, 5), weights=torch.ones(7, 5)),
    "no weights, symmetric": lone(targets=torch.randn(9, 5), weights=None, symmetric=True, scale=2),
    "offset": lone(contexts=torch.randn(6, 5, requires_grad=True), positive_offset=2),
    "no gradient at all": lone(contexts=torch.ones(9, 5), targets=torch.ones(9, 7), weights=torch.ones(7, 5)),
    "pairs in a list": Case(N=10, Dc=8, Dz=6).arguments(),
    "pairs in a tensor": {**Case(N=10).arguments(), "pairs": torch.tensor([[0, 0], [1, 1], [2, 0]])},
    "own pairs": {**Case(K=2, N=10).arguments(), "contexts": torch.randn(2, 10, 8), "pairs": None},
    "bfloat16": Case(N=10, dtype=torch.bfloat16).arguments(),
    "float16": Case(N=10, dtype=torch.float16).arguments(),
    "columns apart": lone(contexts=torch.randn(5, 9).T.requires_grad_()),
}


def found(arguments: dict[str, Any]) -> list[Tensor]:
    """The loss, the statistics, and the gradients."""
    loss, stats = op.bilinear_info_nce(**arguments, return_stats=True)
    wanted = [value for value in arguments.values() if isinstance(value, Tensor) and value.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, torch.tensor(-1.5)) if wanted else ()
    assert loss.requires_grad == bool(wanted)
    assert not any(value.requires_grad for value in stats)
    return [loss.detach(), *stats, *gradients]


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a plain call must not be looked at argument by argument")


@pytest.mark.parametrize("name", CALLS)
def test_plain_calls_go_straight_to_the_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as careful:
        careful.setattr(cpu, "info_nce_cpu_at_once", lambda *_: None)
        expected = found(CALLS[name])
    monkeypatch.setattr(op, "make_problem", refuse)
    torch.testing.assert_close(found(CALLS[name]), expected, rtol=0, atol=0)


def test_so_do_those_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    contexts, targets = torch.randn(9, 5), torch.randn(9, 7)
    loss_fn = BilinearInfoNCE(5, 7, learn_scale=True, return_stats=True)
    outcomes = []
    for name in ("make_problem", "solve_at_once"):  # which of the two is out of use
        with monkeypatch.context() as only:
            only.setattr(module_file, name, refuse if name == "make_problem" else lambda *_: None)
            loss, stats = loss_fn(contexts, targets)
            outcomes.append([loss.detach(), *stats, *torch.autograd.grad(loss, list(loss_fn.parameters()))])
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"reduction": "none"},
        {"backend": "reference"},
        {"context_ids": torch.arange(9), "target_ids": torch.arange(9)},
        {"weights": "none"},
        {"scale": True},
        {"positive_offset": True},
        {"symmetric": 1},
        {"contexts": None},
        {"weights": [[1.0]]},
        {"targets": torch.ones(9, 7).double()},
        {"targets": torch.ones(9, 7, device="meta")},
        {"targets": torch.ones(9, 7).to_sparse()},
        {"pairs": torch.zeros(1, 2, dtype=torch.int32)},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_other_calls_are_looked_at(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "make_problem", refuse)
    with pytest.raises(AssertionError, match="argument by argument"):
        op.bilinear_info_nce(**lone(**changes))


def test_so_are_plain_arguments_where_something_else_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = Case(N=6).arguments()
    contexts = leaves(arguments)["contexts"].detach()
    arguments["contexts"] = contexts
    monkeypatch.setattr(op, "make_problem", refuse)
    looked_at = pytest.raises(AssertionError, match="argument by argument")
    with torch.autocast("cpu", torch.bfloat16), looked_at:
        op.bilinear_info_nce(**arguments)
    with looked_at:
        torch.func.grad(lambda scale: op.bilinear_info_nce(**{**arguments, "scale": scale}))(torch.tensor(1.0))
    with looked_at:
        quietly(torch.jit.trace, lambda c: op.bilinear_info_nce(**{**arguments, "contexts": c}), contexts)


@pytest.mark.parametrize("name", ["matrices", "own pairs", "no weights, symmetric"])
def test_opcheck_of_arguments_as_they_come(name: str) -> None:
    arguments = CALLS[name]
    tensors = [arguments[field] for field in ("contexts", "targets", "weights")]
    plain = [value if value is None else value.detach() for value in tensors]
    settings = (None, torch.tensor(0.7), 0, None, None, arguments.get("symmetric", False), None)
    opcheck(torch.ops.avppc.info_nce_cpu_mean, (*plain, *settings, True, True, plain[2] is not None, True))
