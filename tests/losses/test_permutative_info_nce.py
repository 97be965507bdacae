"""The table of sub-tasks and the loss over all of them."""

from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avppc.losses.permutative_info_nce import FUSIONS, PairFusion, PermutativeInfoNCE
from avppc.losses.subtasks import ELEMENTS, SUBTASKS, SubTask

N, D = 6, 8


@pytest.fixture
def elements() -> list[Tensor]:
    """Four [N, D] embeddings: past and future seen, past and future heard."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N, D, generator=generator, requires_grad=True) for _ in ELEMENTS]


def test_subtasks_are_all_ordered_pairs_of_disjoint_sets_of_one_or_two_elements() -> None:
    subsets = [frozenset(s) for size in range(5) for s in itertools.combinations(ELEMENTS, size) if 1 <= len(s) <= 2]
    expected = {(a, b) for a in subsets for b in subsets if a.isdisjoint(b)}
    assert {(frozenset(s.inputs), frozenset(s.targets)) for s in SUBTASKS} == expected
    assert len(SUBTASKS) == len(expected) == 42


def test_subtasks_come_group_by_group_and_lexicographically_inside() -> None:
    assert Counter(s.group for s in SUBTASKS) == {"1to1": 12, "1to2": 12, "2to1": 12, "2to2": 6}
    groups = ["1to1", "1to2", "2to1", "2to2"]
    order = [
        (groups.index(s.group), [ELEMENTS.index(e) for e in s.inputs], [ELEMENTS.index(e) for e in s.targets])
        for s in SUBTASKS
    ]
    assert order == sorted(order)


def test_subtasks_are_named_by_their_elements() -> None:
    by_name = {s.name: s for s in SUBTASKS}
    assert len(by_name) == 42
    assert by_name["Vp,Ap->Vf"] == SubTask("Vp,Ap->Vf", ("Vp", "Ap"), ("Vf",), "2to1")
    assert SUBTASKS[0].name == "Vp->Vf"
    assert SUBTASKS[-1].name == "Ap,Af->Vp,Vf"


def test_an_element_is_in_as_many_subtasks_as_the_counting_says() -> None:
    contexts, targets = Counter(s.inputs for s in SUBTASKS), Counter(s.targets for s in SUBTASKS)
    for count in (contexts, targets):
        assert {len(elements): times for elements, times in count.items()} == {1: 6, 2: 3}
        assert len(count) == 10


def test_subtasks_between_modalities_have_one_modality_on_each_side() -> None:
    names = [s.name for s in SUBTASKS if s.between_modalities]
    assert len(names) == 18  # 3 sets seen, 3 sets heard, both ways
    assert "Vp->Ap" in names
    assert "Ap,Af->Vf" in names
    assert "Vp->Vf" not in names
    assert "Vp,Ap->Af" not in names


def expected_losses(loss_fn: PermutativeInfoNCE, elements: list[Tensor]) -> Tensor:
    """[K]: each sub-task written out for itself, from the paper's formula."""
    values = dict(zip(ELEMENTS, elements, strict=True))

    def embed(side: tuple[str, ...], fusion: PairFusion) -> Tensor:
        if len(side) == 1:
            return values[side[0]]
        a, b = (values[name] for name in side)
        if fusion.kind == "sum":
            return a + b
        p = fusion.pairs.index(side)
        hidden = torch.cat([a, b], 1) @ fusion.weight1[p] + fusion.bias1[p]
        return hidden if fusion.kind == "concat-linear" else F.relu(hidden) @ fusion.weight2[p] + fusion.bias2[p]

    losses = []
    for k, subtask in enumerate(loss_fn.subtasks):
        c, z = embed(subtask.inputs, loss_fn.context_fusion), embed(subtask.targets, loss_fn.target_fusion)
        if loss_fn.score.normalize == "layer_norm":
            c, z = ((x - x.mean(1, True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt() for x in (c, z))
        scores = torch.stack([torch.stack([z_j @ loss_fn.score.weight[k] @ c_i for z_j in z]) for c_i in c])
        scores = scores * loss_fn.score.scale
        losses.append(F.cross_entropy(scores, torch.arange(len(c))))
    return torch.stack(losses)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_loss_and_gradients_are_those_of_the_subtasks_written_out(
    elements: list[Tensor], fusion: str, normalize: str
) -> None:
    torch.manual_seed(1)
    loss_fn = PermutativeInfoNCE(D, fusion=fusion, normalize=normalize, learn_scale=True, scale=0.7).double()
    with torch.no_grad():  # away from the start, where W is the identity and the biases are zero
        for parameter in loss_fn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = [element.detach().double().requires_grad_() for element in elements]
    wanted = [*inputs, *loss_fn.parameters()]
    loss, stats = loss_fn(*inputs, return_stats=True)
    expected = expected_losses(loss_fn, inputs)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(stats.task_loss, expected.detach())
    for got, want in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected.mean(), wanted), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradient_reaches_every_parameter_and_every_element(elements: list[Tensor], fusion: str) -> None:
    torch.manual_seed(0)
    loss_fn = PermutativeInfoNCE(D, fusion=fusion, learn_scale=True)
    loss_fn(*elements).backward()
    for name, parameter in [*loss_fn.named_parameters(), *zip(ELEMENTS, elements, strict=True)]:
        assert parameter.grad is not None, name
        per_set = parameter.grad.flatten(1) if parameter.ndim > 2 else parameter.grad.reshape(1, -1)
        assert (per_set.abs().amax(1) > 0).all(), name


def test_task_weights_weigh_the_mean(elements: list[Tensor]) -> None:
    torch.manual_seed(0)
    weights = {s.name: 1.0 if s.between_modalities else 0.1 for s in SUBTASKS}
    plain = PermutativeInfoNCE(D)
    by_name = PermutativeInfoNCE(D, task_weights=weights)
    by_position = PermutativeInfoNCE(D, task_weights=list(weights.values()))
    by_name.load_state_dict(plain.state_dict())
    by_position.load_state_dict(plain.state_dict())
    _, stats = plain(*elements, return_stats=True)
    w = torch.tensor(list(weights.values()))
    expected = (w * stats.task_loss).sum() / w.sum()
    torch.testing.assert_close(by_name(*elements), expected)
    torch.testing.assert_close(by_position(*elements), expected)


def test_a_mapping_leaves_the_unnamed_at_one(elements: list[Tensor]) -> None:
    loss_fn = PermutativeInfoNCE(D, task_weights={"Vp->Vf": 0.25})
    assert loss_fn.score.task_weights == (0.25, *[1.0] * 41)


def test_a_subset_needs_only_its_own_elements(elements: list[Tensor]) -> None:
    loss_fn = PermutativeInfoNCE(D, subtasks=["Vp->Vf", SUBTASKS[3]])
    assert [s.name for s in loss_fn.subtasks] == ["Vp->Vf", "Vf->Vp"]
    loss, stats = loss_fn(elements[0], elements[1], None, None, return_stats=True)
    assert loss.shape == ()
    assert stats.task_loss.shape == (2,)
    assert sum(p.numel() for p in loss_fn.parameters()) == 2 * D * D
    with pytest.raises(TypeError, match=r"v_future must be a torch.Tensor \[N, 8\].*NoneType"):
        loss_fn(elements[0], None, None, None)


def test_identical_embeddings_cost_log_n_and_are_never_accurate() -> None:
    same = torch.ones(N, D)
    loss, stats = PermutativeInfoNCE(D)(same, same, same, same, return_stats=True)
    torch.testing.assert_close(loss, torch.tensor(math.log(N)))
    assert stats.accuracy.tolist() == [0.0] * 42


def test_perfect_alignment_drives_the_loss_to_zero() -> None:
    code = 10 * torch.eye(N, D)
    subtasks = [s for s in SUBTASKS if s.group == "1to1"]
    loss, stats = PermutativeInfoNCE(D, subtasks=subtasks)(code, code, code, code, return_stats=True)
    assert loss < 1e-6
    assert stats.accuracy.tolist() == [1.0] * 12


def test_clips_of_an_equal_id_are_no_negatives(elements: list[Tensor]) -> None:
    """Clip 0 twice: told so, its two rows see only the others, as if each were in a batch without the other."""
    torch.manual_seed(0)
    loss_fn = PermutativeInfoNCE(D)
    twice = [torch.cat([element, element[:1]]) for element in elements]
    _, told = loss_fn(*twice, torch.tensor([0, 1, 2, 3, 4, 5, 0]), return_stats=True)
    _, distinct = loss_fn(*twice, torch.arange(N + 1), return_stats=True)
    _, not_told = loss_fn(*twice, return_stats=True)
    torch.testing.assert_close(distinct, not_told)
    assert (told.task_loss < not_told.task_loss).all()
    alone = loss_fn(*twice, torch.zeros(N + 1, dtype=torch.int64))
    assert alone == 0


def test_state_dict_is_stable() -> None:
    """These names and shapes are in people's checkpoints."""
    state = PermutativeInfoNCE(D, learn_scale=True).state_dict()
    fusion = {"weight1": [6, 2 * D, D], "bias1": [6, 1, D], "weight2": [6, D, D], "bias2": [6, 1, D]}
    expected = {f"{role}_fusion.{name}": shape for role in ("context", "target") for name, shape in fusion.items()}
    expected |= {"score.weight": [42, D, D], "score.log_scale": [1]}
    assert {name: list(value.shape) for name, value in state.items()} == expected


def test_a_copy_sent_to_another_process_is_the_same_loss(elements: list[Tensor]) -> None:
    loss_fn = PermutativeInfoNCE(D, task_weights={"Vp->Vf": 0.0}, normalize="layer_norm", scale=2.0, return_stats=True)
    copy = pickle.loads(pickle.dumps(loss_fn))
    assert repr(copy) == repr(loss_fn)
    assert "initial_scale=2.0, learn_scale=False, normalize='layer_norm', task_weights=(0.0, 1.0, " in repr(copy)
    torch.testing.assert_close(copy(*elements), loss_fn(*elements))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_a_float32_loss_near_the_full_one(elements: list[Tensor], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    loss_fn = PermutativeInfoNCE(D, normalize="layer_norm")
    with torch.autocast("cpu", dtype):
        loss = loss_fn(*elements)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, loss_fn(*elements), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"subtasks": ["Vp->Vp"]}, ValueError, "subtasks must be taken from SUBTASKS.*'Vp->Vp'"),
        ({"subtasks": []}, ValueError, "subtasks must hold at least one"),
        ({"subtasks": ["Vp->Vf", "Vp->Vf"]}, ValueError, "subtasks must not repeat one, got 'Vp->Vf'"),
        ({"fusion": "product"}, ValueError, "fusion must be one of 'mlp', 'sum', 'concat-linear'; got 'product'"),
        ({"task_weights": [1.0] * 41}, ValueError, "task_weights must hold 42 weights, .*got 41"),
        ({"task_weights": {"Vp->Xf": 1.0}}, ValueError, "task_weights must name sub-tasks .*'Vp->Xf'"),
        ({"task_weights": [-1.0] * 42}, ValueError, "task_weights must be at least 0"),
        ({"task_weights": [0.0] * 42}, ValueError, "task_weights must hold a weight above 0"),
        ({"normalize": "l1"}, ValueError, "normalize must be one of 'none', 'layer_norm', 'l2'; got 'l1'"),
        ({"gather": "some"}, ValueError, "gather must be one of .*'some'"),
        ({"scale": 0.0}, ValueError, "scale must be above 0"),
        ({"subtasks": [3]}, TypeError, "subtasks must hold SubTask or names, got 3"),
        ({"subtasks": SUBTASKS[0]}, TypeError, "subtasks must be a sequence of SubTask or names, got SubTask"),
        ({"subtasks": "Vp->Vf"}, TypeError, "subtasks must be a sequence of SubTask or names, got 'Vp->Vf'"),
        ({"task_weights": 3}, TypeError, "task_weights must hold one number a sub-task, got 3"),
        ({"bogus": 1}, TypeError, "unexpected keyword argument 'bogus'"),
        ({"pairs": [(0, 0)]}, TypeError, "unexpected keyword argument 'pairs'"),
        ({"symmetric": 1}, TypeError, "symmetric must be True or False, got 1"),
        (
            {"swapped_negatives": True, "symmetric": True},
            ValueError,
            "swapped_negatives and symmetric must not both be True",
        ),
        ({"dim": 0}, ValueError, "dim must be from 1 to 1048576, got 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_settings_are_named(arguments: dict[str, object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        PermutativeInfoNCE(**{"dim": D, **arguments})


def test_wrong_elements_are_named(elements: list[Tensor]) -> None:
    loss_fn = PermutativeInfoNCE(D)
    with pytest.raises(ValueError, match=r"a_past must have shape \[6, 8\], got \[5, 8\]"):
        loss_fn(*elements[:2], elements[2][:5], elements[3])
    with pytest.raises(ValueError, match=r"v_past must have shape \[N > 0, 8\] or \[N > 0, T > 0, 8\], got \[0, 8\]"):
        loss_fn(*[element[:0] for element in elements])
    with pytest.raises(ValueError, match=r"v_future must have shape \[6, 8\], got \[6, 7\]"):
        loss_fn(elements[0], elements[1][:, 1:], *elements[2:])
    with pytest.raises(ValueError, match=r"v_past must have shape \[N > 0, 8\] or \[N > 0, T > 0, 8\], got \[\]"):
        loss_fn(torch.tensor(1.0), *elements[1:])
    with pytest.raises(TypeError, match=r"v_future must have dtype float32 like v_past .*got bfloat16"):
        loss_fn(elements[0], elements[1].bfloat16(), *elements[2:])
    with pytest.raises(TypeError, match=r"v_past must have one of the dtypes float32, .*got int64"):
        loss_fn(elements[0].long(), *elements[1:])
    with pytest.raises(TypeError, match=r"v_past must be a dense torch.Tensor, got layout torch.sparse_coo"):
        loss_fn(elements[0].to_sparse(), *elements[1:])
    with pytest.raises(ValueError, match="a_past must be on cpu like v_past, got meta"):
        loss_fn(*elements[:2], elements[2].to("meta"), elements[3])
    with pytest.raises(ValueError, match="embeddings must be on cpu like the module, got meta"):
        loss_fn(*[element.to("meta") for element in elements])
    for subtasks, name in ((["Vp,Ap->Vf"], "the elements' embeddings"), (["Vp->Vf"], "contexts")):
        with pytest.raises(TypeError, match=rf"{name} must have dtype float32 like the module .*got bfloat16"):
            PermutativeInfoNCE(D, subtasks=subtasks)(*[element.bfloat16() for element in elements])
    with pytest.raises(ValueError, match=r"clip_ids must have shape \[6\], one id a row; got \[5\]"):
        loss_fn(*elements, torch.arange(N - 1))


def test_autocast_takes_elements_of_several_dtypes(elements: list[Tensor]) -> None:
    loss_fn = PermutativeInfoNCE(D, fusion="sum")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss_fn(elements[0].bfloat16(), *elements[1:3], elements[3].half())
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, loss_fn(*elements), atol=0.05, rtol=0)
