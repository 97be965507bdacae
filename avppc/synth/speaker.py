"""The speakers: each has a face and a voice, drawn at random from the data set's seed and their numbers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avppc.clip import SPLITS
from avppc.synth.config import SynthConfig

ACCENTS = ("en", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us", "en-us-nyc")
# espeak-ng's voice variants that sound like a person: no robots, whispers or croaks.
_VARIANTS = """
    Alicia Andrea Andy Annie Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike adam anika antonio aunty
    belinda benjamin boris caleb david ed edward f1 f2 f3 f4 f5 grandma grandpa gustave iven iven2 iven3 john kaukovalta
    klatt klatt2 klatt3 linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel miguel norbert pablo paul pedro quincy rob
    robert sandro shelby steph steph2 steph3 travis victor zac
"""
VARIANTS: tuple[str, ...] = tuple(_VARIANTS.split())
_VARIANTS_OF_VAL, _VARIANTS_OF_TEST = 7, 14
_FACE_STREAM, _VOICE_STREAM, _VARIANT_STREAM, _HEAD_STREAM = 101, 102, 103, 104

Color = NDArray[np.float64]  # [3] blue, green, red, 0 to 255


@dataclass(frozen=True)
class Face:
    """Lengths in pixels of the 256 x 256 face, colours as blue, green, red from 0 to 255."""

    skin: Color
    lip: Color
    hair: Color
    half_width: float
    """From the middle of the face to its side."""
    half_height: float
    """From the middle of the face to the chin."""
    nose: float
    """Width of the nose, 1 the average."""
    brow: float
    """Density of the eyebrows, 0 to 1."""
    beard: float
    moustache: float
    """Density, 0 (shaven) to 1."""
    age: float
    """Depth of the folds beside the mouth, 0 to 1."""
    texture: float
    """Unevenness of the skin, gray levels."""
    mouth_half_width: float
    upper_lip: float
    lower_lip: float
    bow: float
    """Depth of the cupid's bow, 0 to 1."""
    asymmetry: float
    smile: float
    """Lift of the corners at rest."""
    tooth: float
    """Brightness of the teeth, 0 to 1."""
    opening: float
    """Gap between the lips at open = 1."""
    spread_gain: float
    round_gain: float
    """How far this mouth follows a wide and a round target."""
    rest_open: float
    """How far the mouth stays open in silence, 0 to 1."""
    tempo: float
    """Stretches the time constants of the movement; above 1 the mouth is lazy."""
    head_seed: tuple[int, ...]
    """What the shape of the head is drawn from."""
    identity: float
    """How far it may be from the average, 0 to 1."""


@dataclass(frozen=True)
class Voice:
    """Settings of the speech synthesiser."""

    name: str
    """Accent and variant, as "en-us+f3"."""
    rate_wpm: int
    pitch: int
    pitch_range: int

    @property
    def variant(self) -> str:
        """The part of the name after the accent: "f3"."""
        return self.name.partition("+")[2]


@dataclass(frozen=True)
class Speaker:
    """A person of the data set: one face, one voice."""

    number: int
    """In the data set; splits have their own."""
    face_number: int
    """Equal numbers are equal faces."""
    face: Face
    voice: Voice


class _Draws:
    """Uniform draws, drawn together towards the middle of their ranges as spread goes from 1 to 0."""

    def __init__(self, entropy: list[int], spread: float) -> None:
        self.rng = np.random.default_rng(entropy)
        self.spread = spread

    def __call__(self, low: float, high: float) -> float:
        middle = (low + high) / 2
        return middle + (float(self.rng.uniform(low, high)) - middle) * self.spread

    def color(self, *ranges: tuple[float, float]) -> Color:
        return np.array([self(*limits) for limits in ranges])

    def sometimes(self, probability: float, low: float, high: float) -> float:
        """A draw with this probability, else 0."""
        value = self(low, high)
        return value if self.rng.random() < probability * self.spread else 0.0


def make_face(seed: int, number: int, identity: float) -> Face:
    """The face of this number; identity from 0 (the average face) to 1."""
    draw = _Draws([seed, _FACE_STREAM, number], identity)
    tone = draw(0, 1)
    skin = (1 - tone) * np.array([190.0, 205.0, 238.0]) + tone * np.array([55.0, 80.0, 120.0])
    skin = skin * draw.color(*[(0.93, 1.07)] * 3)
    return Face(
        skin=skin,
        lip=skin * draw.color((0.62, 0.85), (0.50, 0.76), (0.80, 1.0)),
        hair=draw(25, 170) * draw.color((0.40, 0.85), (0.60, 0.95), (1.0, 1.0)),  # black, brown, red, blond, gray
        half_width=draw(52, 66),
        half_height=draw(74, 90),
        nose=draw(0.8, 1.25),
        brow=draw(0.4, 1.0),
        beard=draw.sometimes(0.22, 0.3, 0.8),
        moustache=draw.sometimes(0.25, 0.3, 0.9),
        age=draw(0, 1),
        texture=draw(1, 6),
        mouth_half_width=draw(21, 29),
        upper_lip=draw(2.6, 6.0),
        lower_lip=draw(4.5, 9.0),
        bow=draw(0.1, 0.6),
        asymmetry=draw(-0.12, 0.12),
        smile=draw(-0.15, 0.2),
        tooth=draw(0.75, 1.0),
        opening=draw(16, 24) * draw(0.65, 1.15),
        spread_gain=draw(0.7, 1.2),
        round_gain=draw(0.7, 1.2),
        rest_open=draw(0, 0.10),
        tempo=draw(0.8, 1.35),
        head_seed=(seed, _HEAD_STREAM, number),
        identity=identity,
    )


def make_voice(seed: int, number: int, variants: tuple[str, ...], identity: float) -> Voice:
    """The voice of this number, of one of the given variants."""
    draw = _Draws([seed, _VOICE_STREAM, number], identity)
    accent = ACCENTS[draw.rng.integers(len(ACCENTS))]
    variant = variants[draw.rng.integers(len(variants))]
    return Voice(
        name=f"{accent}+{variant}",
        rate_wpm=round(draw(135, 190)),
        pitch=round(draw(25, 80)),
        pitch_range=round(draw(20, 80)),
    )


class Cast:
    """All speakers of a data set."""

    def __init__(self, config: SynthConfig, identity: float) -> None:
        self._seed = config.seed
        self._identity = identity
        self._kinds = config.split_kinds
        self._variants = split_variants(config.seed)
        self.sizes = {"train": config.train_speakers, "val": config.val_speakers, "test": config.test_speakers}
        self._make_face = functools.cache(make_face)
        self._make_voice = functools.cache(make_voice)

    def speaker(self, split: str, number: int) -> Speaker:
        """The split's speaker of this number, from 0 to sizes[split] - 1."""
        own = sum(self.sizes[name] for name in SPLITS[: SPLITS.index(split)]) + number
        shared = number % self.sizes["train"]  # what is not split belongs to a training speaker too
        face_number = own if "face" in self._kinds else shared
        voice_number = own if "voice" in self._kinds else shared
        variants = self._variants[split] if "voice" in self._kinds else VARIANTS
        face = self._make_face(self._seed, face_number, self._identity)
        return Speaker(own, face_number, face, self._make_voice(self._seed, voice_number, variants, self._identity))


def split_variants(seed: int) -> dict[str, tuple[str, ...]]:
    """The voice variants dealt out to the three splits: no variant in two of them."""
    order = np.random.default_rng([seed, _VARIANT_STREAM]).permutation(len(VARIANTS))
    shuffled = tuple(VARIANTS[index] for index in order)
    test, val = shuffled[:_VARIANTS_OF_TEST], shuffled[_VARIANTS_OF_TEST : _VARIANTS_OF_TEST + _VARIANTS_OF_VAL]
    return {"train": shuffled[_VARIANTS_OF_TEST + _VARIANTS_OF_VAL :], "val": val, "test": test}
