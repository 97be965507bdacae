"""Which sub-tasks are learned, how they are weighed, and from what each target is told."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from task_cases import make_batch, make_config, make_numbered_batch

from avppc import SUBTASKS, PermutativeInfoNCE
from avppc.config import ObjectiveConfig
from avppc.losses.subtasks import (
    GradientNormWeighting,
    UncertaintyWeighting,
    choose_subtasks,
    fixed_weights,
    modality_group,
    task_gradients,
)
from avppc.tasks.permutative import PermutativeTask
from avppc.tasks.registry import make_task
from avppc.tasks.visual import ChunkTask


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def names(chosen: str = "", excluded: str = "") -> list[str]:
    return [task.name for task in choose_subtasks(SUBTASKS, chosen, excluded)]


def test_groups_and_names_are_chosen_in_the_order_of_the_42() -> None:
    assert names() == [task.name for task in SUBTASKS]
    assert names("1to1,2to2") == [task.name for task in SUBTASKS if task.group in ("1to1", "2to2")]
    assert len(names("2to2,1to1", "Ap->Af")) == 17
    assert names("Vp,Ap->Vf, Vp->Vf") == ["Vp->Vf", "Vp,Ap->Vf"]
    assert names("Vp,Ap->Vf,Af") == ["Vp,Ap->Vf,Af"]
    assert names("Vp->Ap,Af,2to2", "2to2") == ["Vp->Ap,Af"]
    assert len(names("between")) == 18
    assert sorted(len(names(group)) for group in ("between", "within", "mixed")) == [4, 18, 20]
    assert {modality_group(task) for task in SUBTASKS if task.between_modalities} == {"between"}


@pytest.mark.parametrize(
    ("chosen", "excluded", "message"),
    [
        ("3to1", "", "subtasks must hold groups .* got '3to1'"),
        ("Vp->Vp", "", "subtasks must hold groups"),
        ("1to1,,2to2", "", "subtasks must hold groups"),
        ("Ap->Vp,Vf,Af->Vp", "", "can be read as Ap->Vp and Vf,Af->Vp or Ap->Vp,Vf and Af->Vp"),
        ("", "Ap->Vz", "exclude must hold groups"),
        ("1to1", "1to1", "leaves no sub-task to learn"),
    ],
)
def test_bad_choices_are_refused_by_name(chosen: str, excluded: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        names(chosen, excluded)


def test_task_learns_the_chosen_subtasks_alone() -> None:
    config = make_config("av-permutative", subtasks="1to1,2to2", exclude="Ap->Af")
    task = make_task("av-permutative", config).train()
    output = task(make_batch(), generator())
    assert output.metrics["task_loss"].shape == (17,)
    assert "Ap->Af" not in task.describe()["task_accuracy"]
    with pytest.raises(ValueError, match="are settings of the permutative tasks, task is 'time-arrow'"):
        make_task("time-arrow", make_config("time-arrow", exclude="1to1"))
    with pytest.raises(ValueError, match="must use pictures"):
        make_task("av-permutative", make_config("av-permutative", subtasks="Ap->Af"))


def test_visual_permutative_never_hears() -> None:
    torch.manual_seed(0)
    task = make_task("visual-permutative", make_config("visual-permutative")).train()
    assert not any("audio" in name for name, _ in task.named_parameters())
    assert task.describe()["task_loss"] == ["Vp->Vf", "Vf->Vp"]
    batch = make_batch()
    silent = dataclasses.replace(batch, audio=torch.zeros_like(batch.audio))
    assert torch.equal(task(batch, generator()).loss, task(silent, generator()).loss)


def test_four_chunks_lie_apart_and_in_order() -> None:
    torch.manual_seed(0)
    task = ChunkTask(make_config("visual-permutative", objective={"chunks": 4})).train()
    assert len(task.describe()["task_loss"]) == 42
    assert task.describe()["task_loss"][0] == "V1->V2"
    assert not any("A" in name or "p" in name for name in task.describe()["task_loss"])
    for seed in range(10):
        chunks = task.cut_chunks(make_numbered_batch(5), generator(seed))[:, :, 0, 0].int()
        clips, frames = (chunks // 32).unflatten(0, (4, 5)), (chunks % 32).unflatten(0, (4, 5))
        assert (clips == torch.arange(5)[None, :, None]).all()
        assert (frames.amin((1, 2))[1:] > frames.amax((1, 2))[:-1]).all()
    chosen = make_config("visual-permutative", objective={"chunks": 4}, subtasks="V1,V2->V3", exclude="")
    assert ChunkTask(chosen).describe()["task_loss"] == ["V1,V2->V3"]


def test_fixed_weights_are_what_they_say() -> None:
    equal = fixed_weights(ObjectiveConfig(weighting="equal"), SUBTASKS)
    assert equal == [1.0] * 42
    by_group = fixed_weights(ObjectiveConfig(weighting="group", group_weights=(1.0, 2.0, 3.0, 0.0)), SUBTASKS)
    assert by_group is not None
    totals = [sum(w for w, t in zip(by_group, SUBTASKS, strict=True) if t.group == g) for g in ("1to1", "1to2", "2to1")]
    assert totals == pytest.approx([1.0, 2.0, 3.0])
    assert by_group[-1] == 0.0
    for moments, names in (
        ("clip", ["Vp,Vf->Ap,Af", "Ap,Af->Vp,Vf"]),
        ("element", ["Vp->Ap", "Vf->Af", "Ap->Vp", "Af->Vf"]),
    ):
        config = ObjectiveConfig(other_weight=0.25, moments=moments, moment_share=0.75, moment_offsets=())
        by_moment = dict(zip([task.name for task in SUBTASKS], fixed_weights(config, SUBTASKS), strict=True))
        assert sorted(by_moment, key=by_moment.get)[-len(names) :] == sorted(names, key=list(by_moment).index)
        assert sum(by_moment[name] for name in names) == pytest.approx(0.75 * sum(by_moment.values()))
    alone = fixed_weights(ObjectiveConfig(moment_share=1.0, moment_offsets=()), SUBTASKS)
    assert [task.name for weight, task in zip(alone, SUBTASKS, strict=True) if weight] == [
        "Vp,Vf->Ap,Af",
        "Ap,Af->Vp,Vf",
    ]
    for share in (0.6, 1.0):
        config = ObjectiveConfig(moment_share=share, offset_share=0.25)
        shares = dict(zip([task.name for task in SUBTASKS], fixed_weights(config, SUBTASKS), strict=True))
        total = sum(shares.values())
        assert [shares[name] / total for name in ("Vp,Vf->Ap,Af", "Ap,Af->Vp,Vf")] == pytest.approx([0.375 * share] * 2)
        at_offsets = [shares[name] / total for name in ("Vp->Af", "Vf->Ap", "Ap->Vf", "Af->Vp")]
        assert at_offsets == pytest.approx([0.0625 * share] * 4)
    crossing = fixed_weights(ObjectiveConfig(), choose_subtasks(SUBTASKS, "Vp->Af,Vf->Ap"))
    assert crossing == pytest.approx([0.5, 0.5])
    between = fixed_weights(ObjectiveConfig(other_weight=0.25, moments="none"), SUBTASKS)
    assert between == [1.0 if task.between_modalities else 0.25 for task in SUBTASKS]
    assert fixed_weights(ObjectiveConfig(weighting="uncertainty"), SUBTASKS) is None


def test_uncertainty_settles_where_the_derivation_says() -> None:
    """The best s of exp(-s) loss + s / 2 is ln(2 loss): the weight of a loss is half its inverse."""
    losses = torch.tensor([0.5, 2.0, 4.0])
    weighting = UncertaintyWeighting(3)
    optimizer = torch.optim.Adam(weighting.parameters(), 0.05)
    for _ in range(500):
        optimizer.zero_grad()
        weighting(losses, []).backward()
        optimizer.step()
    torch.testing.assert_close((-weighting.log_variance).exp().detach(), 0.5 / losses, rtol=1e-2, atol=0)
    assert weighting.weights().mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_gradient_norm_makes_every_subtask_pull_alike(power: float) -> None:
    torch.manual_seed(0)
    embedding = torch.randn(5, requires_grad=True)
    scales = torch.tensor([0.1, 1.0, 20.0])
    losses = scales * torch.stack([embedding.square().sum(), embedding.sum().square(), embedding.exp().sum()])
    weighting = GradientNormWeighting(3, power).train()
    weighting(losses, [embedding])
    pulls = torch.stack([g.norm() for g in task_gradients(losses, [embedding])]) * weighting.weights()
    wanted = (losses.detach() / losses.detach().mean()) ** power
    torch.testing.assert_close(pulls / pulls.mean(), wanted / wanted.mean())
    assert weighting.weights().mean().item() == pytest.approx(1.0)
    before = weighting.weights().clone()
    weighting.eval()(losses * torch.tensor([1.0, 9.0, 1.0]), [embedding])
    assert torch.equal(weighting.weights(), before)


@pytest.mark.parametrize("kind", ["uncertainty", "gradient-norm"])
def test_learned_weights_are_logged_and_kept(kind: str) -> None:
    torch.manual_seed(0)
    config = make_config("av-permutative", objective={"weighting": kind})
    task = make_task("av-permutative", config).train()
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)
    for step in range(3):
        output = task(make_batch(), generator(step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    weights = task(make_batch(), generator()).metrics["task_weight"]
    assert weights.shape == (42,)
    assert weights.std() > 0
    restored = make_task("av-permutative", config)
    restored.load_state_dict(task.state_dict())
    assert isinstance(restored, PermutativeTask)
    assert restored.weighting is not None
    assert torch.equal(restored.weighting.weights(), weights)


def test_swapped_negatives_are_past_and_future_the_wrong_way_round() -> None:
    """Vp->Vf is also told from every Vp: the loss of the concatenated candidates, written out."""
    torch.manual_seed(0)
    elements = [torch.randn(5, 8) for _ in range(4)]
    loss_fn = PermutativeInfoNCE(8, subtasks=["Vp->Vf", "Ap->Vf,Af"], swapped_negatives=True, reduction="task")
    losses = loss_fn(*elements)
    v_past, v_future, a_past, a_future = elements
    first, second = loss_fn.score.weight
    logits = (v_past @ first.T) @ torch.cat([v_future, v_past]).T
    fused = [loss_fn.target_fusion({"Vf": v, "Af": a})[0] for v, a in ((v_future, a_future), (v_past, a_past))]
    logits = torch.stack([logits, (a_past @ second.T) @ torch.cat(fused).T])
    expected = torch.stack([torch.nn.functional.cross_entropy(s, torch.arange(5)) for s in logits])
    torch.testing.assert_close(losses, expected)
    # with ids, clips of one id are no negatives of each other, but a clip's own swapped past still is
    with_ids = loss_fn(*elements, torch.tensor([4, 7, 4, 8, 9]))
    masked = logits.clone()
    masked[:, 0, 2] = masked[:, 2, 0] = -math.inf
    expected = torch.stack([torch.nn.functional.cross_entropy(s, torch.arange(5)) for s in masked])
    torch.testing.assert_close(with_ids, expected)
    with pytest.raises(TypeError, match="swapped_negatives must be True or False"):
        PermutativeInfoNCE(8, swapped_negatives=1)


@pytest.mark.parametrize("ids", [[-(2**63), 1, 2, 3], [-(2**63)] * 2 + [7, 7], [2**63 - 1, -1, 0, -(2**63)]])
def test_swapped_negatives_take_any_clip_id(ids: list[int]) -> None:
    """As a missing number reads as an integer: no id means "nobody"."""
    torch.manual_seed(0)
    elements = torch.randn(4, 4, 8).unbind()
    loss_fn = PermutativeInfoNCE(8, swapped_negatives=True)
    small = [sorted(set(ids)).index(value) for value in ids]
    expected = loss_fn(*elements, torch.tensor(small))
    torch.testing.assert_close(loss_fn(*elements, torch.tensor(ids)), expected, rtol=0, atol=0)


def test_swapped_negatives_need_the_other_time_of_each_target() -> None:
    loss_fn = PermutativeInfoNCE(8, subtasks=["Vp->Af"], swapped_negatives=True)
    assert loss_fn.elements == ["Vp", "Af"]
    with pytest.raises(TypeError, match="a_past must be a"):
        loss_fn(torch.randn(3, 8), None, None, torch.randn(3, 8))


@pytest.mark.parametrize("leave_out", ["none", "clip", "word"])
def test_false_negatives_are_left_out(leave_out: str) -> None:
    config = make_config("av-permutative", objective={"leave_out": leave_out, "moment_offsets": ()}, subtasks="Vp->Af")
    torch.manual_seed(0)
    task = PermutativeTask(config, choose_subtasks(SUBTASKS, "Vp->Af")).eval()
    batch = dataclasses.replace(
        make_batch(6), clip_ids=torch.tensor([5, 6, 5, 7, 8, 9]), labels=torch.tensor([0, 1, -1, -1, 1, 2])
    )
    seen, _, _, heard = task.represent(batch, generator())
    assert seen is not None
    assert heard is not None
    seen, heard = (torch.nn.functional.layer_norm(value, value.shape[-1:]) for value in (seen, heard))
    logits = task.loss.score.scale * (seen @ task.loss.score.weight[0].T) @ heard.T
    left_out = {"none": [], "clip": [(0, 2), (2, 0)], "word": [(1, 4), (4, 1)]}[leave_out]  # -1 is no word
    for row, column in left_out:
        logits[row, column] = -math.inf
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(6))
    torch.testing.assert_close(task(batch, generator()).loss, expected)


def test_same_clip_negatives_reach_the_loss() -> None:
    torch.manual_seed(0)
    task = make_task("av-permutative", make_config("av-permutative", objective={"negatives": "same-clip"})).eval()
    loss = task(make_batch(6), generator()).loss.item()
    assert abs(loss - math.log(12)) < 0.8
