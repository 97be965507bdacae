"""The Triton kernels of bilinear_info_nce in Triton's interpreter, on CPU tensors: values, gradients, options.

test_info_nce_triton.py runs this file in a process of its own with TRITON_INTERPRET=1; conftest.py fills fresh memory
with NaN in every test here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from info_nce_cases import (
    Case,
    as_double,
    assert_as_good_as,
    assert_one_graph_for_changing_sizes,
    leaves,
    plain_rows,
    plain_terms,
    with_gradients,
)
from torch import Tensor
from torch.library import opcheck

from avppc import PermutativeInfoNCE
from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.ops.info_nce import distributed as gather
from avppc.ops.info_nce.op import bilinear_info_nce, bilinear_scores
from avppc.ops.info_nce.problem import NO_POSITIVE, Problem, make_problem
from avppc.ops.info_nce.triton import backward as backward_launch
from avppc.ops.info_nce.triton import forward as launch
from avppc.ops.info_nce.triton import tiles

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of logarithms of 0 and of NaN


@pytest.fixture(params=["recompute", "waves"])
def backward(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of the backward."""
    monkeypatch.setattr(tiles, "recompute_in_backward", lambda *_: request.param == "recompute")
    return request.param


def solve(arguments: dict[str, Any], **options: Any) -> Any:
    return bilinear_info_nce(**arguments, backend="triton", **options)


def check(case: Case, reduction: str = "none") -> None:
    """Loss and all gradients for a random upstream gradient, against float64."""
    arguments = case.arguments()
    shape = {"mean": (), "task": (case.K,), "none": (case.K, case.N)}[reduction]
    upstreams = {reduction: torch.randn(shape, generator=torch.Generator().manual_seed(1))}
    truth, plain = plain_terms(as_double(arguments), upstreams), plain_terms(arguments, upstreams)
    loss = solve(arguments, reduction=reduction)
    assert loss.dtype == F32
    got = with_gradients(loss, upstreams[reduction], arguments)
    for name, expected in truth[reduction].items():
        assert name == "loss" or got[name].dtype == arguments[name].dtype
        dtype = F32 if name == "loss" else case.dtype
        assert_as_good_as(got[name], plain[reduction][name], expected, name, dtype)


# Tiles here have 32 to 64 rows, columns and widths: sizes below, on and past these; every option with every other.
SHAPES = [
    Case(N=1, Dc=1, Dz=1),
    Case(N=1, extra=5, offset=3, Dc=3, Dz=2, K=1),
    Case(N=64, Dc=64, Dz=64),
    Case(N=65, extra=31, offset=31, Dc=65, Dz=70),
    Case(N=70, extra=90, offset=33, Dc=130, Dz=20),
    Case(N=127, Dc=8, Dz=65, K=1),
]
OPTIONS = [
    Case(N=70, symmetric=True, Dz=70),
    Case(N=70, symmetric=True, ids=9),
    Case(N=1, symmetric=True),
    Case(N=70, ids=1),
    Case(N=40, extra=40, offset=20, ids=30, Dz=70),
    Case(N=40, weighted=False),
    Case(N=70, extra=9, offset=4, weighted=False, K=6, ids=20),
    Case(N=40, weighted=False, symmetric=True, K=1),
    Case(N=128, Dc=64, Dz=64, std=64.0, symmetric=True, K=2),
    Case(N=128, Dc=64, Dz=64, std=16.0, K=2),
]


@pytest.mark.parametrize("case", [*SHAPES, *OPTIONS], ids=str)
def test_it_is_as_good_as_plain_torch(case: Case, backward: str) -> None:
    check(case)


HALVES = [
    dataclasses.replace(case, dtype=dtype) for case, dtype in itertools.product([SHAPES[3], OPTIONS[1]], (BF16, F16))
]
HALVES += [dataclasses.replace(case, dtype=BF16) for case in (OPTIONS[6], OPTIONS[8])]


@pytest.mark.parametrize("case", HALVES, ids=str)
def test_halves_are_as_good_as_plain_torch(case: Case, backward: str) -> None:
    check(case)


@pytest.mark.parametrize("reduction", ["mean", "task"])
def test_reductions(reduction: str) -> None:
    check(Case(N=20, extra=3), reduction)


def test_waves_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one row tile at a time to all rows of a target at once; 3 sub-tasks of 3 row tiles each."""
    monkeypatch.setattr(tiles, "recompute_in_backward", lambda *_: False)
    arguments = Case(N=70, extra=5, offset=2, K=3).arguments()
    upstream = torch.randn(3, 70, generator=torch.Generator().manual_seed(1))
    tile_bytes, counts, results = 32 * 80 * 4, set(), []
    for wave_tiles in (1, 4, 100):
        monkeypatch.setitem(tiles.BACKWARD, tiles.INTERPRETER, tiles.Backward(64, 0, wave_tiles * tile_bytes))
        counts.add(len(backward_launch._waves(((0, 2), (2, 3)), 70, 32, wave_tiles)))
        results.append(with_gradients(solve(arguments, reduction="none"), upstream, arguments))
    assert counts == {9, 3, 2}
    for result in results:
        torch.testing.assert_close(result, results[-1])


def test_statistics_of_columns_may_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = Case(N=70, symmetric=True, K=5).arguments()
    expected = solve(arguments, reduction="none")
    monkeypatch.setattr(tiles, "COLUMN_STATISTICS_BYTES", 2 * 2 * 70 * 8)
    chunks = launch._task_chunks(setting_of(arguments), tiles.Tile(64, 32, 64, 0, 4, 2))
    assert [count for _, count in chunks] == [2, 2, 1]
    torch.testing.assert_close(solve(arguments, reduction="none"), expected)


def setting_of(arguments: dict[str, Any]) -> Any:
    return launch.LaunchArguments.of(make_problem(**arguments))


def test_columns_are_split_where_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = Case(N=3, extra=200, offset=100, K=1).arguments()
    loss, stats = solve(arguments, return_stats=True)
    for processors in (1, 2, 100):
        monkeypatch.setattr(tiles, "processors_of", lambda _, count=processors: count)
        other, other_stats = solve(arguments, return_stats=True)
        torch.testing.assert_close(other, loss)
        assert torch.equal(other_stats.accuracy, stats.accuracy)


@pytest.mark.parametrize("case", [Case(N=60), Case(N=60, symmetric=True), Case(N=60, ids=9)], ids=str)
def test_statistics_are_those_of_the_rows(case: Case) -> None:
    arguments = case.arguments()
    loss, stats = solve(arguments, return_stats=True)
    _, expected = bilinear_info_nce(**arguments, backend="reference", return_stats=True)
    torch.testing.assert_close(stats, expected)
    torch.testing.assert_close(loss.detach(), plain_rows(arguments).mean().detach())
    assert not stats.task_loss.requires_grad
    assert not stats.accuracy.requires_grad


def test_identical_embeddings_cost_log_n_and_ties_are_misses() -> None:
    for n, symmetric in ((1, False), (2, True), (100, False)):
        same = torch.ones(n, 8)
        loss, stats = bilinear_info_nce(
            same, same, 3 * torch.eye(8), symmetric=symmetric, backend="triton", return_stats=True
        )
        torch.testing.assert_close(loss, torch.tensor(math.log(n)))
        assert stats.accuracy.item() == (1.0 if n == 1 else 0.0)


def test_a_small_loss_keeps_its_digits() -> None:
    for logit in (12, 40):
        code = math.sqrt(logit) * torch.eye(8)
        loss = bilinear_info_nce(code, code, backend="triton")
        assert loss.item() == pytest.approx(math.log1p(7 * math.exp(-logit)), rel=1e-5)


def test_huge_logits_overflow_nowhere(backward: str) -> None:
    arguments = Case(N=40, std=1e6).arguments()
    got = with_gradients(solve(arguments), torch.tensor(1.0), arguments)
    assert all(torch.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("scale", [-2.0, 0.0])
def test_any_scale(scale: float, backward: str) -> None:
    arguments = {**Case(N=20).arguments(), "scale": torch.tensor(scale, requires_grad=True)}
    got = with_gradients(solve(arguments), torch.tensor(1.0), arguments)
    expected = with_gradients(bilinear_info_nce(**arguments, backend="reference"), torch.tensor(1.0), arguments)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("row", [3, 17])
def test_nan_is_not_swallowed(symmetric: bool, row: int) -> None:
    arguments = Case(N=40, symmetric=symmetric).arguments()
    arguments["targets"] = arguments["targets"].detach().clone()
    arguments["targets"][0, row, 3] = torch.nan
    rows = solve(arguments, reduction="none")
    assert rows[0].isnan().all()
    assert not rows[1].isnan().any()


def test_ids_are_compared_in_full() -> None:
    arguments = Case(N=4).arguments()
    ids = torch.tensor([5, 5 + 2**32, 5 - 2**33, 6])
    got = solve({**arguments, "context_ids": ids, "target_ids": ids})
    torch.testing.assert_close(got, solve(arguments))
    small = ids.to(torch.int32)  # here they are equal
    assert solve({**arguments, "context_ids": small, "target_ids": small}) < got


def test_layout_of_the_inputs_does_not_matter(backward: str) -> None:
    arguments = Case(N=33, extra=4, offset=2, Dc=24, Dz=24, ids=7).arguments()
    expected = with_gradients(solve(arguments), torch.tensor(1.5), arguments)
    strided = dict(arguments)
    for name in ("contexts", "targets", "weights"):
        value = arguments[name].detach()
        wide = torch.full((*value.mT.shape[:-1], 2 * value.shape[1]), torch.nan)
        wide[..., ::2] = value.mT
        strided[name] = wide[..., ::2].mT.requires_grad_()
    for name in ("context_ids", "target_ids"):
        strided[name] = torch.stack([arguments[name], arguments[name] + 1], 1)[:, 0]
    torch.testing.assert_close(with_gradients(solve(strided), torch.tensor(1.5), strided), expected)


@pytest.mark.parametrize("wanted", [("contexts",), ("targets",), ("weights",), ("scale",)], ids="+".join)
def test_only_what_requires_a_gradient_gets_one(wanted: tuple[str, ...], backward: str) -> None:
    arguments = Case(N=20).arguments()
    expected = with_gradients(solve(arguments), torch.tensor(0.3), arguments)
    for name, value in leaves(arguments).items():
        value.requires_grad_(name in wanted)
    solve(arguments).backward(torch.tensor(0.3))
    for name, value in leaves(arguments).items():
        if name in wanted:
            torch.testing.assert_close(value.grad, expected[name])
        else:
            assert value.grad is None


def test_a_graph_may_be_walked_twice_but_not_differentiated() -> None:
    arguments = Case(N=20).arguments()
    loss = solve(arguments)
    wanted = list(leaves(arguments).values())
    once = torch.autograd.grad(loss, wanted, torch.tensor(1.0), retain_graph=True)
    twice = torch.autograd.grad(loss, wanted, torch.tensor(-2.0), retain_graph=True)
    torch.testing.assert_close([-2 * a for a in once], list(twice))
    with pytest.raises(RuntimeError, match=r"backend='triton'\) has no second derivative"):
        torch.autograd.grad(loss, wanted, create_graph=True)


def test_one_tensor_may_be_contexts_and_targets() -> None:
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    got = torch.autograd.grad(bilinear_info_nce(x, x, backend="triton"), x)
    torch.testing.assert_close(got, torch.autograd.grad(bilinear_info_nce(x, x, backend="reference"), x))


@pytest.mark.parametrize("weighted", [True, False])
def test_targets_and_contexts_that_no_subtask_uses_get_zeros(weighted: bool, backward: str) -> None:
    arguments = {**Case(N=20, K=1, weighted=weighted).arguments(), "pairs": [(1, 0)]}
    got = with_gradients(solve(arguments), torch.tensor(1.0), arguments)
    assert got["contexts"][[0, 2]].abs().max() == 0
    assert got["targets"][1].abs().max() == 0
    assert got["contexts"][1].abs().max() > 0


def test_subtasks_of_weight_zero_leave_no_trace(backward: str) -> None:
    torch.manual_seed(0)
    pairs, weights = [(0, 0), (1, 1), (2, 0), (0, 1)], (1.0, 0.0, 0.5, 0.0)
    contexts, targets = torch.randn(3, 30, 8, requires_grad=True), torch.randn(2, 30, 8, requires_grad=True)
    module = BilinearInfoNCE(8, 8, pairs=pairs, task_weights=weights, backend="triton")
    module(contexts, targets).backward()
    few = BilinearInfoNCE(8, 8, pairs=pairs[::2], task_weights=weights[::2], backend="triton")
    expected = torch.autograd.grad(few(contexts, targets), (contexts, targets, few.weight))
    got = (contexts.grad, targets.grad, module.weight.grad[::2])
    torch.testing.assert_close(got, expected)
    assert not module.weight.grad[1::2].any()
    assert not targets.grad[1].any()
    with torch.no_grad():
        zero = module(contexts, targets)
    assert torch.isfinite(zero)


def test_an_upstream_gradient_of_zero_gives_zeros(backward: str) -> None:
    arguments = Case(N=20).arguments()
    got = with_gradients(solve(arguments), torch.tensor(0.0), arguments)
    assert not any(value.any() for name, value in got.items() if name != "loss")


def test_two_runs_are_bitwise_equal(backward: str) -> None:
    runs = []
    for _ in range(2):
        arguments = Case(N=70, symmetric=True, dtype=BF16).arguments()
        runs.append(with_gradients(solve(arguments), torch.tensor(0.3), arguments))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_the_42_subtasks() -> None:
    torch.manual_seed(0)
    loss_fn = PermutativeInfoNCE(8, backend="triton")
    reference = PermutativeInfoNCE(8, backend="reference")
    reference.load_state_dict(loss_fn.state_dict())
    elements = [torch.randn(5, 8, requires_grad=True) for _ in range(4)]
    got = torch.autograd.grad(loss_fn(*elements), [*elements, *loss_fn.parameters()])
    expected = torch.autograd.grad(reference(*elements), [*elements, *reference.parameters()])
    torch.testing.assert_close(got, expected)


CASES = [Case(N=10, Dc=8, Dz=6), Case(N=10, extra=3, offset=1, ids=4), Case(N=10, symmetric=True, weighted=False)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case) -> None:
    torch.use_deterministic_algorithms(False)  # NaN in unused memory are no difference
    problem = Problem(*(x.detach() if isinstance(x, Tensor) else x for x in make_problem(**case.arguments())))
    opcheck(torch.ops.avppc.info_nce_triton, tuple(problem))
    _, _, *saved = torch.ops.avppc.info_nce_triton(*problem)
    needs = (True, True, case.weighted, True)
    opcheck(torch.ops.avppc.info_nce_triton_backward, (*problem, *saved, torch.rand(3, 10), *needs))


def test_compiles_to_one_graph_for_changing_sizes() -> None:
    assert_one_graph_for_changing_sizes("triton", "mean")


def test_the_operator_checks_the_pairs() -> None:
    problem = make_problem(**Case(N=6).arguments())._replace(pairs=torch.tensor([[0, 0], [0, 2], [0, 0]]))
    with pytest.raises(RuntimeError, match="pairs must hold target indices from 0 to 1, got 2"):
        torch.ops.avppc.info_nce_triton(*problem)


def test_autocast_computes_in_its_dtype() -> None:
    arguments = Case(N=30).arguments()
    with torch.autocast("cpu", BF16):
        loss = solve(arguments)
    got = with_gradients(loss, torch.tensor(1.0), arguments)
    values = {name: value for name, value in leaves(arguments).items() if name != "scale"}
    cast = {name: value.detach().to(BF16).requires_grad_() for name, value in values.items()}
    expected = torch.autograd.grad(solve({**arguments, **cast}), list(cast.values()))
    for name, gradient in zip(cast, expected, strict=True):
        torch.testing.assert_close(got[name], gradient.float())


def test_float64_is_refused() -> None:
    x = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match="contexts must be float32, bfloat16 or float16 with backend='triton'"):
        bilinear_info_nce(x, x, backend="triton")


def test_tuning_finds_a_tile_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = Case(N=20).arguments()
    expected = with_gradients(solve(arguments), torch.tensor(1.0), arguments)
    monkeypatch.setenv("AVPPC_TUNE", "1")
    got = with_gradients(solve(arguments), torch.tensor(1.0), arguments)
    torch.testing.assert_close(got, expected)
    printed = capsys.readouterr().out
    assert "tuned 'fwd' at TileKey(architecture=0" in printed
    assert "; the table's Tile(n=64, m=32, d=64" in printed
    assert "tuned the backward at (TileKey(architecture=0" in printed
    assert "; the table's is 'recompute'" in printed or "; the table's is 'waves'" in printed


def test_targets_in_parts_as_a_ring_sees_them(backward: str) -> None:
    """The statistics of each part merged, and gradients from what all parts have in common; ids throughout."""
    whole = make_problem(**Case(N=20, extra=40, offset=20, ids=15).arguments())
    parts = [whole._replace(targets=z, target_ids=i, positive_offset=0 if n == 1 else NO_POSITIVE) for n, (z, i) in
             enumerate(zip(whole.targets.split(20, 1), whole.target_ids.split(20), strict=True))]  # fmt: skip
    drows = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    found = {}
    for backend in ("triton", "reference"):
        with torch.no_grad():
            statistics = [gather._statistics(part, backend) for part in parts]
            lse = functools.reduce(gather._merge, (lse for _, _, lse in statistics))
        gradients = [gather._gradients(part, backend, lse, drows) for part in parts]
        dcontexts, _, dweights, dscale = (sum(terms) for terms in zip(*gradients, strict=True))
        dtargets = torch.cat([one[1] for one in gradients], 1)
        found[backend] = (*statistics[1][:2], lse, dcontexts, dtargets, dweights, dscale)
    expected = with_gradients(solve({**whole._asdict()}, reduction="none"), drows, whole._asdict())
    torch.testing.assert_close(found["triton"], found["reference"])
    for name, value in zip(("contexts", "targets", "weights", "scale"), found["triton"][3:], strict=True):
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("rows", [20, 5])
def test_positives_by_index_and_scores_of_rows(rows: int, backward: str) -> None:
    """With M > N and M < N; ids leave out positives, which come back, and all targets of some rows."""
    arguments = Case(N=11, ids=4).arguments()
    del arguments["positive_offset"], arguments["symmetric"]
    g = torch.Generator().manual_seed(2)
    arguments["targets"] = torch.randn(2, rows, 8, generator=g, requires_grad=True)
    arguments["target_ids"] = arguments["context_ids"][:1].repeat(rows)
    positives = torch.randint(rows, (11, 2), generator=g)
    upstream = torch.randn(3, 11, generator=g)
    found = []
    for backend in ("triton", "reference"):
        loss, stats = bilinear_info_nce(
            **arguments, positives=positives, reduction="none", backend=backend, return_stats=True
        )
        scores = bilinear_scores(**arguments, backend=backend)
        gradients = [with_gradients(value, upstream, arguments) for value in (loss, scores.log_sum_exp)]
        found.append((*gradients, stats, scores.argmax))
    torch.testing.assert_close(*found)
    assert (found[0][-1] == -1).any()
