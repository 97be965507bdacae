"""The Triton kernels of moment_info_nce in Triton's interpreter, on CPU tensors: values, gradients, options.

test_info_nce_triton.py runs this file in a process of its own with TRITON_INTERPRET=1; conftest.py fills fresh memory
with NaN in every test here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_moments import BF16, F16, F32, TOLERANCES, Case, as_double, leaves
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from avppc import PermutativeInfoNCE, bilinear_info_nce
from avppc.ops.info_nce.moments import CANDIDATES, Candidates, make_moment_problem, moment_info_nce
from avppc.ops.info_nce.triton import forward, moments

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, of logarithms of 0 and of NaN
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning"),  # of torch.compile, of itself
]


def solve(arguments: dict[str, Any], **options: Any) -> Any:
    return moment_info_nce(**arguments, backend="triton", **options)


def with_gradients(arguments: dict[str, Any], upstream: Tensor, **options: Any) -> list[Tensor]:
    """The loss and the gradients of contexts, targets, weights and scale."""
    inputs = leaves(arguments)
    loss = moment_info_nce(**arguments, **options)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, upstream.to(loss.dtype))]


def upstream_of(case: Case) -> Tensor:
    """Above 0, so that the scale's gradient, a sum over all rows, does not cancel."""
    return torch.rand(case.K, case.N, case.Tc, generator=torch.Generator().manual_seed(1))


# A tile has 32 to 64 rows here: several clips of 1 to 26 moments, the last of them cut off, and clips of several tiles.
SIZES = [
    Case(K=3),
    Case(N=1, Tc=1, Tz=1, K=3),
    Case(N=2, Tc=1, Tz=6, candidates="both", K=2),
    Case(N=3, Tc=5, Tz=5, Dc=33, Dz=40, K=3),
    Case(N=3, Tc=12, Tz=12, Dc=64, Dz=64, K=1, candidates="both"),
    Case(N=3, Tc=13, Tz=26, Dc=9, Dz=128, K=1, candidates="both"),
    Case(N=1, Tc=26, Tz=26, K=2, candidates="clip"),
    Case(N=128, Tc=1, Tz=3, Dc=4, Dz=3, K=3, ids=True),
    Case(N=128, Tc=5, Tz=5, Dc=4, Dz=4, K=1, candidates="both"),
    Case(N=2, Tc=70, Tz=75, extra=1, offset=1, K=2, candidates="clip"),
    Case(N=18, Tc=7, Tz=7, extra=3, offset=2, Dc=33, Dz=40, K=3, ids=True),
    Case(N=25, Tc=5, Tz=9, extra=9, offset=9, candidates="both", K=2, ids=True, weighted=False),
    Case(N=12, K=3, dtype=BF16, ids=True),
    Case(N=12, K=3, dtype=F16, ids=True),
]


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_it_is_its_definition(case: Case) -> None:
    truth = with_gradients(as_double(case.arguments()), upstream_of(case), reduction="none", backend="reference")
    got = with_gradients(case.arguments(), upstream_of(case), reduction="none", backend="triton")
    assert [x.dtype for x in got] == [F32, *[case.dtype] * (len(got) - 2), F32]
    for found, expected in zip(got, truth, strict=True):
        error = (found.double() - expected).abs().max()
        assert error <= TOLERANCES[case.dtype] * expected.abs().max().clamp_min(0.1)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("candidates", CANDIDATES)
def test_halves_of_one_kind(candidates: Candidates, dtype: torch.dtype) -> None:
    test_it_is_its_definition(Case(N=5, Tc=4, Tz=6, K=1, candidates=candidates, dtype=dtype))


@pytest.mark.parametrize("reduction", ["mean", "task"])
def test_reductions_and_statistics(reduction: str) -> None:
    case = Case(N=5, K=3, ids=True)
    upstream = torch.rand(() if reduction == "mean" else (case.K,), generator=torch.Generator().manual_seed(1))
    got = with_gradients(case.arguments(), upstream, reduction=reduction, backend="triton")
    expected = with_gradients(case.arguments(), upstream, reduction=reduction, backend="reference")
    torch.testing.assert_close(got, expected)
    stats = [moment_info_nce(**case.arguments(), backend=b, return_stats=True)[1] for b in ("triton", "reference")]
    torch.testing.assert_close(stats[0], stats[1])


def test_clips_of_one_moment_are_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    c, z, w = (torch.randn(*shape, generator=generator) for shape in ((40, 6), (47, 7), (7, 6)))
    expected = bilinear_info_nce(c, z, w, positive_offset=3, reduction="none", backend="triton")
    for candidates in ("moment", "both"):
        rows = moment_info_nce(
            c[:, None], z[:, None], w, candidates=candidates, positive_offset=3, reduction="none", backend="triton"
        )
        torch.testing.assert_close(rows[:, :, 0], expected)


def test_accuracy_counts_positives_above_every_candidate() -> None:
    z = torch.eye(4).expand(3, 4, 4)  # each moment of each clip alike: across clips the positive is never alone
    for candidates, accuracy in (("clip", 1.0), ("moment", 0.0), ("both", 0.0)):
        stats = moment_info_nce(z, z, candidates=candidates, backend="triton", return_stats=True)[1]
        assert stats.accuracy.tolist() == [accuracy]


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_work_and_memory_grow_with_what_is_told_apart(
    candidates: Candidates, multiplications: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the clips: twice the work inside clips, four times across them; never all moments against all."""
    sizes: list[int] = []
    empty = forward.LaunchArguments.empty

    def record(self: Any, *shape: int, **options: Any) -> Tensor:
        sizes.append(torch.Size(shape).numel())
        return empty(self, *shape, **options)

    monkeypatch.setattr(forward.LaunchArguments, "empty", record)
    work = []
    for clips in (64, 128):
        multiplications.clear()
        case = Case(N=clips, Tc=4, Tz=4, Dc=8, Dz=8, K=1, candidates=candidates, weighted=False)
        with_gradients(case.arguments(), upstream_of(case), reduction="none", backend="triton")
        work.append(sum(multiplications))
    assert work[1] == work[0] * 2 if candidates == "clip" else work[0] * 2 < work[1] <= work[0] * 4
    assert max(sizes) <= 3 * 128 * 4 * 8  # the gradient of three contexts; all moments with all are 512 * 512


def test_two_runs_are_bitwise_equal() -> None:
    case = Case(N=12, Tc=5, Tz=6, K=3, dtype=BF16, ids=True)
    runs = [with_gradients(case.arguments(), upstream_of(case), reduction="none", backend="triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("wanted", range(4))
def test_only_what_requires_a_gradient_gets_one(wanted: int) -> None:
    case = Case(N=5, K=3)
    expected = with_gradients(case.arguments(), upstream_of(case), reduction="none", backend="triton")[1:]
    arguments = case.arguments()
    inputs = leaves(arguments)
    for place, value in enumerate(inputs):
        value.requires_grad_(place == wanted)
    solve(arguments, reduction="none").backward(upstream_of(case))
    torch.testing.assert_close(inputs[wanted].grad, expected[wanted])
    assert [value.grad is None for value in inputs] == [place != wanted for place in range(4)]


@pytest.mark.parametrize("weighted", [True, False])
def test_what_no_subtask_uses_gets_zeros(weighted: bool) -> None:
    arguments = {**Case(N=5, extra=2, offset=1, K=2, Dz=5, weighted=weighted).arguments(), "pairs": [(1, 0)] * 2}
    _, dcontexts, dtargets, *_ = with_gradients(arguments, torch.tensor(1.0), backend="triton")
    assert not dcontexts[[0, 2]].any()
    assert not dtargets[1].any()
    assert dcontexts[1].any()
    inside = {**arguments, "candidates": "clip"}
    assert not with_gradients(inside, torch.tensor(1.0), backend="triton")[2].view(2, 7, 4, -1)[0, [0, 6]].any()


def test_an_upstream_gradient_of_zero_gives_zeros() -> None:
    found = with_gradients(Case(N=5, K=3).arguments(), torch.tensor(0.0), backend="triton")
    assert not any(value.any() for value in found[1:])


def test_huge_logits_overflow_nowhere() -> None:
    arguments = {**Case(N=9, K=3).arguments(), "scale": torch.tensor(1e6)}
    assert all(value.isfinite().all() for value in with_gradients(arguments, torch.tensor(1.0), backend="triton"))


def test_nan_stays_with_those_who_see_it() -> None:
    arguments = Case(N=9, K=3).arguments()
    arguments["pairs"] = [(0, 0)] * 3
    arguments["targets"][0, 4, 2, 1] = torch.nan
    inside, across, both = solve(arguments, reduction="none").isnan()
    assert inside[4].all()
    assert not inside[[0, 1, 2, 3, 5, 6, 7, 8]].any()
    moment = 2 - arguments["shifts"][1]
    assert across[:, moment].all()
    assert not across[:, [t for t in range(3) if t != moment]].any()
    assert both[4].all()


def test_layout_of_the_inputs_does_not_matter() -> None:
    case = Case(N=9, Tc=4, Tz=5, extra=2, offset=1, K=3, ids=True)
    expected = with_gradients(case.arguments(), upstream_of(case), reduction="none", backend="triton")
    strided = case.arguments()
    for name in ("contexts", "targets", "weights"):
        strided[name] = torch.stack([strided[name], torch.full_like(strided[name], torch.nan)], -1)[..., 0]
    for name in ("context_ids", "target_ids"):
        strided[name] = torch.stack([strided[name], strided[name] + 1], 1)[:, 0]
    torch.testing.assert_close(with_gradients(strided, upstream_of(case), reduction="none", backend="triton"), expected)


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_the_42_subtasks(candidates: Candidates) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"candidates": candidates, "learn_scale": True}
    loss_fn, reference = (PermutativeInfoNCE(8, backend=b, **options) for b in ("triton", "reference"))
    reference.load_state_dict(loss_fn.state_dict())
    elements = [torch.randn(5, 3, 8, requires_grad=True) for _ in range(4)]
    got = torch.autograd.grad(loss_fn(*elements), [*elements, *loss_fn.parameters()])
    expected = torch.autograd.grad(reference(*elements), [*elements, *reference.parameters()])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("case", [Case(N=4, K=3, ids=True), Case(N=4, K=1, candidates="clip", weighted=False)], ids=str)
def test_opcheck(case: Case) -> None:
    torch.use_deterministic_algorithms(False)  # NaN in unused memory are no difference
    problem = make_moment_problem(**case.arguments())
    opcheck(torch.ops.avppc.info_nce_moments_triton, tuple(problem))
    rows, _, *saved = torch.ops.avppc.info_nce_moments_triton(*problem)
    needs = (True, True, case.weighted, True)
    opcheck(torch.ops.avppc.info_nce_moments_triton_backward, (*problem, *saved, torch.rand(rows.shape), *needs))


def test_compiles_to_one_graph_for_changing_sizes() -> None:
    torch._dynamo.reset()

    def step(contexts: Tensor, targets: Tensor, weights: Tensor) -> Any:
        return moment_info_nce(contexts, targets, weights, candidates="both", backend="triton", return_stats=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for clips in (2, 3, 5):
        inputs = [torch.randn(*shape, requires_grad=True) for shape in ((2, clips, 3, 4), (2, clips, 3, 4), (2, 4, 4))]
        (loss, stats), (expected, expected_stats) = compiled(*inputs), step(*inputs)
        torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))
        torch.testing.assert_close(stats, expected_stats)
    assert counter.frame_count == 2, "one graph for the first size, one for all others"


@pytest.mark.parametrize(
    ("field", "value"), [("candidates", 0), ("candidates", 4), ("shifts", -1), ("shifts", 2), ("pairs", 3)]
)
def test_the_operator_checks_what_its_kernels_index_by(field: str, value: int) -> None:
    problem = make_moment_problem(**Case(N=4).arguments())
    wrong = getattr(problem, field).clone()
    wrong[2] = value
    with pytest.raises(RuntimeError, match="must"):
        torch.ops.avppc.info_nce_moments_triton(*problem._replace(**{field: wrong}))


def test_float64_second_derivatives_and_transforms_are_refused() -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    with pytest.raises(TypeError, match="contexts must be float32, bfloat16 or float16 with backend='triton'"):
        moment_info_nce(x.double(), x.double(), backend="triton")
    loss = moment_info_nce(x, x, backend="triton")
    with pytest.raises(RuntimeError, match=r"moment_info_nce\(backend='triton'\) has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"moment_info_nce\(backend='triton'\) has no torch\.func transforms"):
        torch.func.grad(lambda x: moment_info_nce(x, x, backend="triton"))(x)


def test_tuning_finds_tiles_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(N=2, K=1, candidates="both")
    expected = with_gradients(case.arguments(), upstream_of(case), reduction="none", backend="triton")
    monkeypatch.setenv("AVPPC_TUNE", "1")
    got = with_gradients(case.arguments(), upstream_of(case), reduction="none", backend="triton")
    torch.testing.assert_close(got, expected)
    printed = capsys.readouterr().out
    for kernel in ("fwd", "dq", "dz"):
        for part in moments.PARTS:
            assert f"tuned {kernel!r} at TileKey(architecture=0" in printed
            assert f"part={part!r}" in printed


@pytest.mark.parametrize(
    ("candidates", "parts"), [("clip", ("inside",)), ("moment", ("across",)), ("both", ("across", "inside"))]
)
def test_a_part_that_no_subtask_has_is_left_out(candidates: Candidates, parts: tuple[str, ...]) -> None:
    problem = make_moment_problem(**Case(N=4, candidates=candidates).arguments())
    assert moments.MomentLaunch.of(problem).parts == parts
