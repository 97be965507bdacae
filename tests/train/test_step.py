"""The gradients of a step: in parts, with less memory, and left out."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools

import pytest
import torch
from task_cases import CONFIG, make_batch
from torch import nn

from avppc.clip import ClipBatch
from avppc.config import EncoderConfig, ObjectiveConfig, PretrainConfig, ScaleConfig
from avppc.draws import ClipGenerator
from avppc.models.backbones import use_activation_checkpointing
from avppc.models.batch_norm import frozen_statistics
from avppc.tasks import registry
from avppc.tasks.base import ProxyTask
from avppc.tasks.baselines import MultiwayTask
from avppc.tasks.permutative import PermutativeTask
from avppc.tasks.visual import ChunkTask
from avppc.train.distributed import GradientAverager, Processes
from avppc.train.log import Meter
from avppc.train.step import (
    BatchSlices,
    GradientComputer,
    TrainingStep,
    make_optimizer,
    prepare_model,
    slices_of,
    step_unless,
)

PARTS, CLIPS = 3, 4  # clips a part
ALONE = Processes(0, 1, torch.device("cpu"))


def make_task(kind: type[ProxyTask] = PermutativeTask, config: PretrainConfig = CONFIG) -> ProxyTask:
    torch.manual_seed(0)
    return kind(config).train()


def make_batches() -> list[ClipBatch]:
    whole = make_batch(PARTS * CLIPS)
    return [whole[part * CLIPS : (part + 1) * CLIPS] for part in range(PARTS)]


def draws(part: int) -> ClipGenerator:
    torch.manual_seed(part)  # for dropout
    return ClipGenerator(9, part * CLIPS, CLIPS)


def cached_gradients(task: ProxyTask) -> dict[str, torch.Tensor]:
    computer = GradientComputer(task, GradientAverager(task.parameters(), ALONE), contextlib.nullcontext)
    (output,), clip_ids = computer.cached(iter(make_batches()), PARTS, draws)
    assert clip_ids.tolist() == list(range(PARTS * CLIPS))
    return {"loss": output["loss"], **gradients_of(task)}


def gradients_of(task: ProxyTask) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in task.named_parameters() if parameter.grad is not None}


def at_once(task: ProxyTask) -> dict[str, torch.Tensor]:
    """One loss over all parts, everything kept: what the cached step must equal."""
    batches = make_batches()
    pieces = [task.represent(batch, draws(part)) for part, batch in enumerate(batches)]
    whole = [torch.cat(column) for column in zip(*pieces, strict=True)]
    numbers = ClipBatch(
        **{
            field.name: torch.cat([getattr(batch, field.name) for batch in batches])
            for field in dataclasses.fields(ClipBatch)
        }
    )
    loss = task.score(whole, numbers).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(task)}


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("kind", [PermutativeTask, ChunkTask])
def test_cached_gradients_are_those_of_the_one_large_loss(kind: type[ProxyTask]) -> None:
    expected_task, task = make_task(kind), make_task(kind)
    assert_close(cached_gradients(task), at_once(expected_task))
    # the statistics count each batch once, although each passes twice
    assert_close(dict(task.named_buffers()), dict(expected_task.named_buffers()))


def test_cached_gradients_with_labels_that_leave_out_negatives() -> None:
    config = dataclasses.replace(CONFIG, objective=ObjectiveConfig(dim=16, leave_out="word"))
    got, everything = cached_gradients(make_task(config=config)), cached_gradients(make_task())
    assert_close(got, at_once(make_task(config=config)))
    assert got["loss"] < everything["loss"]


def test_cached_step_without_batch_statistics_equals_the_plain_large_step() -> None:
    plain = frozen_norms(make_task())
    batches = make_batches()
    whole = ClipBatch(
        **{
            field.name: torch.cat([getattr(batch, field.name) for batch in batches])
            for field in dataclasses.fields(ClipBatch)
        }
    )
    loss = plain(whole, ClipGenerator(9, 0, PARTS * CLIPS)).loss
    loss.backward()
    assert_close(cached_gradients(frozen_norms(make_task())), {"loss": loss.detach(), **gradients_of(plain)})


def frozen_norms(task: ProxyTask) -> ProxyTask:
    """The task, its batch norms in eval mode: then no clip touches another before the loss."""
    for module in task.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return task


def sliced(task: ProxyTask, count: int) -> dict[str, torch.Tensor]:
    """Loss and gradients of half the loss of one batch, which passes through the encoders in slices."""
    slices = BatchSlices(task, count, contextlib.nullcontext)
    output = slices.backward(make_batch(PARTS * CLIPS), ClipGenerator(9, 0, PARTS * CLIPS), 2, lambda name: None)
    return {"loss": output.loss.detach(), **gradients_of(task)}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", [PermutativeTask, MultiwayTask, ChunkTask])
def test_slices_give_the_gradients_of_the_whole_batch(kind: type[ProxyTask], count: int) -> None:
    whole = frozen_norms(make_task(kind))
    loss = whole(make_batch(PARTS * CLIPS), ClipGenerator(9, 0, PARTS * CLIPS)).loss
    (loss / 2).backward()
    assert_close(sliced(frozen_norms(make_task(kind)), count), {"loss": loss.detach(), **gradients_of(whole)})


def test_batch_norms_see_a_slice_and_their_statistics_are_the_mean() -> None:
    task, twin = make_task(), make_task()
    copies = [copy.deepcopy(twin) for _ in range(PARTS)]
    got = sliced(task, PARTS)
    assert_close({"loss": got["loss"]}, {"loss": at_once(twin)["loss"]})  # whose parts have the same clips
    for number, each in enumerate(copies):
        each.represent(make_batch(PARTS * CLIPS)[number * CLIPS : (number + 1) * CLIPS], draws(number))
    for name, value in task.named_buffers():
        every = [dict(each.named_buffers())[name] for each in copies]
        expected = torch.stack(every).mean(0) if value.is_floating_point() else every[0]
        torch.testing.assert_close(value, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_slices_give_the_same_bits_again() -> None:
    first, *others = (sliced(make_task(), 2) for _ in range(3))
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("changes", "slices"),
    [
        ({}, 2),
        ({"scale": ScaleConfig(batch_slices=3)}, 3),
        ({"scale": ScaleConfig(batch_slices=1)}, None),
        ({"scale": ScaleConfig(cached_negatives=True)}, None),
        ({"scale": ScaleConfig(activation_checkpointing=True)}, None),
        ({"scale": ScaleConfig(batch_slices=5), "batch_size": 4}, None),
        ({"task": "time-arrow"}, None),
    ],
    ids=["default", "three", "whole", "cached", "checkpointing", "more than clips", "no representations"],
)
def test_which_batches_are_cut(changes: dict[str, object], slices: int | None) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    task = registry.make_task(config.task, config)
    assert slices_of(config, task, ALONE) == slices
    assert slices_of(config, task, Processes(0, 2, torch.device("cpu"))) is None
    assert slices_of(config, task, Processes(0, 1, torch.device("meta"))) is None


def test_cached_step_repeats_dropout() -> None:
    def with_dropout() -> ProxyTask:
        task = make_task()
        task.video_encoder.project.append(nn.Dropout(0.5))
        return task

    assert_close(cached_gradients(with_dropout()), at_once(with_dropout()))


@pytest.mark.parametrize(
    "encoder",
    [EncoderConfig(width=4, features=16), EncoderConfig("resnet10", 8, "small", features=16)],
    ids=lambda encoder: encoder.backbone,
)
def test_activation_checkpointing_changes_nothing_but_memory(encoder: EncoderConfig) -> None:
    config = dataclasses.replace(CONFIG, encoder=encoder)
    plain, saving = make_task(config=config), make_task(config=config)
    names = list(saving.state_dict())
    use_activation_checkpointing(saving)
    assert list(saving.state_dict()) == names
    held = {}
    for name, task in (("plain", plain), ("saving", saving)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.nbytes) or x, lambda x: x):
            loss = task(make_batches()[0], draws(0)).loss
        held[name] = sum(sizes)
        loss.backward()
    assert held["saving"] < (0.9 if encoder.backbone == "conv4" else 0.75) * held["plain"]
    assert_close(gradients_of(saving), gradients_of(plain))
    assert_close(dict(saving.named_buffers()), dict(plain.named_buffers()))


def test_compiled_encoders_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # traced and differentiated as for the real backend, whose C++ takes a minute to compile
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    plain, compiled = make_task(), make_task()
    names = list(compiled.state_dict())
    torch._dynamo.reset()
    prepare_model(compiled, ScaleConfig(compile=True), ALONE)
    assert list(compiled.state_dict()) == names
    for task in (plain, compiled):
        task(make_batches()[0], draws(0)).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_close(gradients_of(compiled), gradients_of(plain))
    assert_close(dict(compiled.named_buffers()), dict(plain.named_buffers()))


def test_frozen_statistics_normalise_as_before() -> None:
    norm = nn.BatchNorm2d(3).train()
    x = torch.randn(4, 3, 5, 5) + 2
    with frozen_statistics(norm):
        y = norm(x)
    assert norm.running_mean.tolist() == [0, 0, 0]
    assert norm.num_batches_tracked == 0
    assert torch.equal(y, norm(x))
    assert norm.num_batches_tracked == 1


def test_skipped_step_leaves_parameters_and_state() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = (make_optimizer(m, CONFIG.optimizer) for m in (model, twin))
    good, bad = torch.tensor(0.0), torch.tensor(1.0)
    for skip in (bad, good, bad, bad, good):
        x = torch.full((4, 3), torch.nan) if skip else torch.ones(4, 3)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        before = copy.deepcopy(model.state_dict())
        step_unless(skip, optimizer)
        if skip:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        else:
            twin_optimizer.zero_grad()
            twin(x).square().sum().backward()
            twin_optimizer.step()
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("cached", [False, True], ids=["separate", "cached"])
def test_nothing_is_read_back_from_the_device(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without content stand for those of a GPU: whoever asks for a value, and so would wait, gets an error."""
    meta = torch.device("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    scale = ScaleConfig(cached_negatives=cached)
    config = dataclasses.replace(CONFIG, batch_size=CLIPS, accumulate=2, scale=scale, precision="fp32")
    task = make_task(config=config).to(meta)
    empty = make_batches()[0].to(meta)
    optimizer = make_optimizer(task, config.optimizer)
    monkeypatch.setattr(optimizer, "step", lambda: None)  # the fused one knows no such device
    training_step = TrainingStep(config, task, optimizer, Processes(0, 1, meta))
    meter, laps = Meter(), []
    result = training_step.take(0, iter([empty, empty]), laps.append)
    for values in result.outputs:
        meter.add(values, result.skip)
    each = ["data", "forward", "backward"]
    assert laps == [*(each if cached else [*each, *each, "backward"]), "optimiser"]
    assert result.skip.device == meta
    with pytest.raises(RuntimeError, match="meta"):
        result.skip.item()
