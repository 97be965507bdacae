"""Settings: bad ones are named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from avppc.synth import config as synth
from avppc.synth import dataset
from avppc.synth.config import WORDS, SynthConfig


def test_word_list() -> None:
    first = "ABOUT BECAUSE BUSINESS CHANGE EVERYTHING FAMILIES HOSPITAL HOUSE MILLION BILLION MOMENT PEOPLE POLICE"
    assert WORDS[:20] == (*first.split(), "PRICE", "PRESS", "SOMETHING", "SPEND", "THOUGHT", "WEATHER", "WORLD")
    assert len({word.lower() for word in WORDS}) == len(WORDS) == synth.MAX_WORDS >= 120
    assert all(word.isalpha() and word.isupper() for word in WORDS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": 0}, "words must be from 1 to 186, got 0"),
        ({"words": 187}, "words must be from 1 to 186, got 187"),
        ({"words": 167, "extra_clips": 1}, "words must be from 1 to 166, got 167"),
        ({"clips_per_word": -1}, "clips_per_word must be from 0 to 99999, got -1"),
        ({"clips_per_word": 0, "val_clips_per_word": 0, "test_clips_per_word": 0}, "are all 0"),
        ({"split_by": "face,tongue"}, "split_by must be one of 'face', 'voice'; got 'tongue'"),
        ({"difficulty": "brutal"}, "difficulty must be one of 'easy', 'medium', 'hard'; got 'brutal'"),
        ({"look": "cartoon"}, "look must be one of 'mouth', 'head'; got 'cartoon'"),
        ({"test_speakers": 0}, "test_speakers must be from 1"),
        ({"seed": -1}, "seed must be from 0"),
        ({"workers": -2}, "workers must be from 0"),
    ],
)
def test_bad_values_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SynthConfig(Path("set"), **settings)


@pytest.mark.parametrize("settings", [{"words": 2.0}, {"split_by": 3}, {"overwrite": "yes"}, {"out": 3}])
def test_bad_types_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(settings))} must be "):
        SynthConfig(**({"out": Path("set")} | settings))


def test_plan_counts() -> None:
    config = SynthConfig(
        Path("set"), words=3, clips_per_word=4, val_clips_per_word=2, test_clips_per_word=1, extra_clips=5
    )
    stems = [job.stem for job in dataset.plan(config)]
    assert len(set(stems)) == len(stems) == config.clips == 3 * 7 + 5
    assert stems[:4] == [f"{word}/train/{word}_00001" for word in WORDS[:3]] + ["ABOUT/train/ABOUT_00002"]


def test_missing_packages_give_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cv2" else find_spec(name))
    with pytest.raises(ImportError, match=r"avppc synth needs the extra packages: pip install 'avppc\[synth\]'"):
        dataset.execute(SynthConfig(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_test_clips_may_be_given_in_all() -> None:
    config = SynthConfig(Path("set"), words=4, test_clips=20)
    assert config == SynthConfig(Path("set"), words=4, test_clips_per_word=5)
    with pytest.raises(ValueError, match="test_clips must be a multiple of the 4 words, got 21"):
        SynthConfig(Path("set"), words=4, test_clips=21)
