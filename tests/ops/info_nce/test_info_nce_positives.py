"""Positives by index, several a row, and the log-sum-exp with the best target: against plain torch in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from info_nce_cases import BACKENDS, GRADIENTS, Case, as_double, leaves, needs_cpp, quietly, with_gradients
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from avppc import BilinearInfoNCE, BilinearScores, bilinear_info_nce, bilinear_scores
from avppc.ops.info_nce import reference

SIZES = {"M=N": (3, 12, 12, 2), "M<N": (3, 11, 4, 3), "M>N": (2, 5, 17, 1), "one target": (1, 6, 1, 1)}
"""K, N, M, P"""


def problem(size: str, ids: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Arguments with positives, some of which are -1, some twice, and with ids some those of their contexts."""
    K, N, M, P = SIZES[size]
    case = Case(K=K, N=N, Dc=6, Dz=5, dtype=dtype).arguments(seed)
    g = torch.Generator().manual_seed(seed + 1)
    positives = torch.randint(-1, M, (N, P), generator=g)
    positives[:, -1] = torch.randint(M, (N,), generator=g)
    positives[0] = 0  # with ids the context's own
    found = {name: case[name] for name in (*GRADIENTS, "pairs")}
    found |= {"targets": torch.randn(2, M, 5, generator=g).to(dtype).requires_grad_(), "positives": positives}
    if ids:
        found["context_ids"], found["target_ids"] = torch.arange(N) % 3, torch.arange(M) % 2
    return found


def logits(arguments: dict[str, Any]) -> Tensor:
    """[K, N, M]"""
    s = [arguments["scale"] * arguments["contexts"][i] @ arguments["weights"][k].T @ arguments["targets"][j].T
         for k, (i, j) in enumerate(arguments["pairs"])]  # fmt: skip
    return torch.stack(s)


def is_positive(arguments: dict[str, Any]) -> Tensor:
    """[N, M]"""
    numbers = torch.arange(arguments["targets"].shape[1])
    return (arguments["positives"][:, :, None] == numbers).any(1)


def without_left_out(arguments: dict[str, Any], kept: Tensor) -> Tensor:
    s = logits(arguments)
    if "context_ids" not in arguments:
        return s
    return s.masked_fill((arguments["context_ids"][:, None] == arguments["target_ids"]) & ~kept, -torch.inf)


def plain_rows(arguments: dict[str, Any]) -> Tensor:
    """[K, N], row by row as the docstring has it."""
    rows = []
    for task in without_left_out(arguments, is_positive(arguments)):
        for s, positives in zip(task, arguments["positives"].tolist(), strict=True):
            rows.append(torch.stack([s.logsumexp(0) - s[p] for p in positives if p >= 0]).mean())
    return torch.stack(rows).view(len(arguments["pairs"]), -1)


@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_positives_by_index(backend: str, size: str, ids: bool) -> None:
    arguments = problem(size, ids)
    truth = plain_rows(exact := as_double(arguments))
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(9))
    expected = with_gradients(truth, upstream, exact)
    loss = bilinear_info_nce(**arguments, reduction="none", backend=backend)
    for name, value in with_gradients(loss, upstream, arguments).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-5, atol=2e-5, msg=name)
    if backend == "reference":
        double = bilinear_info_nce(**exact, reduction="none")
        torch.testing.assert_close(with_gradients(double, upstream, exact), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_and_statistics(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem("M=N", ids=True)
    kept = is_positive(arguments)
    s, rows = without_left_out(arguments, kept), plain_rows(arguments)
    best = s.masked_fill(~kept, -torch.inf).amax(2)
    hits = (best > s.masked_fill(kept, -torch.inf).amax(2)).float().mean(1)
    assert 0 < hits.mean() < 1
    for most in (1 << 22, 30):  # all logits at once, and two rows at a time
        monkeypatch.setattr(reference, "_MOST_LOGITS", most)
        for reduction, expected in (("mean", rows.mean()), ("task", rows.mean(1)), ("none", rows)):
            loss, stats = bilinear_info_nce(**arguments, reduction=reduction, backend=backend, return_stats=True)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(tuple(stats), (rows.mean(1), hits))
            assert not stats.task_loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_own_row_as_positive_is_the_plain_loss(backend: str) -> None:
    arguments = Case(N=9, ids=4).arguments()
    plain = bilinear_info_nce(**arguments, reduction="none", backend=backend)
    del arguments["positive_offset"], arguments["symmetric"]
    for positives in (torch.arange(9), torch.stack([torch.full((9,), -1), torch.arange(9)], 1).int()):
        loss = bilinear_info_nce(**arguments, positives=positives, reduction="none", backend=backend)
        torch.testing.assert_close(loss, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_supervised_contrastive_without_oneself(backend: str) -> None:
    """Khosla's L_out over one set of embeddings: positives share the label, the own row is no candidate."""
    g = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(12, 5, generator=g), dim=1).requires_grad_()
    labels, rows = torch.arange(12) % 4, torch.arange(12)
    same = (labels[:, None] == labels) & (rows[:, None] != rows)
    s = (10 * x @ x.T).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    expected = -(s.log_softmax(1).masked_fill(~same, 0).sum(1) / same.sum(1)).mean()
    positives = same.nonzero()[:, 1].view(12, 2)
    ids = {"context_ids": rows, "target_ids": rows}
    loss = bilinear_info_nce(x, x, scale=10.0, positives=positives, backend=backend, **ids)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_rows(backend: str, size: str, ids: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = problem(size, ids)
    del arguments["positives"]
    exact = as_double(arguments)
    s = without_left_out(exact, torch.tensor(False))
    all_left_out = s.amax(2) == -torch.inf
    assert all_left_out.any() == (ids and size == "one target")
    upstream = torch.randn(s.shape[:2], generator=torch.Generator().manual_seed(9))
    expected = with_gradients(s.logsumexp(2), upstream, exact)
    for most in (1 << 22, 7):
        monkeypatch.setattr(reference, "_MOST_LOGITS", most)
        found = bilinear_scores(**arguments, backend=backend)
        assert isinstance(found, BilinearScores)
        assert torch.equal(found.argmax, s.argmax(2).masked_fill(all_left_out, -1))
    for name, value in with_gradients(found.log_sum_exp, upstream, arguments).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-5, atol=2e-5, msg=name)
    assert not found.argmax.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    arguments = problem("M=N", ids=True, dtype=dtype)
    loss = bilinear_info_nce(**arguments, backend=backend)
    expected = plain_rows(exact := as_double(arguments)).mean()
    assert loss.dtype == torch.float32
    got, truth = (with_gradients(value, torch.tensor(1.0), of) for value, of in ((loss, arguments), (expected, exact)))
    for name in truth:
        deviation = torch.linalg.vector_norm(got[name].double() - truth[name])
        assert deviation <= 1e-2 * torch.linalg.vector_norm(truth[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend: str) -> None:
    arguments = {**problem("M=N", ids=True), "scale": torch.tensor(1e4, requires_grad=True)}
    loss = bilinear_info_nce(**arguments, backend=backend)
    torch.testing.assert_close(loss.double(), plain_rows(as_double(arguments)).mean(), rtol=1e-5, atol=0)
    assert all(value.isfinite().all() for value in with_gradients(loss, torch.tensor(1.0), arguments).values())


@needs_cpp
@pytest.mark.parametrize("ids", [False, True], ids=["", "ids"])
def test_compiles_to_one_graph_for_changing_sizes(ids: bool) -> None:
    torch._dynamo.reset()

    def step(x: Tensor, y: Tensor, w: Tensor, scale: Tensor, positives: Tensor, numbers: Tensor) -> Any:
        given = {"context_ids": numbers, "target_ids": numbers} if ids else {}
        settings: Any = {"pairs": [(0, 0), (1, 1), (2, 0)], "scale": scale, "backend": "cpp", **given}
        loss = bilinear_info_nce(x, y, w, positives=positives, reduction="none", **settings)
        return loss, bilinear_scores(x, y, w, **settings)

    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(step, fullgraph=True, backend=counter)
    for n in (10, 11, 17):
        arguments = Case(N=n).arguments(n)
        inputs = (
            *leaves(arguments).values(),
            torch.stack([torch.arange(n), torch.arange(n).flip(0)], 1),
            torch.arange(n) // 2,
        )
        (loss, scores), (expected, expected_scores) = quietly(function, *inputs), step(*inputs)
        upstream = torch.randn(expected.shape)
        torch.testing.assert_close(
            with_gradients(loss + scores.log_sum_exp, upstream, arguments),
            with_gradients(expected + expected_scores.log_sum_exp, upstream, arguments),
        )
        assert torch.equal(scores.argmax, expected_scores.argmax)
    assert counter.frame_count == 2, "one graph for the first size, one for all others"


@needs_cpp
def test_a_compiled_graph_still_checks_the_positives() -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 3)
    function = torch.compile(lambda p: bilinear_info_nce(x, x, positives=p), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(quietly(function, torch.arange(4)), bilinear_info_nce(x, x))
    for wrong in (torch.tensor([0, 1, 2, 4]), torch.tensor([0, -1, 2, 3])):
        with pytest.raises(RuntimeError, match="positives must hold numbers of targets, or -1 for none, and"):
            quietly(function, wrong)


def test_derivatives_of_every_kind_by_the_reference() -> None:
    arguments = problem("M<N", ids=True)
    contexts = arguments.pop("contexts")

    def loss(c: Tensor, scores: bool = False) -> Tensor:
        if not scores:
            return bilinear_info_nce(c, **arguments)
        return bilinear_scores(c, **{k: v for k, v in arguments.items() if k != "positives"}).log_sum_exp.sum()

    for scores in (False, True):
        expected = torch.autograd.grad(loss(contexts, scores), contexts)[0]
        torch.testing.assert_close(torch.func.grad(loss)(contexts, scores), expected)
    exact = as_double({**arguments, "contexts": contexts})
    tensors = leaves(exact)
    small = {name: value.detach()[..., :2].clone().requires_grad_() for name, value in tensors.items() if value.ndim}
    small["weights"] = tensors["weights"].detach()[:, :2, :2].clone().requires_grad_()

    def of(*values: Tensor) -> Tensor:
        return bilinear_info_nce(**{**exact, **dict(zip(small, values, strict=True))}, reduction="none")

    assert torch.autograd.gradgradcheck(of, tuple(small.values()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype(backend: str) -> None:
    arguments = problem("M=N", ids=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = bilinear_info_nce(**arguments, backend=backend)
    cast = {name: arguments[name].detach().bfloat16() for name in ("contexts", "targets", "weights")}
    torch.testing.assert_close(loss, bilinear_info_nce(**{**arguments, **cast}, backend=backend))
    assert with_gradients(loss, torch.tensor(1.0), arguments)["contexts"].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"positives": [0]}, TypeError, "positives must be a torch.Tensor, got list"),
        ({"positives": torch.zeros(4)}, TypeError, "positives must have one of the dtypes int64, .*; got float32"),
        ({"positives": torch.zeros(5, dtype=torch.int64)}, ValueError, r"must have shape \[4\] or .* got \[5\]"),
        ({"positives": torch.zeros(4, 0, dtype=torch.int64)}, ValueError, r"positives must have shape .* got \[4, 0\]"),
        ({"positives": torch.arange(4, device="meta")}, ValueError, "positives must be on cpu .* got meta"),
        ({"positives": torch.arange(4) + 3}, ValueError, "numbers of targets, 0 to 5, or -1 for none; got 6"),
        ({"positives": torch.arange(4) - 2}, ValueError, "numbers of targets, 0 to 5, or -1 for none; got -2"),
        ({"positives": torch.arange(4) - 1}, ValueError, "at least one target for each row, got none for row 0"),
        ({"positive_offset": 1}, ValueError, "positive_offset must be left out where positives are given"),
        ({"positive_offset": None}, ValueError, "positive_offset must be left out .* got None"),
        ({"symmetric": True}, ValueError, "symmetric must be left out where positives are given by index, got True"),
        ({"reduction": "sum"}, ValueError, "reduction must be one of"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_positives_are_named(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    valid = {"contexts": torch.ones(4, 3), "targets": torch.ones(6, 3), "positives": torch.arange(4)}
    with pytest.raises(error, match=text):
        bilinear_info_nce(**{**valid, **changes})


def test_meta_tensors_give_shapes() -> None:
    x, y = torch.ones(4, 3, device="meta"), torch.ones(6, 3, device="meta")
    positives = torch.zeros(4, 2, dtype=torch.int64, device="meta")
    assert bilinear_info_nce(x, y, positives=positives, reduction="none").shape == (1, 4)
    assert bilinear_scores(x, y).argmax.shape == (1, 4)


# ---------------------------------------------------------------- the module


def embeddings(n: int = 9, width: int = 5) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, n, width, generator=torch.Generator().manual_seed(0)).unbind()
    return x.requires_grad_(), y.requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", ["none", "layer_norm", "l2"])
def test_module_without_weight(backend: str, normalize: str) -> None:
    """CLIP's loss: its own scale is learned, and there is nothing else."""
    x, y = embeddings()
    settings: Any = {"normalize": normalize, "symmetric": True, "backend": backend}
    module = BilinearInfoNCE(5, 5, weight=False, scale=7.0, learn_scale=True, **settings)
    assert list(module.state_dict()) == ["log_scale"]
    assert module.weight is None
    shape = {"none": lambda v: v, "layer_norm": lambda v: F.layer_norm(v, (5,)), "l2": lambda v: F.normalize(v, dim=1)}
    s = module.scale * shape[normalize](x) @ shape[normalize](y).T
    labels = torch.arange(9)
    expected = (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2
    loss, wanted = module(x, y), (x, y, module.log_scale)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted))


def test_l2_with_weight_and_in_half_precision() -> None:
    x, y = embeddings()
    module = BilinearInfoNCE(5, 5, normalize="l2", scale=3.0)
    s = 3.0 * F.normalize(x, dim=1) @ module.weight[0].T @ F.normalize(y, dim=1).T
    torch.testing.assert_close(module(x, y), F.cross_entropy(s, torch.arange(9)))
    half = (x.detach().bfloat16(), y.detach().bfloat16())
    rounded_once = [F.normalize(value.float(), dim=1).bfloat16() for value in half]
    plain = BilinearInfoNCE(5, 5, weight=False)
    torch.testing.assert_close(
        BilinearInfoNCE(5, 5, weight=False, normalize="l2")(*half), plain(*rounded_once), rtol=0, atol=0
    )


def test_a_call_with_its_own_scale_and_positives() -> None:
    x, y = embeddings()
    scale = torch.tensor(2.5, requires_grad=True)
    positives = torch.arange(9).flip(0)
    module = BilinearInfoNCE(5, 5, weight=False, task_weights=[2.0])
    loss = module(x, y, positives=positives, scale=scale)
    expected = F.cross_entropy(2.5 * x @ y.T, positives)
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, scale)[0] != 0
    loss, stats = module(x, y[:4], positives=positives % 4, return_stats=True)
    torch.testing.assert_close(loss, F.cross_entropy(x @ y[:4].T, positives % 4))
    torch.testing.assert_close(stats.task_loss, loss.detach()[None])


def test_what_does_not_go_together_is_named() -> None:
    x, y = embeddings()
    with pytest.raises(ValueError, match="target_dim must be context_dim, 5, with weight=False; got 4"):
        BilinearInfoNCE(5, 4, weight=False)
    with pytest.raises(ValueError, match=r"contexts must be 4 wide, got shape \[9, 5\]"):
        BilinearInfoNCE(4, 4, weight=False)(x, y)
    with pytest.raises(ValueError, match="scale must be left out of a call of a module that learns its own"):
        BilinearInfoNCE(5, 5, learn_scale=True)(x, y, scale=2.0)
    with pytest.raises(ValueError, match="positives need gather='all' or 'none', got 'ring'"):
        BilinearInfoNCE(5, 5, gather="ring")(x, y, positives=torch.arange(9))
    with pytest.raises(ValueError, match="symmetric must be left out"):
        BilinearInfoNCE(5, 5, symmetric=True)(x, y, positives=torch.arange(9))
    with pytest.raises(
        TypeError, match=r"group must be None or a torch\.distributed\.ProcessGroup of this .* got -100"
    ):
        BilinearInfoNCE(5, 5, group=torch.distributed.GroupMember.NON_GROUP_MEMBER)  # type: ignore[arg-type]  # the test


def test_module_without_weight_copies_compiles_and_shows_itself() -> None:
    torch._dynamo.reset()
    x, y = embeddings()
    module = BilinearInfoNCE(5, 5, weight=False, learn_scale=True, normalize="l2")
    module.reset_parameters()
    assert "5, 5, tasks=1, weight=False, initial_scale=1.0" in repr(module)
    again = copy.deepcopy(module)
    function = torch.compile(again, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(quietly(function, x, y), module(x, y))
