"""The pretraining task: what it sees of a clip, and what it must not."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from task_cases import CONFIG, make_batch

from avppc import LogMelConfig
from avppc.clip import CLIP_FRAMES, CLIP_SAMPLES, SAMPLES_PER_FRAME
from avppc.config import AugmentConfig, CutConfig, ObjectiveConfig
from avppc.tasks.base import cut_elements
from avppc.tasks.permutative import PermutativeTask
from avppc.tasks.visual import VISUAL_SUBTASKS, VisualMomentTask

CUT = CONFIG.cut
FUTURE = slice(CUT.future_start, CUT.future_start + CUT.future_frames)


def samples(frames: slice) -> slice:
    return slice(frames.start * SAMPLES_PER_FRAME, frames.stop * SAMPLES_PER_FRAME)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("side", ["past", "future"])
def test_a_changed_frame_or_sound_never_changes_the_other_side(training: bool, side: str) -> None:
    torch.manual_seed(0)
    task = PermutativeTask(CONFIG).train(training)
    if training:  # batch statistics are shared by all rows on purpose; what is asked is what each row sees
        for module in task.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    batch, changed = make_batch(), make_batch()
    frames = FUTURE if side == "future" else slice(0, CUT.past_frames)
    changed.video[:, frames] = 255 - changed.video[:, frames]
    changed.audio[:, samples(frames)] = changed.audio[:, samples(frames)].flip(1)
    # the gap is seen by neither side
    gap = slice(CUT.past_frames, CUT.future_start)
    changed.video[:, gap] = 0
    changed.audio[:, samples(gap)] = 0
    with torch.no_grad():
        before = task.embed(batch, torch.Generator().manual_seed(1))
        after = task.embed(changed, torch.Generator().manual_seed(1))
    for first, second in zip(before, after, strict=True):
        past_same = torch.equal(first[:6], second[:6])
        future_same = torch.equal(first[6:], second[6:])
        assert (past_same, future_same) == ((True, False) if side == "future" else (False, True))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("side", ["past", "future"])
def test_one_pass_over_a_clip_keeps_past_and_future_apart(training: bool, side: str) -> None:
    torch.manual_seed(0)
    task = PermutativeTask(CONFIG).train(training)
    assert task.takes_one_pass
    for module in task.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    batch, changed = make_batch(), make_batch()
    # all that the other side must not see: with the gap
    hidden = slice(CUT.past_frames, CLIP_FRAMES) if side == "future" else slice(0, CUT.future_start)
    changed.video[:, hidden] = 255 - changed.video[:, hidden]
    changed.audio[:, samples(hidden)] = changed.audio[:, samples(hidden)].flip(1)
    with torch.no_grad():
        before, after = (task.represent(x, torch.Generator().manual_seed(1))[:4] for x in (batch, changed))
    same = [torch.equal(first, second) for first, second in zip(before, after, strict=True)]
    assert same == ([True, False] * 2 if side == "future" else [False, True] * 2)


@pytest.mark.parametrize("phase", [0, 1])
def test_one_pass_gives_what_a_pass_over_the_past_alone_gives(phase: int) -> None:
    """Up to the last frames of the past, which in one pass see beyond it and are left out."""
    torch.manual_seed(0)
    task = PermutativeTask(CONFIG).eval()
    task.draw_phase = lambda generator: phase  # type: ignore[method-assign]
    batch = make_batch()
    jitter, span, reach = CONFIG.augment.time_jitter_frames, task.span_frames, task.video_encoder.reach
    with torch.no_grad():
        past = task.represent(batch, torch.Generator())[0]
        alone = task.frame_features(batch.video[:, jitter // 2 :][:, :span], phase, torch.Generator())
        kept = -(-(span - reach - phase) // CONFIG.frame_stride)
        torch.testing.assert_close(past, task.video_pool(alone[:, :kept]))


def test_two_passes_where_one_would_tell() -> None:
    masked = dataclasses.replace(CONFIG, augment=AugmentConfig(time_mask_frames=3))  # by the mean of all frames
    short = dataclasses.replace(CONFIG, cut=CutConfig(past_frames=5, future_frames=5))
    spans = dataclasses.replace(CONFIG, objective=ObjectiveConfig(moments="none"))
    motion = dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, channels="motion"))
    for config in (motion, masked, short, spans):
        task = PermutativeTask(config)
        assert not task.takes_one_pass
        assert task(make_batch(), torch.Generator().manual_seed(0)).loss.isfinite()


def test_sound_is_cut_with_the_picture() -> None:
    batch = make_batch(clips=8)
    frame_of_sample = torch.arange(CLIP_SAMPLES) // SAMPLES_PER_FRAME
    batch = dataclasses.replace(
        batch,
        video=torch.arange(CLIP_FRAMES, dtype=torch.uint8)[None, :, None, None].expand(8, -1, 4, 4).contiguous(),
        audio=frame_of_sample.to(torch.int16).expand(8, -1).contiguous(),
    )
    elements = cut_elements(batch, CUT, jitter_frames=3, generator=torch.Generator().manual_seed(0))
    assert elements.video.shape == (16, 11, 4, 4)
    frames = elements.video[:, :, 0, 0]
    torch.testing.assert_close(frames.repeat_interleave(SAMPLES_PER_FRAME, 1).to(torch.int16), elements.audio)
    assert torch.equal(frames[:, 1:] - frames[:, :-1], torch.ones_like(frames[:, 1:]))
    assert frames[:8].max() < CUT.past_frames
    assert frames[8:].min() >= CUT.future_start
    # past and future of a clip, and different clips, have draws of their own
    assert len(frames[:8, 0].unique()) > 1
    assert not torch.equal(frames[:8, 0] + CUT.future_start, frames[8:, 0])


def test_loss_is_near_chance_at_first_and_falls() -> None:
    torch.manual_seed(0)
    task = PermutativeTask(CONFIG).train()
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    batch = make_batch(clips=6)
    losses = []
    for _ in range(30):
        output = task(batch, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    shares = [math.log(6), math.log(6 - 1 + task.count_moments(CLIP_FRAMES - 2))]  # of spans, and of moments
    assert abs(losses[0] - (0.2 * shares[0] + 0.8 * shares[1])) < 0.5
    assert losses[-1] < 0.7 * losses[0]
    assert output.metrics["task_loss"].shape == output.metrics["task_accuracy"].shape == (42,)
    assert not output.metrics["task_loss"].requires_grad


def test_every_parameter_learns() -> None:
    task = PermutativeTask(CONFIG).train()
    task(make_batch(), torch.Generator().manual_seed(0)).loss.backward()
    without = [
        name for name, parameter in task.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


def test_weights_choose_the_subtasks() -> None:
    between_only = dataclasses.replace(CONFIG, objective=ObjectiveConfig(dim=16, other_weight=0.0))
    torch.manual_seed(0)
    task = PermutativeTask(between_only).eval()
    output = task(make_batch(), torch.Generator().manual_seed(0))
    between = torch.tensor([subtask.between_modalities for subtask in task.loss.subtasks])
    assert between.sum() == 18
    losses = output.metrics["task_loss"]
    at_once, at_offsets = (
        torch.tensor([getattr(subtask, kind) for subtask in task.loss.subtasks])
        for kind in ("whole_clip", "crosses_both")
    )
    by_moment = 0.7 * losses[at_once].mean() + 0.3 * losses[at_offsets].mean()  # objective.offset_share
    spans = losses[between & ~at_once & ~at_offsets].mean()
    expected = 0.85 * by_moment + 0.15 * spans  # objective.moment_share
    torch.testing.assert_close(output.loss.detach(), expected)


def test_features_must_follow_the_video_clock() -> None:
    with pytest.raises(ValueError, match=r"hop_samples=160, got 16000 and 80"):
        PermutativeTask(dataclasses.replace(CONFIG, features=LogMelConfig(hop_samples=80)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CutConfig(past_frames=15), "must be equal"),
        (lambda: CutConfig(past_frames=15, future_frames=15), "must be at most 29 in all, got 31"),
        (lambda: AugmentConfig(flip_probability=1.5), "flip_probability must be from 0 to 1, got 1.5"),
        (lambda: dataclasses.replace(CONFIG, batch_size=1), "batch_size must be at least 2, got 1"),
        (lambda: dataclasses.replace(CONFIG, augment=AugmentConfig(time_jitter_frames=13)), "time_jitter_frames"),
        (lambda: ObjectiveConfig(between_weight=0.0, other_weight=0.0), "must not both be 0"),
    ],
)
def test_bad_settings_are_refused_by_name(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("name", ["Vp->Vf", "Vf->Vp"])
def test_pictures_predict_moments_with_which_they_share_no_frame(name: str, stride: int) -> None:
    """A state's gradient reaches no frame that its nearest target sees; the mean frame of the clip is left out."""
    config = dataclasses.replace(CONFIG, frame_stride=stride)
    task = VisualMomentTask(config, [subtask for subtask in VISUAL_SUBTASKS if subtask.name == name]).eval()
    frames = 27
    seen = task.video_encoder.reach
    encoded = range(0, frames, stride)[task.moments(frames, 0)]
    place = len(encoded) // 2
    near = place + (1 if name == "Vp->Vf" else -1) * task.first_horizon
    of_state = range(encoded[place] + seen) if name == "Vp->Vf" else range(encoded[place] - seen, frames)
    assert not set(of_state) & set(range(encoded[near] - seen, encoded[near] + seen + 1))
    features = torch.randn(2, len(encoded), config.encoder.features, requires_grad=True)
    caught: list[torch.Tensor] = []
    task.states[0].register_forward_hook(lambda _, __, output: caught.append(output[0]))
    task.losses(features)
    state = place if name == "Vp->Vf" else len(encoded) - 1 - place
    (gradient,) = torch.autograd.grad(caught[0][:, state].sum(), features)
    reached = gradient.any(2).any(0).nonzero().flatten().tolist()
    assert reached == list(range(place + 1) if name == "Vp->Vf" else range(place, len(encoded)))


def test_pictures_find_what_comes_next_in_their_own_clip() -> None:
    """Clips whose frames say their number: a few steps are enough to know the next ones."""
    torch.manual_seed(0)
    task = VisualMomentTask(CONFIG).train()
    optimizer = torch.optim.Adam([*task.states.parameters(), *task.target.parameters(), task.weight], 1e-2)
    numbers = torch.nn.functional.one_hot(torch.arange(12) % 16, 16).float().expand(4, -1, -1)
    for _ in range(150):
        losses, stats = task.losses(numbers)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    assert stats.accuracy.min() > 0.9
