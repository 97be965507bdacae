"""Any arguments for the InfoNCE losses: a right result or a refusal that names one of them, whatever comes."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import torch
from hostile import REFUSED, anything, call, examples, laid_out, near, scalars
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from avppc import SUBTASKS, BilinearInfoNCE, InfoNCEStats, PermutativeInfoNCE, bilinear_info_nce

SETTINGS, PERMUTATIVE_SETTINGS = (
    tuple(inspect.signature(module).parameters) for module in (BilinearInfoNCE, PermutativeInfoNCE)
)
ELEMENT_NAMES = ("v_past", "v_future", "a_past", "a_future")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Valid arguments of bilinear_info_nce, of every layout, dtype and size from 1 on."""
    C, U, N, extra, Dc, Dz = (draw(st.integers(low, 4)) for low in (1, 1, 1, 0, 1, 1))
    weighted, single, ids = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    K = draw(st.integers(1, 4))
    Dc = Dc if weighted else Dz
    C, U, K = (1, 1, 1) if single else (C, U, K)
    shapes = {"contexts": (C, N, Dc), "targets": (U, N + extra, Dz), "weights": (K, Dz, Dc)}
    found: dict[str, Any] = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        value = normal(*(shape[1:] if single else shape), seed=seed).to(dtype)
        found[name] = draw(laid_out(value))
        if draw(st.booleans()):  # rows that share their memory
            found[name] = found[name][..., :1, :].expand_as(found[name])
        found[name].requires_grad_(draw(st.booleans()))
    if not weighted:
        found["weights"] = None
    pairs = [(draw(st.integers(0, C - 1)), draw(st.integers(0, U - 1))) for _ in range(K)]
    found["pairs"] = draw(st.sampled_from([pairs, torch.tensor(pairs), torch.tensor(pairs, dtype=torch.int32).numpy()]))
    if single and draw(st.booleans()):
        found["pairs"] = None
    found["scale"] = draw(st.sampled_from([1.0, 0, -2.5, torch.tensor(0.5), torch.tensor(2.0).bfloat16()]))
    found["symmetric"] = extra == 0 and draw(st.booleans())
    found["positive_offset"] = 0 if found["symmetric"] else draw(st.integers(0, extra))
    if ids:
        rows = torch.tensor([draw(st.integers(-3, 3)) for _ in range(2 * N + extra)])
        found["context_ids"], found["target_ids"] = rows[:N].to(torch.int16), rows[N:]
    found["reduction"] = draw(st.sampled_from(["mean", "task", "none"]))
    found["backend"] = draw(st.sampled_from(["auto", "reference"]))
    found["return_stats"] = draw(st.booleans())
    return found


def tasks_of(arguments: dict[str, Any]) -> int:
    return 1 if arguments["pairs"] is None else len(arguments["pairs"])


def expected(arguments: dict[str, Any]) -> Tensor:
    """[K, N] losses, straight from the definition in float64, row by row."""
    c, z = (value if value.ndim == 3 else value[None] for value in (arguments[n] for n in ("contexts", "targets")))
    W = arguments["weights"]
    pairs = [(0, 0)] if arguments["pairs"] is None else [tuple(map(int, pair)) for pair in arguments["pairs"]]
    losses = []
    for k, (context, target) in enumerate(pairs):
        q = c[context].detach().double()
        if W is not None:
            q = q @ (W if W.ndim == 3 else W[None])[k].detach().double().mT
        s = float(arguments["scale"]) * q @ z[target].detach().double().mT
        offset = arguments["positive_offset"]
        positive = torch.eye(*s.shape, dtype=torch.bool).roll(offset, 1)
        if "context_ids" in arguments:
            same = arguments["context_ids"][:, None] == arguments["target_ids"]
            s = s.masked_fill(same & ~positive, -torch.inf)
        loss = s.logsumexp(1) - s[positive]
        losses.append((loss + s.logsumexp(0) - s[positive]) / 2 if arguments["symmetric"] else loss)
    return torch.stack(losses)


def test_overloads_take_the_arguments_of_the_function() -> None:
    """So type checkers know the arguments that there are; the last one's type says what comes back."""
    *wanted, return_stats = inspect.signature(bilinear_info_nce).parameters.values()
    overloads = [inspect.signature(one).parameters for one in typing.get_overloads(bilinear_info_nce)]
    assert [list(parameters.values())[:-1] for parameters in overloads] == [wanted] * 3
    types = [parameters[return_stats.name].annotation for parameters in overloads]
    assert types == ["Literal[False]", "Literal[True]", "bool"]


@examples(150)
@given(problems())
def test_valid_arguments_give_the_loss_of_the_definition(arguments: dict[str, Any]) -> None:
    result = call(bilinear_info_nce, arguments)
    loss, stats = result if arguments["return_stats"] else (result, None)
    rows = expected(arguments)
    truth = {"mean": rows.mean(), "task": rows.mean(1), "none": rows}[arguments["reduction"]]
    dtype = arguments["contexts"].dtype
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 5e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    torch.testing.assert_close(loss.double(), truth, atol=tolerance, rtol=tolerance)
    if loss.requires_grad:
        loss.sum().backward()
        for value in arguments.values():
            if isinstance(value, Tensor) and value.is_leaf and value.requires_grad:
                assert value.grad is not None
                assert value.grad.isfinite().all()
    if stats is not None:
        assert isinstance(stats, InfoNCEStats)
        assert all(value.shape == (tasks_of(arguments),) and not value.requires_grad for value in stats)


@examples(400)
@given(st.data())
def test_one_strange_argument_is_refused_by_name(data: st.DataObject) -> None:
    arguments = data.draw(problems())
    name = data.draw(st.sampled_from(sorted(arguments | dict.fromkeys(["context_ids", "target_ids", "positives"]))))
    arguments[name] = data.draw(near(arguments.get(name)))
    result = call(bilinear_info_nce, arguments)
    if result is not REFUSED:
        loss = result[0] if arguments["return_stats"] is True else result
        shape = {"mean": (), "task": (tasks_of(arguments),), "none": (tasks_of(arguments), -1)}[arguments["reduction"]]
        assert loss.ndim == len(shape)
        assert shape[:1] == tuple(loss.shape[:1])


@examples(100)
@given(st.data())
def test_all_arguments_strange_at_once(data: st.DataObject) -> None:
    names = [*data.draw(problems()), "context_ids", "target_ids", "positives"]
    call(bilinear_info_nce, {name: data.draw(anything()) for name in names})


@examples(60)
@given(problems(), st.sampled_from([float("nan"), float("inf"), 1e38, 1e-40]), st.sampled_from(["contexts", "targets"]))
def test_values_that_are_not_finite_end_in_no_crash(arguments: dict[str, Any], value: float, name: str) -> None:
    with torch.no_grad():
        arguments[name] = arguments[name].detach().clone(memory_format=torch.contiguous_format)
        arguments[name].view(-1)[0] = value
    call(bilinear_info_nce, arguments)


@examples(250)
@given(st.data())
def test_one_strange_setting_of_the_module_is_refused_by_name(data: st.DataObject) -> None:
    settings: dict[str, Any] = {"context_dim": 3, "target_dim": data.draw(st.sampled_from([2, 3]))}
    name = data.draw(st.sampled_from(SETTINGS))
    settings[name] = data.draw(anything())
    with torch.device("meta"):  # large ones are right, too
        module = call(BilinearInfoNCE, settings)
    if module is not REFUSED and module.pairs is None and module.tasks * module.context_dim * module.target_dim < 100:
        arguments = {"contexts": torch.ones(module.tasks, 2, module.context_dim, device="meta"),
                     "targets": torch.ones(module.tasks, 2, module.target_dim, device="meta")}  # fmt: skip
        assert call(module, arguments) is not REFUSED or module.backend in ("cpp", "triton")


@examples(150)
@given(st.data())
def test_one_strange_argument_of_the_module_is_refused_by_name(data: st.DataObject) -> None:
    module = BilinearInfoNCE(3, 2, normalize=data.draw(st.sampled_from(["none", "layer_norm"])))
    arguments: dict[str, Any] = {"contexts": torch.ones(4, 3), "targets": torch.ones(4, 2), "return_stats": False}
    name = data.draw(st.sampled_from([*arguments, "context_ids", "target_ids", "positives", "scale"]))
    arguments[name] = data.draw(near(arguments.get(name)))
    call(module, arguments, names=("contexts",))


@examples(250)
@given(st.data())
def test_one_strange_setting_of_the_permutative_loss_is_refused_by_name(data: st.DataObject) -> None:
    settings: dict[str, Any] = {"dim": 3}
    name = data.draw(st.sampled_from(PERMUTATIVE_SETTINGS))
    lists = st.lists(st.sampled_from([*SUBTASKS[:3], "Vp->Vf", "Vp,Ap->Vf", "Vp,Vp->Vf", None, 3, ("Vp",)]), max_size=4)
    weights = st.dictionaries(st.sampled_from(["Vp->Vf", "x", 3]), st.sampled_from([1.0, 0, -1, None, "1"]), max_size=2)
    settings[name] = data.draw(anything() | lists | weights)
    with torch.device("meta"):
        call(PermutativeInfoNCE, settings)


@examples(150)
@given(st.data())
def test_one_strange_argument_of_the_permutative_loss_is_refused_by_name(data: st.DataObject) -> None:
    module = PermutativeInfoNCE(4, subtasks=SUBTASKS[:2], swapped_negatives=data.draw(st.booleans()))
    arguments: dict[str, Any] = {name: normal(3, 4, seed=seed) for seed, name in enumerate(ELEMENT_NAMES)}
    name = data.draw(st.sampled_from([*ELEMENT_NAMES, "clip_ids", "return_stats"]))
    arguments[name] = data.draw(near(arguments.get(name)))
    result = call(module, arguments)
    if result is not REFUSED and not isinstance(result, tuple):
        assert result.shape == ()


@examples(60)
@given(st.lists(scalars(), max_size=2))
def test_unknown_options_are_refused_by_name(values: list[Any]) -> None:
    assert call(BilinearInfoNCE, {"context_dim": 2, "target_dim": 2, "colour": values}) is REFUSED
    assert call(PermutativeInfoNCE, {"dim": 2, "colour": values}) is REFUSED
