"""PermutativeInfoNCE over elements that have moments."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_permutative_info_nce import expected_losses
from torch import Tensor

from avppc import moment_info_nce
from avppc.losses.permutative_info_nce import PermutativeInfoNCE
from avppc.losses.subtasks import ELEMENTS, OTHER_TIME, SUBTASKS

N, T, D = 5, 4, 8
SAME_TIME = ["Vp->Ap", "Vf->Af", "Ap->Vp", "Af->Vf"]


def make_elements(moments: int = T, seed: int = 0) -> list[Tensor]:
    """Four [N, T, D] float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, moments, D, generator=generator, dtype=torch.float64).requires_grad_() for _ in ELEMENTS]


def make_loss(**settings: object) -> PermutativeInfoNCE:
    torch.manual_seed(1)
    loss = PermutativeInfoNCE(D, **settings).double()
    with torch.no_grad():  # away from the start, where W is the identity and the biases are zero
        for parameter in loss.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return loss


def written_out(loss: PermutativeInfoNCE, elements: list[Tensor]) -> Tensor:
    """[K]: spans as means of their moments, and the sub-tasks by moments one moment at a time."""
    losses = list(expected_losses(loss, [element.mean(1) for element in elements]))
    by_name = dict(zip(ELEMENTS, elements, strict=True))

    def normalised(x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,)) if loss.score.normalize == "layer_norm" else x

    for k, subtask in enumerate(loss.subtasks):
        if subtask.name not in SAME_TIME:
            continue
        c, z = normalised(by_name[subtask.inputs[0]]), normalised(by_name[subtask.targets[0]])
        swapped = normalised(by_name[OTHER_TIME[subtask.targets[0]]])
        rows = []
        for n, t in itertools.product(range(N), range(c.shape[1])):
            own = torch.cat([z[n], swapped[n]]) if loss.swapped_negatives else z[n]
            others = z[[m for m in range(N) if m != n], t]
            candidates = {
                "clip": own,
                "moment": torch.cat([z[n, t : t + 1], others]),
                "both": torch.cat([own, others]),
            }[loss.score.candidates]
            truth = 0 if loss.score.candidates == "moment" else t
            scores = loss.score.scale * (candidates @ loss.score.weight[k] @ c[n, t])
            rows.append(F.cross_entropy(scores[None], torch.tensor([truth])))
        losses[k] = torch.stack(rows).mean()
    return torch.stack(losses)


@pytest.mark.parametrize("candidates", ["clip", "moment", "both"])
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_loss_and_gradients_are_those_of_the_moments_written_out(candidates: str, normalize: str) -> None:
    weights = [1.0 + k % 3 for k in range(len(SUBTASKS))]
    loss = make_loss(candidates=candidates, normalize=normalize, learn_scale=True, scale=0.7, task_weights=weights)
    elements = make_elements()
    wanted = [*elements, *loss.parameters()]
    got, stats = loss(*elements, return_stats=True)
    each = written_out(loss, elements)
    expected = (each * torch.tensor(weights)).sum() / sum(weights)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(stats.task_loss, each.detach())
    for a, b in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_swapped_negatives_are_the_moments_of_the_other_time() -> None:
    loss = make_loss(subtasks=SAME_TIME, swapped_negatives=True)
    elements = make_elements()
    torch.testing.assert_close(loss(*elements), written_out(loss, elements).mean())


@pytest.mark.parametrize("subtasks", [["Vp->Af", "Vp->Ap", "Vf,Af->Vp"], SAME_TIME, ["Vp->Vf", "Af->Ap"]])
@pytest.mark.parametrize("swapped", [False, True])
def test_reductions_agree_in_the_order_of_the_subtasks(subtasks: list[str], swapped: bool) -> None:
    elements = make_elements()
    by_reduction = {}
    for reduction in ("mean", "task", "none"):
        loss = make_loss(subtasks=subtasks, swapped_negatives=swapped, reduction=reduction)
        by_reduction[reduction] = loss(*elements)
    assert by_reduction["none"].shape == (len(subtasks), N)
    torch.testing.assert_close(by_reduction["none"].mean(1), by_reduction["task"])
    torch.testing.assert_close(by_reduction["task"].mean(), by_reduction["mean"])
    if not swapped:
        torch.testing.assert_close(by_reduction["task"], written_out(loss, elements))


def test_one_moment_among_those_of_other_clips_is_an_element_without_moments() -> None:
    loss = make_loss(candidates="both")
    elements = make_elements(moments=1)
    torch.testing.assert_close(loss(*elements), loss(*(element[:, 0] for element in elements)))


def test_float32_on_the_compiled_backend_is_the_reference() -> None:
    elements = [element.detach().float() for element in make_elements()]
    results = []
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        loss = PermutativeInfoNCE(D, candidates="both", swapped_negatives=True, backend=backend)
        results.append(loss(*elements, torch.tensor([0, 1, 1, 2, 3]), return_stats=True))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1].task_loss, results[1][1].task_loss)
    torch.testing.assert_close(results[0][1].accuracy, results[1][1].accuracy)


def test_weights_of_zero_leave_out_either_kind() -> None:
    elements = make_elements()
    for names in (SAME_TIME, ["Vp->Vf", "Vp,Vf->Ap"]):
        alone = make_loss(subtasks=names)
        every = make_loss(task_weights={s.name: float(s.name in names) for s in SUBTASKS})
        every.score.weight.data[[s.name in names for s in SUBTASKS]] = alone.score.weight.data
        for side in ("context_fusion", "target_fusion"):
            mine, other = getattr(alone, side), getattr(every, side)
            for place, pair in enumerate(mine.pairs):
                for name, value in mine.named_parameters():
                    getattr(other, name).data[other.pairs.index(pair)] = value.data[place]
        torch.testing.assert_close(alone(*elements), every(*elements))


def make_clips(moments: int = 6) -> dict[str, Tensor]:
    first, second = make_elements(moments, seed=5)[:2]
    return {"v_clip": first, "a_clip": second}


@pytest.mark.parametrize("candidates", ["clip", "both"])
@pytest.mark.parametrize("spans", [False, True], ids=["moments", "spans"])
def test_whole_clips_are_scored_by_their_moments(candidates: str, spans: bool) -> None:
    """All seen and all heard: the operator's own losses, with W of the two sub-tasks; the others are as without."""
    loss = make_loss(candidates=candidates, normalize="layer_norm", reduction="task", learn_scale=True)
    elements = [element[:, 0] for element in make_elements()] if spans else make_elements()
    clips = make_clips()
    names = [subtask.name for subtask in SUBTASKS]
    expected = loss(*elements)
    for name, sides in (("Vp,Vf->Ap,Af", ("v_clip", "a_clip")), ("Ap,Af->Vp,Vf", ("a_clip", "v_clip"))):
        c, z = (F.layer_norm(clips[side], (D,)) for side in sides)
        k = names.index(name)
        expected[k] = moment_info_nce(c, z, loss.score.weight[k], candidates=candidates, scale=loss.score.scale)
    torch.testing.assert_close(loss(*elements, **clips), expected)
    for value in (loss(*elements, **clips)).unbind():
        value.backward(retain_graph=True)
    assert all(clip.grad is not None and clip.grad.any(2).all() for clip in clips.values())


CROSSING = {"Vp->Af": 1, "Vf->Ap": -1, "Ap->Vf": 1, "Af->Vp": -1}
"""Sub-tasks that moment_offsets score, and whether the target lies later or earlier."""


def at_offsets(loss: PermutativeInfoNCE, name: str, clips: dict[str, Tensor]) -> Tensor:
    """The loss of one of CROSSING, one moment of one clip at a time."""
    k, means = [subtask.name for subtask in loss.subtasks].index(name), []
    c, z = (F.layer_norm(clips["v_clip" if side[0] == "V" else "a_clip"], (D,)) for side in name.split("->"))
    for way, offset in enumerate(loss.moment_offsets):
        if way == 0:
            weight = loss.score.weight[k]
        else:
            assert loss.score.further_weight is not None
            weight = loss.score.further_weight[way - 1, [*CROSSING].index(name)]
        rows, shift = [], CROSSING[name] * offset
        times = [t for t in range(z.shape[1]) if 0 <= t + shift < z.shape[1]]
        for n, t in itertools.product(range(N), times):
            candidates = z[n, [u + shift for u in times]]
            scores = loss.score.scale * (candidates @ weight @ c[n, t])
            rows.append(F.cross_entropy(scores[None], torch.tensor([times.index(t)])))
        means.append(torch.stack(rows).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize("offsets", [(2,), (1, 3, 4)])
def test_moments_at_offsets_are_those_written_out(offsets: tuple[int, ...]) -> None:
    loss = make_loss(normalize="layer_norm", reduction="task", learn_scale=True, moment_offsets=offsets)
    elements, clips = [element[:, 0] for element in make_elements()], make_clips()
    names = [subtask.name for subtask in SUBTASKS]
    # the others are as without offsets
    without = make_loss(normalize="layer_norm", reduction="task", learn_scale=True)
    without.load_state_dict({key: value for key, value in loss.state_dict().items() if "further" not in key})
    expected = without(*elements, **clips)
    for name in CROSSING:
        expected[names.index(name)] = at_offsets(loss, name, clips)
    got, stats = loss(*elements, **clips, return_stats=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(stats.task_loss, expected.detach())
    crossing = [names.index(name) for name in CROSSING]
    wanted = [*clips.values(), *loss.score.parameters()]
    gradients = (torch.autograd.grad(losses[crossing].sum(), wanted) for losses in (got, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    rows = make_loss(normalize="layer_norm", reduction="none", learn_scale=True, moment_offsets=offsets)
    torch.testing.assert_close(rows(*elements, **clips).mean(1), got)
    mean = make_loss(normalize="layer_norm", learn_scale=True, moment_offsets=offsets)
    torch.testing.assert_close(mean(*elements, **clips), got.mean())


def test_logits_of_moments_at_offsets_are_means_over_them() -> None:
    loss = make_loss(scale=0.5, moment_offsets=(1, 3))
    clips = make_clips()
    logits = loss.logits(*(element[:, 0] for element in make_elements()), **clips)
    seen, heard = clips["v_clip"], clips["a_clip"]
    k = [subtask.name for subtask in SUBTASKS].index("Af->Vp")
    assert loss.score.further_weight is not None
    ways = [(1, loss.score.weight[k]), (3, loss.score.further_weight[0, [*CROSSING].index("Af->Vp")])]
    for n, m in itertools.product(range(N), range(N)):
        scores = [(seen[m, :-o] * (heard[n, o:] @ weight.T)).sum(1).mean() for o, weight in ways]
        torch.testing.assert_close(logits[k, n, m], 0.5 * torch.stack(scores).mean())


def test_offsets_need_moments_that_far() -> None:
    loss = PermutativeInfoNCE(D, moment_offsets=(2, 6))
    elements = [element.detach()[:, 0].float() for element in make_elements()]
    clips = {name: clip.detach().float() for name, clip in make_clips().items()}
    with pytest.raises(ValueError, match="v_clip must have more moments than moment_offsets reach, 6; got 6"):
        loss(*elements, **clips)
    without = PermutativeInfoNCE(D)
    without.load_state_dict({key: value for key, value in loss.state_dict().items() if "further" not in key})
    torch.testing.assert_close(loss(*elements), without(*elements))  # scored by spans, as without offsets
    PermutativeInfoNCE(D, moment_offsets=(6,), subtasks=["Vp->Vf"])(*elements, **clips)  # it has no such sub-task
    for offsets, message in (((0,), "moment_offsets must be from 1 to 10000, got 0"), ((2, 2), "must be different")):
        with pytest.raises(ValueError, match=message):
            PermutativeInfoNCE(D, moment_offsets=offsets)
    with pytest.raises(TypeError, match="moment_offsets must be a sequence of integers, got 2"):
        PermutativeInfoNCE(D, moment_offsets=2)


def test_whole_clips_must_match_the_elements() -> None:
    loss = PermutativeInfoNCE(D)
    elements = [element.detach().float() for element in make_elements()]
    clips = {name: clip.detach().float() for name, clip in make_clips().items()}
    with pytest.raises(ValueError, match="v_clip and a_clip must be given together; a_clip is None"):
        loss(*elements, v_clip=clips["v_clip"])
    with pytest.raises(ValueError, match=r"a_clip must have shape \[5, 6, 8\], got \[5, 5, 8\]"):
        loss(*elements, v_clip=clips["v_clip"], a_clip=clips["a_clip"][:, 1:])
    with pytest.raises(ValueError, match=r"v_clip must have shape \[5, T > 0, 8\], got \[4, 6, 8\]"):
        loss(*elements, v_clip=clips["v_clip"][1:], a_clip=clips["a_clip"][1:])


@pytest.mark.parametrize("swapped", [False, True])
def test_logits_of_moments_are_means_over_them(swapped: bool) -> None:
    loss = make_loss(normalize="layer_norm", scale=0.5)
    elements = make_elements()
    logits = loss.logits(*elements, swapped=swapped)
    k = [s.name for s in SUBTASKS].index("Vf->Af")
    c, z = (F.layer_norm(elements[e], (D,)) for e in (1, 3))
    expected = torch.stack(
        [torch.stack([(z[m] * (c[n] @ loss.score.weight[k].T)).sum(1).mean() for m in range(N)]) for n in range(N)]
    )
    torch.testing.assert_close(logits[k, :, :N], 0.5 * expected)
    assert logits.shape == (len(SUBTASKS), N, N * (1 + swapped))
    span = loss.logits(*(element.mean(1) for element in elements), swapped=swapped)
    torch.testing.assert_close(logits[0], span[0])


def test_elements_that_do_not_match_are_refused() -> None:
    loss = PermutativeInfoNCE(D)
    elements = [element.detach().float() for element in make_elements()]
    with pytest.raises(ValueError, match=r"a_past must have shape \[5, 4, 8\], got \[5, 3, 8\]"):
        loss(*elements[:2], elements[2][:, :3], elements[3])
    with pytest.raises(ValueError, match=r"v_future must have shape \[5, 4, 8\], got \[5, 8\]"):
        loss(elements[0], elements[1][:, 0], *elements[2:])
    with pytest.raises(ValueError, match="candidates must be one of 'clip', 'moment', 'both'; got 'all'"):
        PermutativeInfoNCE(D, candidates="all")
    with pytest.raises(ValueError, match="symmetric"):
        PermutativeInfoNCE(D, symmetric=True)(*elements)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # of torch.compile, about torch
def test_it_compiles_whole() -> None:
    torch.manual_seed(0)
    loss = PermutativeInfoNCE(D, candidates="both", normalize="layer_norm", learn_scale=True, moment_offsets=(1, 2))
    inputs = [element.detach()[:, 0].float().requires_grad_() for element in make_elements()]
    clips = {name: clip.detach().float().requires_grad_() for name, clip in make_clips().items()}
    wanted = [*inputs, *clips.values(), *loss.parameters()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = loss(*inputs, **clips), compiled(*inputs, **clips)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(a, b)
