"""One clip: the picture shows the mouth, the sound follows the phonemes, the draws follow the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from avppc.synth import visemes, voice
from avppc.synth.clip import Job, MadeClip, make_clip, render
from avppc.synth.config import DIFFICULTIES, WORDS, SynthConfig
from avppc.synth.speaker import Cast, make_face
from avppc.synth.voice import Espeak, Speech
from avppc.synth.worker import encode_mp4

_EASY = DIFFICULTIES["easy"]


@pytest.fixture(scope="module")
def clips() -> list[MadeClip]:
    """One easy clip of each of eight words, by eight speakers."""
    cast, espeak = Cast(SynthConfig(Path("set"), difficulty="easy"), _EASY.identity), Espeak()
    return [
        make_clip(Job(word, "train", 1, word), cast.speaker("train", number), _EASY, espeak, seed=0)
        for number, word in enumerate(WORDS[5:13])
    ]


def _trajectory(opening: list[float]) -> np.ndarray:
    shape = np.zeros((len(opening), len(visemes.PARAMETERS)))
    shape[:, visemes.OPEN] = opening
    shape[:, visemes.TONGUE] = 0.2
    return shape


def _luma(frames: np.ndarray) -> np.ndarray:
    return frames[:, :256].astype(float)


@pytest.mark.parametrize("number", range(6))
def test_the_mouth_is_in_the_middle_of_lrws_crop(number: int) -> None:
    still = dataclasses.replace(_EASY, pose=0, noise=0)
    frames, _ = render(_trajectory([0, 0.3]), make_face(0, number, 1.0), np.random.default_rng(number), still)
    change = np.abs(np.diff(_luma(frames), axis=0))[0]
    change[change < 0.5 * change.max()] = 0  # the chin moves too, but changes less
    y, x = (float((change * grid).sum() / change.sum()) for grid in np.mgrid[:256, :256])
    assert (y - 115, x - 79) == pytest.approx((48, 48.5), abs=3)  # rows and columns of the crop


def test_a_wider_mouth_shows_more_of_its_inside() -> None:
    still = dataclasses.replace(_EASY, pose=0, noise=0, blur=0)
    opening = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    frames, _ = render(_trajectory(opening), make_face(0, 3, 0.5), np.random.default_rng(0), still)
    distance = np.abs(_luma(frames) - _luma(frames)[0])
    changed = (distance[:, 140:210, 90:166] > 12).sum((1, 2))
    assert (np.diff(changed) > 20).all()


def test_the_picture_follows_the_true_mouth(clips: list[MadeClip]) -> None:
    """The darkness between the lips goes up and down with the true opening."""
    correlations = []
    for clip in clips:
        crop = _luma(clip.frames)[:, 150:190, 100:156]
        dark = np.sort(crop.reshape(len(crop), -1), axis=1)[:, :60].mean(1)
        correlations.append(np.corrcoef(-dark, clip.mouth[:, visemes.OPEN].astype(float))[0, 1])
    assert np.median(correlations) > 0.6


def test_the_sound_follows_the_phonemes(
    clips: list[MadeClip], decode_clip: Callable[[Path], Any], tmp_path: Path
) -> None:
    """In the decoded file: loud between the first phoneme and the last, without delay."""
    for clip in clips:
        (tmp_path / "clip.mp4").write_bytes(encode_mp4(clip.frames, clip.audio))
        audio = decode_clip(tmp_path / "clip.mp4").audio
        lags = range(-320, 321)
        match = [np.dot(np.roll(audio, lag)[400:-400], clip.audio[400:-400]) for lag in lags]
        assert abs(lags[int(np.argmax(match))]) <= 1
        loudness = np.log(audio.reshape(-1, 160).std(axis=1) + 1e-3)  # every 10 ms
        times = (np.arange(len(loudness)) + 0.5) * 0.01
        first = clip.facts["phonemes"][0][1]
        last = next(seconds for name, seconds in clip.facts["phonemes"] if name.startswith("_"))
        speaking = (times > first) & (times < last)
        assert np.corrcoef(loudness, speaking)[0, 1] > 0.6


def test_a_clip_depends_on_its_place_in_the_plan_alone() -> None:
    """Up to espeak-ng's own variation, which leaves the picture's draws alone."""
    cast, espeak = Cast(SynthConfig(Path("set")), 1.0), Espeak()
    facts = []
    for order in ((1, 2), (2, 1)):
        made = {}
        for number in order:
            job = Job("HOUSE", "val", number, "HOUSE")
            speaker = cast.speaker("val", job.draw_speaker(0, 10))
            made[number] = (speaker, make_clip(job, speaker, DIFFICULTIES["medium"], espeak, seed=0))
        facts.append(made)
    for number in (1, 2):
        (speaker, clip), (other_speaker, other) = facts[0][number], facts[1][number]
        assert (speaker.number, speaker.voice) == (other_speaker.number, other_speaker.voice)
        for name in ("text", "snr_db", "light", "blur", "noise"):
            assert clip.facts[name] == other.facts[name]
        np.testing.assert_allclose(clip.mouth, other.mouth, atol=0.1)
        corner = np.s_[:, :100, :100]  # no mouth there
        np.testing.assert_array_equal(clip.frames[corner], other.frames[corner])
    assert not np.array_equal(facts[0][1][1].frames, facts[0][2][1].frames)


@pytest.mark.parametrize("kinds", ["face", "voice", "face,voice", ""])
def test_cast_is_split_as_asked(kinds: str) -> None:
    config = SynthConfig(Path("set"), split_by=kinds, train_speakers=30, val_speakers=5, test_speakers=9)
    cast = Cast(config, 1.0)
    people = {split: [cast.speaker(split, n) for n in range(size)] for split, size in cast.sizes.items()}
    assert len({person.number for group in people.values() for person in group}) == 44
    faces = {split: {person.face_number for person in group} for split, group in people.items()}
    voices = {split: {person.voice.variant for person in group} for split, group in people.items()}
    assert faces["train"].isdisjoint(faces["val"] | faces["test"]) == ("face" in kinds)
    assert faces["val"].isdisjoint(faces["test"]) == ("face" in kinds)
    assert voices["train"].isdisjoint(voices["val"] | voices["test"]) == ("voice" in kinds)


def test_cut_speech_keeps_pitch_and_place() -> None:
    rate, frequency = 22_050, 1000.0
    tone = np.round(20_000 * np.sin(2 * np.pi * frequency * np.arange(rate) / rate)).astype(np.int16)
    cut = voice.cut_speech(Speech(tone, rate, (), (), 1.0), -0.2)
    times = np.arange(len(cut)) / 16_000 - 0.2
    expected = np.where((times >= 0) & (times < 1), 20_000 / 32_768 * np.sin(2 * np.pi * frequency * times), 0)
    away_from_edges = (np.abs(times) > 0.01) & (np.abs(times - 1) > 0.01)
    np.testing.assert_allclose(cut[away_from_edges], expected[away_from_edges], atol=2e-3)


@pytest.mark.parametrize("name", ["easy", "medium", "hard"])
def test_noise_has_the_ratio_it_says(name: str) -> None:
    """Without a room, what is left after the best fit of the speech is the noise."""
    dry = dataclasses.replace(DIFFICULTIES[name], reverb=0.0)
    speech = np.sin(np.arange(18_560) * 0.3) * np.hanning(18_560)
    for seed in range(5):
        mixed, snr_db = voice.mix(speech, np.random.default_rng(seed), dry)
        assert dry.snr_db[0] <= snr_db <= dry.snr_db[1]
        gain = np.dot(mixed, speech) / np.dot(speech, speech)
        noise = mixed - gain * speech
        if np.abs(mixed).max() < 1:
            measured = 10 * np.log10(np.mean((gain * speech) ** 2) / np.mean(noise**2))
            assert measured == pytest.approx(snr_db, abs=1.0)


def test_frames_are_what_players_show(
    clips: list[MadeClip], decode_clip: Callable[[Path], Any], tmp_path: Path
) -> None:
    (tmp_path / "clip.mp4").write_bytes(encode_mp4(clips[0].frames, clips[0].audio))
    shown = decode_clip(tmp_path / "clip.mp4").frames
    made = np.stack([cv2.cvtColor(frame, cv2.COLOR_YUV2BGR_I420) for frame in clips[0].frames])
    assert np.abs(shown.astype(float) - made).mean() < 4
