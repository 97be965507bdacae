"""Speech, its events, and the mouth they move."""

from __future__ import annotations

import numpy as np
import pytest

from avppc.clip import SPLITS
from avppc.synth.config import AFTER, BEFORE, WORDS
from avppc.synth.speaker import ACCENTS, VARIANTS, split_variants
from avppc.synth.visemes import (
    OPEN,
    PRESS,
    PROTRUSION,
    SPREAD,
    TONGUE_OUT,
    TUCK,
    VISEMES,
    mouth_trajectory,
    segments_of,
)
from avppc.synth.voice import Espeak, Phoneme, Speech, voice_variants

BILABIALS = {"p", "b", "m", "m-"}
VOWELS = {name for name, viseme in VISEMES.items() if not np.isnan(viseme.targets).any()}


@pytest.fixture(scope="module")
def espeak() -> Espeak:
    return Espeak()


def _say(espeak: Espeak, text: str, voice: str = "en-us+m3") -> Speech:
    return espeak.say(text, voice, rate_wpm=150, pitch=50, pitch_range=50)


def _mouth(espeak: Espeak, text: str) -> tuple[tuple[Phoneme, ...], np.ndarray, np.ndarray]:
    """Phonemes, times every 10 ms and the mouth at them, without noise."""
    speech = _say(espeak, text)
    times = np.arange(0, speech.end_seconds, 0.01)
    segments = segments_of(speech.phonemes, speech.end_seconds)
    mouth = mouth_trajectory(segments, times, np.random.default_rng(0), target_noise=0, tempo=1)
    return speech.phonemes, times, mouth


def test_variants_exist_and_are_dealt_out_once() -> None:
    assert set(VARIANTS) <= voice_variants()
    dealt = split_variants(3)
    assert list(dealt) == list(SPLITS)
    assert sorted(variant for variants in dealt.values() for variant in variants) == sorted(VARIANTS)
    assert split_variants(4) != dealt


@pytest.mark.parametrize(
    ("voice", "message"), [("en-us+nobody", "variant of espeak-ng"), ("elvish", "language of espeak-ng")]
)
def test_unknown_voices_are_refused(espeak: Espeak, voice: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _say(espeak, "hello", voice)


def test_every_phoneme_has_a_viseme(espeak: Espeak) -> None:
    text = " ".join([*WORDS, *BEFORE, *AFTER]).lower()
    names = {
        phoneme.name for accent in ACCENTS for phoneme in _say(espeak, text, accent).phonemes if not phoneme.is_pause
    }
    assert len(names) > 40
    assert names <= VISEMES.keys()


def test_words_are_found_by_their_place_in_the_text(espeak: Espeak) -> None:
    # espeak-ng says "in the" and "of the" as one word each
    speech = _say(espeak, "in the million of the")
    assert [word.text_offset for word in speech.words] == [0, 7, 15]
    (first_m,) = (phoneme.start_seconds for phoneme in speech.phonemes if phoneme.name == "m")
    assert speech.words[1].start_seconds == pytest.approx(first_m, abs=0.03)


def test_lips_close_for_m_and_open_for_vowels(espeak: Espeak) -> None:
    phonemes, times, mouth = _mouth(espeak, "million")
    assert [name for name, _ in phonemes][:3] == ["m", "I", "l"]
    inside = (times >= phonemes[0].start_seconds) & (times < phonemes[1].start_seconds)
    assert mouth[inside, OPEN].min() < 0.03
    assert mouth[inside, PRESS].max() > 0.8
    vowel = (times >= phonemes[1].start_seconds + 0.03) & (times < phonemes[2].start_seconds)
    assert mouth[vowel, OPEN].min() > 0.15
    assert mouth[vowel, PRESS].max() < 0.5


@pytest.mark.parametrize("word", WORDS[:40])
def test_lips_close_at_every_bilabial(espeak: Espeak, word: str) -> None:
    phonemes, times, mouth = _mouth(espeak, f"the {word.lower()} again")
    for index, (name, start) in enumerate(phonemes):
        near = (times > start - 0.07) & (times < start + 0.09)
        if name in BILABIALS:
            assert mouth[near, OPEN].min() < 0.06, (word, name)
        elif name in VOWELS and not {phonemes[index - 1].name, phonemes[index + 1].name} & (
            BILABIALS | {"f", "v", "w"}
        ):
            assert mouth[near, OPEN].min() > 0.08, (word, name)


def test_each_shape_is_where_it_belongs(espeak: Espeak) -> None:
    _, _, thought = _mouth(espeak, "the thought")
    _, _, families = _mouth(espeak, "the families")
    _, _, weather = _mouth(espeak, "the weather")
    _, _, people = _mouth(espeak, "see")
    assert thought[:, TONGUE_OUT].max() > 0.6 > 0.3 > people[:, TONGUE_OUT].max()
    assert families[:, TUCK].max() > 0.6 > 0.2 > weather[:, TUCK].max()
    assert weather[:, SPREAD].min() < -0.6
    assert weather[:, PROTRUSION].max() > 0.6
    assert people[:, SPREAD].max() > 0.4


def test_million_and_billion_look_the_same(espeak: Espeak) -> None:
    """Resampled to equal length, they differ less than MILLION and any other word."""
    shapes = {}
    for word in ("million", "billion", "moment", "people", "world"):
        _, times, mouth = _mouth(espeak, word)
        grid = np.linspace(0, times[-1], 50)
        shapes[word] = np.stack([np.interp(grid, times, column) for column in mouth.T])
    distance = {word: np.abs(shapes[word] - shapes["million"]).mean() for word in shapes}
    assert distance["billion"] < 0.5 * min(distance[word] for word in ("moment", "people", "world"))


def test_trajectory_does_not_depend_on_the_span_asked_for(espeak: Espeak) -> None:
    speech = _say(espeak, "weather")
    segments = segments_of(speech.phonemes, speech.end_seconds)
    options = {"target_noise": 0.1, "tempo": 1.2}
    long = mouth_trajectory(segments, np.arange(60) * 0.01, np.random.default_rng(1), **options)
    short = mouth_trajectory(segments, np.arange(20, 40) * 0.01, np.random.default_rng(1), **options)
    np.testing.assert_allclose(short, long[20:40], atol=1e-9)
