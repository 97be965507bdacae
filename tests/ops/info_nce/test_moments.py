"""moment_info_nce: values and gradients against an independent definition in float64, options, errors, transforms."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import BACKENDS, needs_cpp
from torch import Tensor
from torch.library import opcheck

from avppc.ops.info_nce import moments
from avppc.ops.info_nce.cpu import info_nce_cpu_mean
from avppc.ops.info_nce.moments import CANDIDATES, moment_info_nce

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # of torch.func, about torch itself
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning"),  # of torch.compile, likewise
]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCES = {F32: 2e-6, BF16: 2e-2, F16: 3e-3}


class Case(NamedTuple):
    """Sizes and options of a call; `candidates` None: all kinds in one call."""

    N: int = 6
    Tc: int = 3
    Tz: int = 4
    extra: int = 0
    offset: int = 0
    Dc: int = 5
    Dz: int = 7
    K: int = 6
    candidates: str | None = None
    ids: bool = False
    weighted: bool = True
    dtype: torch.dtype = F32

    def arguments(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        def integers(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        M, width = self.N + self.extra, self.Dz if self.weighted else self.Dc
        kinds = itertools.cycle([self.candidates] if self.candidates else CANDIDATES)
        return {
            "contexts": normal(3, self.N, self.Tc, self.Dc),
            "targets": normal(2, M, self.Tz, width),
            "weights": normal(self.K, width, self.Dc) if self.weighted else None,
            "pairs": torch.stack([integers(3, self.K), integers(2, self.K)], 1),
            "candidates": [kind for kind, _ in zip(kinds, range(self.K), strict=False)],
            "shifts": integers(self.Tz - self.Tc + 1, self.K).tolist(),
            "scale": torch.tensor(0.7),
            "positive_offset": self.offset,
            "context_ids": integers(4, self.N) if self.ids else None,
            "target_ids": integers(4, M) if self.ids else None,
        }


CASES = [
    Case(),
    Case(N=1, Tc=1, Tz=1),
    Case(N=1, Tc=4, Tz=4, candidates="clip"),
    Case(N=2, Tc=1, Tz=6, candidates="both"),
    Case(N=18, Tc=7, Tz=7, extra=3, offset=2, Dc=33, Dz=40, ids=True),
    Case(N=70, Tc=1, Tz=5, ids=True),
    Case(N=17, Tc=12, Tz=12, candidates="clip", K=2),
    Case(N=40, Tc=4, Tz=5, candidates="moment", K=2, ids=True),
    Case(N=25, Tc=5, Tz=9, extra=9, offset=9, candidates="both", K=2, ids=True, weighted=False),
    Case(N=12, dtype=BF16, ids=True),
    Case(N=12, dtype=F16, ids=True),
]


def as_double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }


def plain_rows(a: dict[str, Any]) -> Tensor:
    """Losses [K, N, Tc], row by row: what the positive is told from, in so many words."""
    tasks = []
    for k, (context, target) in enumerate(a["pairs"].tolist()):
        c, z = a["contexts"][context], a["targets"][target]
        q = c if a["weights"] is None else c @ a["weights"][k].T
        kind, shift, offset = a["candidates"][k], a["shifts"][k], a["positive_offset"]
        losses = []
        for n, t in itertools.product(range(q.shape[0]), range(q.shape[1])):
            own, moment = n + offset, t + shift
            others = [(own, u) for u in range(z.shape[1]) if u != moment] if kind != "moment" else []
            if kind != "clip":
                same = (
                    set()
                    if a["context_ids"] is None
                    else set((a["target_ids"] == a["context_ids"][n]).nonzero()[:, 0].tolist())
                )
                others += [(m, moment) for m in range(z.shape[0]) if m != own and m not in same]
            columns = torch.stack([z[own, moment], *(z[place] for place in others)])
            s = a["scale"] * (columns @ q[n, t])
            losses.append(s.logsumexp(0) - s[0])
        tasks.append(torch.stack(losses).view(q.shape[:2]))
    return torch.stack(tasks)


def leaves(arguments: dict[str, Any]) -> list[Tensor]:
    names = ("contexts", "targets", "weights", "scale")
    return [arguments[name].requires_grad_() for name in names if arguments[name] is not None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"N{case.N}-T{case.Tc}-{case.Tz}-{case.candidates}-{case.dtype}"[:40]
)
def test_it_is_its_definition(case: Case, backend: str) -> None:
    truth_arguments = as_double(case.arguments())
    upstreams = {"mean": torch.tensor(1.3), "task": torch.rand(case.K), "none": torch.rand(case.K, case.N, case.Tc)}
    wanted = leaves(truth_arguments)
    truth = plain_rows(truth_arguments)
    reduced = {"none": truth, "task": truth.mean((1, 2)), "mean": truth.mean()}
    for reduction, upstream in upstreams.items():
        arguments = case.arguments()
        inputs = leaves(arguments)
        loss, stats = moment_info_nce(**arguments, reduction=reduction, backend=backend, return_stats=True)
        gradients = torch.autograd.grad(loss, inputs, upstream)
        expected = torch.autograd.grad(reduced[reduction], wanted, upstream.double(), retain_graph=True)
        assert (loss.dtype, loss.shape) == (F32, reduced[reduction].shape)
        for got, right in zip(
            (loss, stats.task_loss, *gradients), (reduced[reduction], reduced["task"], *expected), strict=True
        ):
            error = (got.double() - right).abs().max()
            assert error <= TOLERANCES[case.dtype] * right.abs().max().clamp_min(0.1), reduction


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_counts_positives_above_every_candidate(backend: str) -> None:
    z = torch.eye(4).expand(3, 4, 4)  # each moment of each clip alike: across clips the positive is never alone
    stats = moment_info_nce(z, z, backend=backend, return_stats=True)[1]
    assert stats.accuracy.tolist() == [1.0]
    for candidates in ("moment", "both"):
        assert moment_info_nce(z, z, candidates=candidates, backend=backend, return_stats=True)[
            1
        ].accuracy.tolist() == [0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_context_of_one_moment_predicts_the_moment_it_is_told(backend: str) -> None:
    """K weights for the K moments of a target: the form of "several moments of the future, a W each"."""
    c, z, w = torch.randn(5, 1, 4), torch.randn(5, 3, 6), torch.randn(3, 6, 4)
    pairs = [(0, 0)] * 3
    rows = moment_info_nce(c, z, w, pairs, candidates="moment", shifts=[0, 1, 2], reduction="none", backend=backend)
    for t in range(3):
        s = (c[:, 0] @ w[t].T) @ z[:, t].T
        assert torch.allclose(rows[t, :, 0], F.cross_entropy(s, torch.arange(5), reduction="none"), atol=1e-5)


@needs_cpp
def test_the_same_call_gives_the_same_bits() -> None:
    arguments = Case(N=90, Tc=6, Tz=6, Dc=24, Dz=24, K=12).arguments()
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        inputs = leaves(arguments)
        loss = moment_info_nce(**arguments, backend="cpp")
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:1], other[:1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))


@needs_cpp
def test_operators_pass_opcheck_and_compile_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(*call: Any) -> Any:
        seen.extend(call)
        return info_nce_cpu_mean(*call)

    monkeypatch.setattr(moments, "info_nce_cpu_mean", spy)
    moment_info_nce(**Case(ids=True).arguments(), backend="cpp")
    problem, shares = seen
    plain = [value.detach() if isinstance(value, Tensor) else value for value in problem]
    opcheck(torch.ops.avppc.info_nce_moments_cpu.default, tuple(plain), test_utils=("test_schema", "test_faketensor"))
    opcheck(
        torch.ops.avppc.info_nce_moments_cpu_mean.default,
        (*plain, shares, True, True, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )

    def step(contexts: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return moment_info_nce(contexts, targets, weights, candidates="both")

    inputs = [x.requires_grad_() for x in (torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4), torch.randn(2, 4, 4))]
    right = torch.autograd.grad(step(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, right, strict=True))


def test_other_derivatives_take_the_reference_or_are_refused() -> None:
    c, z = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    hessian = torch.func.hessian(lambda c: moment_info_nce(c, z))(c)
    expected = torch.func.hessian(lambda c: moment_info_nce(c, z, backend="reference"))(c)
    assert hessian.abs().max() > 0
    assert torch.equal(hessian, expected)
    with pytest.raises(RuntimeError, match=r"moment_info_nce\(backend='cpp'\) has no torch\.func transforms"):
        torch.func.grad(lambda c: moment_info_nce(c, z, backend="cpp"))(c)


@needs_cpp
def test_second_derivatives_are_refused() -> None:
    c, z = torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 3, 5)
    for reduction in ("mean", "task"):
        loss = moment_info_nce(c, z, reduction=reduction, backend="cpp").sum()
        with pytest.raises(RuntimeError, match=r"moment_info_nce\(backend='cpp'\) has no second derivative"):
            torch.autograd.grad(loss, c, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"contexts": torch.ones(4, 5)}, ValueError, r"contexts must have shape \[C, N, Tc, Dc\]"),
        ({"contexts": torch.ones(4, 0, 5)}, ValueError, r"contexts must not be empty"),
        ({"contexts": torch.ones(5, 3, 5)}, ValueError, r"targets must have at least as many"),
        ({"contexts": torch.ones(4, 4, 5)}, ValueError, r"targets must have at least as many"),
        ({"targets": torch.ones(4, 3, 5).double()}, TypeError, r"targets must have dtype float32"),
        ({"candidates": "all"}, ValueError, r"candidates must be one of"),
        ({"candidates": ["clip", "both"]}, ValueError, r"candidates must be .* got 2"),
        ({"shifts": 1}, ValueError, r"shifts must be"),
        ({"shifts": [0, 0]}, ValueError, r"shifts must be .* got 2"),
        ({"positive_offset": 1}, ValueError, r"positive_offset must be"),
        ({"context_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target_ids is None"),
        ({"backend": "cuda"}, ValueError, r"backend must be one of"),
        ({"reduction": "sum"}, ValueError, r"reduction must be one of"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"contexts": torch.ones(4, 3, 5), "targets": torch.ones(4, 3, 5)}
    with pytest.raises(error, match=text):
        moment_info_nce(**{**arguments, **change})
