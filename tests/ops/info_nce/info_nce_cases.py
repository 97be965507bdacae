"""Inputs of the InfoNCE tests, their float64 truth, and the rule by which a backend is judged against it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from avppc.ops import _library
from avppc.ops.info_nce.op import bilinear_info_nce

CPP_MISSING = _library.missing_reason("cpp")
needs_cpp = pytest.mark.skipif(CPP_MISSING is not None, reason=f"no C++ kernels: {CPP_MISSING}")
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}


@dataclass(frozen=True)
class Case:
    """One problem: K sub-tasks over 3 contexts and 2 targets."""

    K: int = 3
    N: int = 16
    extra: int = 0
    """M - N"""
    offset: int = 0
    Dc: int = 8
    Dz: int = 8
    dtype: torch.dtype = torch.float32
    std: float = 1.0
    """Standard deviation of the logits."""
    symmetric: bool = False
    ids: int = 0
    """How many different ids the rows have; 0: no ids."""
    weighted: bool = True

    def __str__(self) -> str:
        flags = [f"K{self.K}-N{self.N}-M{self.N + self.extra}-D{self.Dc}x{self.Dz}-{SHORT[self.dtype]}"]
        flags += [f"std{self.std:g}"] if self.std != 1 else []
        flags += ["symmetric"] if self.symmetric else []
        flags += [f"ids{self.ids}"] if self.ids else []
        flags += [] if self.weighted else ["dot"]
        return "-".join(flags)

    def arguments(self, seed: int = 0) -> dict[str, Any]:
        """Arguments of bilinear_info_nce; those with a gradient require one."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g)

        N, M = self.N, self.N + self.extra
        scale = 0.7
        contexts, targets = normal(3, N, self.Dc), normal(2, M, self.Dz)
        weights = normal(self.K, self.Dz, self.Dc) * self.std / scale / (self.Dc * self.Dz) ** 0.5
        if not self.weighted:
            contexts = contexts * self.std / scale / self.Dc**0.5
        pairs = [(k % 3, k % 2) for k in range(self.K)]
        tensors = {
            "contexts": contexts.to(self.dtype).requires_grad_(),
            "targets": targets.to(self.dtype).requires_grad_(),
            "weights": weights.to(self.dtype).requires_grad_() if self.weighted else None,
            "scale": torch.tensor(scale, requires_grad=True),
        }
        ids = {}
        if self.ids:
            ids["target_ids"] = torch.randint(self.ids, (M,), generator=g)
            ids["context_ids"] = torch.randint(self.ids, (N,), generator=g)
        return {**tensors, **ids, "pairs": pairs, "positive_offset": self.offset, "symmetric": self.symmetric}


def solve(arguments: dict[str, Any], backend: str, **options: Any) -> Any:
    return bilinear_info_nce(**arguments, backend=backend, **options)


GRADIENTS = ("contexts", "targets", "weights", "scale")


def leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The arguments that receive a gradient."""
    return {name: arguments[name] for name in GRADIENTS if arguments[name] is not None}


def with_gradients(
    loss: Tensor, upstream: Tensor, arguments: dict[str, Any], retain_graph: bool = False
) -> dict[str, Tensor]:
    """The loss and its gradients, for upstream gradients of the loss's shape."""
    wanted = leaves(arguments)
    found = torch.autograd.grad(loss, list(wanted.values()), upstream.to(loss.dtype), retain_graph=retain_graph)
    return {"loss": loss.detach(), **dict(zip(wanted, found, strict=True))}


def as_double(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same values as float64 leaves."""
    doubles = {name: value.detach().double().requires_grad_() for name, value in leaves(arguments).items()}
    return {**arguments, **doubles}


def plain_rows(arguments: dict[str, Any]) -> Tensor:
    """[K, N] losses by a loop of matmul and cross_entropy in the arguments' dtype: what a user would write.

    The scale may have a value for each sub-task and row, [K, N].
    """
    rows = []
    N = arguments["contexts"].shape[1]
    labels = torch.arange(N) + arguments["positive_offset"]
    scale = arguments["scale"].expand(len(arguments["pairs"]), N)
    for k, (context, target) in enumerate(arguments["pairs"]):
        c, z = arguments["contexts"][context], arguments["targets"][target]
        q = c if arguments["weights"] is None else c @ arguments["weights"][k].T
        s = (q @ z.T).to(torch.promote_types(q.dtype, torch.float32)) * scale[k][:, None]
        if "context_ids" in arguments:
            same = arguments["context_ids"][:, None] == arguments["target_ids"]
            same[torch.arange(N), labels] = False
            s = s.masked_fill(same, -torch.inf)
        loss = F.cross_entropy(s, labels, reduction="none")
        if arguments["symmetric"]:
            loss = (loss + F.cross_entropy(s.T, labels, reduction="none")) / 2
        rows.append(loss)
    return torch.stack(rows)


def reduced(rows: Tensor, reduction: str) -> Tensor:
    """The reduction of losses [K, N]."""
    return {"none": rows, "task": rows.mean(1), "mean": rows.mean()}[reduction]


def plain_terms(arguments: dict[str, Any], upstreams: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """For each reduction the loss and the gradients by plain torch; sums over rows as their terms.

    The loss's terms are those of its mean over rows, the scale's gradient has a term [K, N] for each row.
    """
    scale = arguments["scale"].detach()
    rows_shape = (len(arguments["pairs"]), arguments["contexts"].shape[1])
    arguments = {**arguments, "scale": scale.expand(rows_shape).clone().requires_grad_()}
    rows = plain_rows(arguments)
    terms = {}
    for reduction, upstream in upstreams.items():
        drows = torch.autograd.grad(reduced(rows, reduction), rows, upstream.to(rows.dtype), retain_graph=True)[0]
        count = {"none": 1, "task": rows.shape[1], "mean": rows.numel()}[reduction]
        terms[reduction] = {**with_gradients(rows, drows, arguments, retain_graph=True), "loss": rows.detach() / count}
    return terms


def assert_as_good_as(got: Tensor, plain: Tensor, truth: Tensor, name: str, dtype: torch.dtype) -> None:
    """|got - truth| <= 2 |plain - truth| + epsilon, in the largest deviation and in the norm.

    Plain torch in the same dtype sets the measure (the rule of Apple's cut-cross-entropy). Where `got` is a sum, plain
    and truth are its terms and their deviations count without cancelling, which they do by luck. Epsilon: a few float32
    roundings, for plain torch may be exact by chance; and one rounding to dtype, that of the result or of its factors.
    """
    assert torch.isfinite(got).all(), name
    deviations, total, terms = (plain.double() - truth).abs(), truth, truth.abs()
    while total.ndim > got.ndim:
        deviations, total, terms = deviations.sum(-1), total.sum(-1), terms.sum(-1)
    assert got.shape == total.shape, name
    epsilon = 2e-6 + (torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0)
    for size in (torch.max, torch.linalg.vector_norm):
        error, measure = size((got.double() - total).abs()), size(deviations)
        allowed = 2 * measure + epsilon * size(terms)
        assert error <= allowed, f"{name}: error {error:.3g}, plain torch has {measure:.3g}, allowed {allowed:.3g}"


def assert_one_graph_for_changing_sizes(backend: str, reduction: str) -> None:
    """torch.compile makes one graph for the first size and one for all others, whose results are those without it."""
    torch._dynamo.reset()

    def step(contexts: Tensor, targets: Tensor, weights: Tensor, scale: Tensor, ids: Tensor) -> Any:
        return bilinear_info_nce(
            contexts,
            targets,
            weights,
            [(k % 3, k % 2) for k in range(3)],
            scale=scale,
            context_ids=ids,
            target_ids=ids,
            symmetric=True,
            reduction=reduction,
            backend=backend,
            return_stats=True,
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled_step = torch.compile(step, fullgraph=True, backend=counter)
    for n in (10, 11, 17, 32):
        arguments = Case(N=n).arguments(seed=n)
        inputs = [*leaves(arguments).values(), torch.arange(n) // 2]
        loss, stats = quietly(compiled_step, *inputs)
        expected, expected_stats = step(*inputs)
        upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(n))
        torch.testing.assert_close(
            with_gradients(loss, upstream, arguments), with_gradients(expected, upstream, arguments)
        )
        torch.testing.assert_close(stats, expected_stats)
    assert counter.frame_count == 2, "one graph for the first size, one for all others"


def quietly(function: Any, *args: Any) -> Any:
    """What a function returns that makes torch warn about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)
