"""The proxy tasks beside permutative predictive coding: that each asks what it says it asks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from task_cases import CONFIG, PLAIN, make_batch, make_config, make_numbered_batch, make_opening_mouths

from avppc import ClipBatch
from avppc.clip import CLIP_FRAMES, SAMPLES_PER_FRAME
from avppc.config import BaselineConfig, EncoderConfig
from avppc.ops.log_mel.op import log_mel
from avppc.tasks.base import ProxyTask, cut_audio, cut_video, draw_shifted, draw_starts
from avppc.tasks.baselines import (
    CorrespondenceTask,
    CurriculumTask,
    MultiwayTask,
    ShiftTask,
    TimeArrowTask,
    draw_other_clips,
)
from avppc.tasks.config import TASK_NAMES
from avppc.tasks.registry import TASKS, make_task
from avppc.tasks.visual import ChunkTask

CASES = [
    *((name, {}) for name in TASK_NAMES),
    ("synchronization", {"baselines": {"sync_mode": "curriculum"}}),
    ("synchronization", {"baselines": {"sync_mode": "multiway"}}),
    ("visual-permutative", {"objective": {"chunks": 4}}),
]
IDS = [*TASK_NAMES, "synchronization-curriculum", "synchronization-multiway", "visual-permutative-4"]
cases = pytest.mark.parametrize(("name", "changes"), CASES, ids=IDS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_name_has_a_task() -> None:
    assert tuple(TASKS) == TASK_NAMES
    with pytest.raises(ValueError, match=r"task must be one of 'synchronization', .*; got 'sync'"):
        make_task("sync", make_config("time-arrow"))


@cases
def test_every_parameter_learns(name: str, changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    task = make_task(name, make_config(name, **changes)).train()
    output = task(make_batch(), generator())
    output.loss.backward()
    # one number added to all logits of a softmax cancels; it is there because the method has it
    without = {key for key, parameter in task.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert without <= {"bias"}
    assert all(not value.requires_grad for value in output.metrics.values())
    names = task.describe()
    assert all(output.metrics[metric].shape == (len(entries),) for metric, entries in names.items())
    assert all(value.ndim == 0 for metric, value in output.metrics.items() if metric not in names)
    row = {metric: value.tolist() for metric, value in output.metrics.items()}
    assert all(0 <= share <= 1 for share in task.group_metrics(row).values())


@cases
@pytest.mark.parametrize("stride", [1, 3])
def test_it_says_how_long_a_clip_it_needs(name: str, changes: dict[str, object], stride: int) -> None:
    """With so many frames every phase of every draw is learned from; with one less not."""
    task = make_task(name, make_config(name, frame_stride=stride, **changes)).train()
    needed, batch = task.frames_needed, make_batch(clips=4)

    def learn(frames: int) -> None:
        short = dataclasses.replace(batch, video=batch.video[:, :frames], audio=batch.audio[:, : frames * 640])
        for seed in range(8):
            assert task(short, generator(seed)).loss.isfinite()

    assert needed <= CLIP_FRAMES
    learn(needed)
    if stride > 1 or not isinstance(task, (TimeArrowTask, ChunkTask)):  # a frame alone is no error, but no task
        with pytest.raises(ValueError, match=r"frame|starts"):
            learn(needed - 1)


@cases
def test_the_same_generator_gives_the_same_loss(name: str, changes: dict[str, object]) -> None:
    task = make_task(name, make_config(name, **changes)).train()
    state = {key: value.clone() for key, value in task.state_dict().items()}
    losses = []
    for seed in (0, 0, 1):
        task.load_state_dict(state)
        torch.manual_seed(7)
        losses.append(task(make_batch(), generator(seed)).loss)
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("synchronization", {}),
        ("synchronization", {"baselines": {"sync_mode": "multiway"}}),
        ("time-arrow", {}),
        ("correspondence", {}),
    ],
    ids=["shift", "multiway", "time-arrow", "correspondence"],
)
def test_task_is_learned_where_there_is_something_to_learn(name: str, changes: dict[str, object]) -> None:
    """Fresh clips of a mouth whose opening is heard: right more often than by chance after a few steps."""
    torch.manual_seed(0)
    encoder = dataclasses.replace(CONFIG.encoder, channels="motion")  # it sees an opening sooner
    config = make_config(name, **changes, augment=PLAIN, encoder=encoder)
    task = make_task(name, config).train()
    optimizer = torch.optim.Adam(task.parameters(), 5e-3)
    for step in range(80):
        output = task(make_opening_mouths(12, step), generator(step))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    task.eval()
    with torch.no_grad():
        right = torch.stack([task(make_opening_mouths(24, 900 + k), generator(k)).metrics["right"] for k in range(3)])
    chance = 1 / (CLIP_FRAMES - PLAIN.time_jitter_frames) if "baselines" in changes else 0.5
    assert right.mean() > min(0.75, 4 * chance)


def test_mean_of_the_frames_cannot_tell_the_time_arrow() -> None:
    """Shown both ways, a head that averages the frames gives one answer twice: right in exactly half the cases."""
    config = make_config("time-arrow", baselines={"arrow_pool": "mean"}, augment=PLAIN)
    luma = dataclasses.replace(config.encoder, channels="luma")  # motion channels tell the order by themselves
    whole = dataclasses.replace(config.augment, time_jitter_frames=0)
    torch.manual_seed(0)
    task = TimeArrowTask(dataclasses.replace(config, encoder=luma, augment=whole, frame_stride=1))
    optimizer = torch.optim.Adam(task.parameters(), 5e-3)
    for step in range(10):  # trained, so that it is not blind by its first weights alone
        task.train()
        optimizer.zero_grad()
        task(make_opening_mouths(8, step), generator(step)).loss.backward()
        optimizer.step()
    task.eval()
    batch = make_opening_mouths(16, 99)
    with torch.no_grad():
        forward, backward = (task.arrow(batch, torch.full((16,), way), generator()) for way in (False, True))
    torch.testing.assert_close(forward, backward, rtol=1e-3, atol=1e-4)
    ordered = TimeArrowTask(make_config("time-arrow")).eval()
    with torch.no_grad():
        forward, backward = (ordered.arrow(batch, torch.full((16,), way), generator()) for way in (False, True))
    assert (forward - backward).abs().max() > 1e-3


def test_time_arrow_reverses_the_chosen_clips_alone(monkeypatch) -> None:
    task = TimeArrowTask(make_config("time-arrow")).eval()
    seen = []
    monkeypatch.setattr(
        ProxyTask, "embed_video", lambda self, video, _: seen.append(video) or torch.zeros(len(video), 16)
    )
    batch = make_numbered_batch(4)
    task.arrow(batch, torch.tensor([False, True, False, True]), generator())
    steps = seen[0][:, 1:, 0, 0].int() - seen[0][:, :-1, 0, 0].int()
    assert steps.unique(dim=1).flatten().tolist() == [1, -1, 1, -1]
    assert torch.equal(batch.video, make_numbered_batch(4).video)  # the batch itself is left as it was


def spy_on_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings that are the first number of the span they stand for, in every place."""

    def embed_video(self: ProxyTask, video: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        return video[:, 0, 0, :1].float().expand(-1, 16).clone().requires_grad_()

    def embed_audio(self: ProxyTask, audio: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        assert (audio[:, SAMPLES_PER_FRAME:] - audio[:, :-SAMPLES_PER_FRAME] == 1).all()
        return audio[:, :1].float().expand(-1, 16).clone().requires_grad_()

    monkeypatch.setattr(ProxyTask, "embed_video", embed_video)
    monkeypatch.setattr(ProxyTask, "embed_audio", embed_audio)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_shifted_sound_is_really_shifted_inside_its_clip(monkeypatch, training: bool) -> None:
    task = ShiftTask(make_config("synchronization", baselines={"min_shift_frames": 5})).train(training)
    pairs = []

    def head(seen: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
        pairs.append(torch.stack([seen[:, 0], heard[:, 0]], 1).int())
        return seen[:, 0]

    spy_on_spans(monkeypatch)
    monkeypatch.setattr(task.head, "forward", head)
    shifts = set()
    for seed in range(20):
        task(make_numbered_batch(), generator(seed))
        aligned, shifted = pairs[-1].chunk(2)
        assert torch.equal(aligned[:, 0], aligned[:, 1])
        assert torch.equal(shifted[:, 0] // 32, shifted[:, 1] // 32)  # of the same clip
        distance = shifted[:, 1] - shifted[:, 0]
        assert int(distance.abs().min()) >= 5
        assert int((shifted % 32).max()) + task.span_frames <= CLIP_FRAMES
        shifts |= set(distance.tolist())
        # neither the picture nor the sound tells by itself: each is in one aligned and in one shifted pair
        for side in (0, 1):
            assert sorted(aligned[:, side].tolist()) == sorted(shifted[:, side].tolist())
    assert min(shifts) < 0 < max(shifts)


def test_curriculum_comes_closer_by_stages_that_the_run_remembers(monkeypatch) -> None:
    config = make_config("synchronization", baselines={"sync_mode": "curriculum"}, steps=6)
    task = CurriculumTask(config).train()
    asked: list[tuple[int, int]] = []
    embed = CurriculumTask.embed

    def spy(self: CurriculumTask, batch: ClipBatch, least: int, most: int, draws: torch.Generator) -> object:
        asked.append((least, most))
        return embed(self, batch, least, most, draws)

    monkeypatch.setattr(CurriculumTask, "embed", spy)
    stages = []
    for step in range(6):
        stages.append(task.stage)
        task(make_batch(), generator(step)).loss.backward()
    assert stages == [0, 0, 1, 1, 2, 2]
    assert asked[2:4] == [(8, CLIP_FRAMES)] * 2
    assert asked[4:] == [(4, 8)] * 2
    resumed = CurriculumTask(config)
    resumed.load_state_dict(task.state_dict())
    assert resumed.stage == 2
    task.eval()(make_batch(), generator())
    assert int(task.batches_done) == 6  # evaluation does not move it


def test_false_pairs_of_the_curriculum_are_other_clips_and_then_other_times(monkeypatch) -> None:
    """The margin loss of embeddings that are known: aligned pairs cost nothing, false ones by how near they are."""
    config = make_config("synchronization", baselines={"sync_mode": "curriculum", "margin": 2.0}, steps=3)
    task = CurriculumTask(config).train()
    units = torch.eye(16)[:8]  # of 4 clips, the first span and the second
    monkeypatch.setattr(CurriculumTask, "embed", lambda self, *_: (units.clone(), units.clone()))
    losses = [task(make_batch(4), generator()).loss.item() for _ in range(3)]
    assert losses == pytest.approx([0.5 * (2 - 2**0.5) ** 2] * 3)  # orthogonal: a distance of root 2
    together = units[:4].repeat(2, 1)  # both spans of a clip alike: far from other clips, not from its other time
    monkeypatch.setattr(CurriculumTask, "embed", lambda self, *_: (together.clone(), together.clone()))
    task.batches_done.zero_()
    losses = [task(make_batch(4), generator()).loss.item() for _ in range(3)]
    assert losses == pytest.approx([0.5 * (2 - 2**0.5) ** 2, 2.0, 2.0], rel=1e-4)


def test_a_shift_that_does_not_fit_is_refused_by_name() -> None:
    task = ShiftTask(make_config("synchronization", baselines={"min_shift_frames": 12, "far_shift_frames": 12}))
    with pytest.raises(ValueError, match=r"min_shift_frames must be at most 9 for spans of 12 frames .* got 12"):
        task(make_batch(), generator())
    with pytest.raises(ValueError, match="far_shift_frames must be at least 9, got 8"):
        BaselineConfig(min_shift_frames=9)


def test_strangers_are_really_other_clips(monkeypatch) -> None:
    """Also where a clip is in the batch twice, and picture and sound of a pair lie at the same time."""
    task = CorrespondenceTask(make_config("correspondence")).train()
    batch = make_numbered_batch(6)
    batch = dataclasses.replace(batch, clip_ids=torch.tensor([0, 1, 2, 3, 4, 0]))
    pairs = []

    def embed_video(self: ProxyTask, video: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        return video[:, 0, 0, 0].float()[:, None].expand(-1, 16).requires_grad_()

    def embed_audio(self: ProxyTask, audio: torch.Tensor, _: torch.Generator) -> torch.Tensor:
        return audio[:, 0].float()[:, None].expand(-1, 16).requires_grad_()

    def head(seen: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
        pairs.append(torch.stack([seen[:, 0], heard[:, 0]], 1).long())
        return seen[:, 0]

    monkeypatch.setattr(ProxyTask, "embed_video", embed_video)
    monkeypatch.setattr(ProxyTask, "embed_audio", embed_audio)
    monkeypatch.setattr(task.head, "forward", head)
    partners: set[tuple[int, int]] = set()
    for seed in range(30):
        task(batch, generator(seed))
        same, other = pairs[-1].chunk(2)
        assert torch.equal(same[:, 0], same[:, 1])
        clips = other // 32
        ids = batch.clip_ids[clips]
        assert (ids[:, 0] != ids[:, 1]).all()
        late = other % 32 >= task.config.cut.future_start
        assert torch.equal(late[:, 0], late[:, 1])  # of the same part of the clip: when is no hint
        partners |= set(map(tuple, clips.tolist()))
    assert len(partners) == 6 * 5 - 2  # every other clip comes up
    with pytest.raises(ValueError, match="at least two different clips"):
        draw_other_clips(torch.tensor([3, 3]), generator())


def test_multiway_finds_the_frame_that_sounds_alike() -> None:
    """Each picture is scored with the sound of every moment of its own clip."""
    task = MultiwayTask(make_config("synchronization", baselines={"sync_mode": "multiway"}, frame_stride=2)).train()
    batch = make_batch(3)
    similarity = task.similarity(batch.video, batch.audio, generator())
    assert similarity.shape[0] == 3
    assert similarity.shape[1] == similarity.shape[2] == (CLIP_FRAMES - 2 * 3) // 2 - 2  # a margin of 3, a context of 3
    changed = batch.audio.clone()
    changed[1] = changed[1].flip(0)
    task.eval()
    with torch.no_grad():
        first = task.similarity(batch.video, batch.audio, generator())
        second = task.similarity(batch.video, changed, generator())
    assert torch.equal(first[[0, 2]], second[[0, 2]])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("name", "changes"),
    [("av-permutative", {}), ("correspondence", {}), ("synchronization", {})],
    ids=["av-permutative", "correspondence", "synchronization"],
)
def test_match_scores_every_pair_like_the_task_itself(name: str, changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    task = make_task(name, make_config(name, **changes))
    assert isinstance(task, ProxyTask)
    seen, heard = torch.randn(4, 16), torch.randn(5, 16)
    assert task.has_pair_scores
    scores = task.pair_scores(seen, heard)
    assert scores.shape == (4, 5)
    if name != "av-permutative":
        pairs = torch.stack([task.head(seen, sound.expand(4, -1)) for sound in heard], 1)
        torch.testing.assert_close(scores, pairs)
    else:  # the op's own logits, of the sub-tasks whose elements lie at the same time
        elements = [seen, torch.randn(4, 16), heard[:4], torch.randn(4, 16)]
        logits = task.loss.logits(*elements)
        names = task.describe()["task_loss"]
        first, second = logits[names.index("Vp->Ap")], logits[names.index("Ap->Vp")].T
        elements = [elements[1], seen, elements[3], heard[:4]]
        logits = task.loss.logits(*elements)
        third, fourth = logits[names.index("Vf->Af")], logits[names.index("Af->Vf")].T
        torch.testing.assert_close(scores[:, :4], (first + second + third + fourth) / 4, rtol=1e-4, atol=1e-5)
    assert not TimeArrowTask(make_config("time-arrow")).has_pair_scores


def test_offsets_are_those_of_the_sound_against_the_picture(monkeypatch) -> None:
    """The picture stays in the middle of the clip, the sound comes from everywhere; early sound scores first."""
    task = ShiftTask(make_config("synchronization")).eval()
    monkeypatch.setattr(ProxyTask, "embed_video", lambda self, video, _: video[:, 0, :1, 0].float())
    monkeypatch.setattr(ProxyTask, "embed_audio", lambda self, audio, _: audio[:, :1].float())
    monkeypatch.setattr(ShiftTask, "pair_scores", lambda self, video, audio: audio.T - video)
    scores = task.offset_scores(make_numbered_batch(3), generator())
    assert scores is not None
    assert scores.tolist() == [list(range(-8, 9))] * 3
    assert TimeArrowTask(make_config("time-arrow")).offset_scores(make_batch(3), generator()) is None


@torch.no_grad()
def test_moments_see_nothing_of_what_pads_a_span() -> None:
    """What is computed of a span at its moments is what is computed there of the whole clip, where nothing is padded.

    The first moment and the last are the outermost for which that holds. The means over the span are left out.
    """
    task = make_task("synchronization", make_config("synchronization", frame_stride=1, augment=PLAIN)).eval()
    audio, start, frames = make_batch(2).audio, 8, 14

    def features(sound: torch.Tensor) -> torch.Tensor:  # [N, C, T, B], by video frame
        mel = log_mel(sound, task.config.features)[:, : sound.shape[1] // 160]
        return task.audio_encoder.conv(mel.unsqueeze(1))

    whole = features(audio)[:, :, start : start + frames]
    cut = features(audio[:, 640 * start : 640 * (start + frames)])
    same = torch.isclose(whole, cut, rtol=1e-4, atol=1e-4).all(3).all(1).all(0)
    moments = task.moments(frames, 0)
    assert same[moments].all()
    assert not same[moments.start - 1]
    assert (moments.start, moments.stop) == (3, 11)


@pytest.mark.parametrize(("channels", "reach"), [("luma", 0), ("motion", 1)])
def test_pictures_alone_have_the_margin_of_their_motion(channels: str, reach: int) -> None:
    config = make_config("time-arrow")
    task = make_task("time-arrow", dataclasses.replace(config, encoder=EncoderConfig(width=4, channels=channels)))
    assert task.margin_frames == reach
    for frames in range(2, 16):
        for phase in range(config.frame_stride):
            moments, encoded = task.moments(frames, phase), range(phase, frames, config.frame_stride)
            chosen = encoded[moments]
            assert len(chosen) == task.count_moments(frames)
            assert all(reach <= frame < frames - reach for frame in chosen)


def test_multiway_offsets_read_the_diagonals(monkeypatch) -> None:
    task = MultiwayTask(make_config("synchronization", baselines={"sync_mode": "multiway"}, frame_stride=2)).eval()
    frames = torch.arange(15.0)
    table = -(frames[None, :] - frames[:, None] - 3).abs().expand(2, -1, -1)  # frame t sounds like moment t + 3
    monkeypatch.setattr(MultiwayTask, "similarity", lambda self, *_: table)
    scores = task.offset_scores(make_batch(2), generator())
    assert scores.shape == (2, 15)
    assert (scores.argmax(1) - 7).tolist() == [3, 3]
    assert task.offset_frames == 2


def test_spans_are_cut_where_asked() -> None:
    batch = make_numbered_batch(3)
    starts = torch.tensor([0, 4, 17])
    assert cut_video(batch.video, starts, 12)[:, 0, 0, 0].tolist() == [0, 32 + 4, 64 + 17]
    assert cut_audio(batch.audio, starts, 12)[:, [0, -1]].tolist() == [[0, 11], [36, 47], [81, 92]]
    with pytest.raises(ValueError, match="3 frames from 0 to 17"):
        cut_video(batch.video, torch.tensor([0, 1, 18]), 12)
    with pytest.raises(ValueError, match="3 frames from 0 to 17"):
        cut_audio(batch.audio, torch.tensor([0, 1]), 12)
    assert draw_starts(4, 5, generator(), training=False).tolist() == [2] * 4


def test_shifted_starts_are_spread_over_all_places_that_are_allowed() -> None:
    starts = torch.tensor([0, 8, 17]).repeat_interleave(400)
    shifted = draw_shifted(starts, 17, 4, 9, generator())
    for start, allowed in ((0, range(4, 10)), (8, [0, 1, 2, 3, 4, 12, 13, 14, 15, 16, 17]), (17, range(8, 14))):
        assert sorted(shifted[starts == start].unique().tolist()) == list(allowed)
    assert draw_shifted(torch.tensor([9]), 17, 30, 40, generator()).tolist() == [0]  # nothing is far enough
