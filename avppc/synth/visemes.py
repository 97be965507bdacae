"""From phonemes to the movement of the mouth: a target shape for each phoneme, blended by dominance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from avppc.synth.voice import Phoneme

# The columns of a mouth trajectory. Each runs from 0 to 1, but spread, from -1 (round) to 1 (wide).
PARAMETERS = ("open", "spread", "protrusion", "tuck", "press", "tongue", "tongue_out", "teeth")
OPEN, SPREAD, PROTRUSION, TUCK, PRESS, TONGUE, TONGUE_OUT, TEETH = range(len(PARAMETERS))

# How fast each parameter follows, seconds: the lips press in 30 ms, but need 85 ms to protrude.
_TAU_SECONDS = np.array([0.045, 0.075, 0.085, 0.035, 0.030, 0.035, 0.035, 0.040])
_GRID_SECONDS = 0.010
_LOW_PASS_TAPS = 6  # a side
_LOW_PASS_SIGMA = 2.2  # grid steps: what muscles cannot follow
_FLAT_TOP = 0.45  # share of a segment's half over which its dominance stays at the top
_FLOOR = 1e-3  # dominance of the closed, neutral mouth, everywhere
_SHORTEST_HALF_SECONDS = 0.008


class Viseme(NamedTuple):
    """The shape of the mouth (or shapes, of a diphthong) that a phoneme asks for."""

    targets: NDArray[np.float64]  # [k, 8], k shapes one after the other (diphthongs); NaN where it asks nothing
    strength: NDArray[np.float64]  # [8] dominance over the neighbours
    reach: float  # factor on the time constants of open, tuck and press


class Segment(NamedTuple):
    """A viseme from start to end, seconds of the utterance."""

    start: float
    end: float
    viseme: Viseme


def _shape(**asked: float) -> NDArray[np.float64]:
    return np.array([asked.get(name, np.nan) for name in PARAMETERS])


def _consonant(**asked: float) -> NDArray[np.float64]:
    return _shape(**({"tuck": 0.0, "press": 0.0} | asked))


def _vowel(open: float, spread: float, protrusion: float = 0.0, **asked: float) -> NDArray[np.float64]:
    neutral = {"tuck": 0.0, "press": 0.0, "tongue": 0.15, "tongue_out": 0.0, "teeth": 0.0}
    return _shape(**(neutral | {"open": open, "spread": spread, "protrusion": protrusion} | asked))


def _viseme(*targets: NDArray[np.float64], reach: float = 1.0, **strength: float) -> Viseme:
    return Viseme(np.stack(targets), np.array([strength.get(name, 1.0) for name in PARAMETERS]), reach)


_EE = _vowel(0.24, 0.80, teeth=0.4)
_IH = _vowel(0.32, 0.45, teeth=0.2)
_EH = _vowel(0.56, 0.38)
_AE = _vowel(0.82, 0.35)
_AH = _vowel(0.92, -0.05)
_OH = _vowel(0.62, -0.55, 0.50)
_AW = _vowel(0.58, -0.75, 0.75)
_UH = _vowel(0.30, -0.60, 0.60)
_OO = _vowel(0.16, -0.90, 0.95)
_UP = _vowel(0.60, 0.05)
_SCHWA = _vowel(0.36, 0.00)
_ER = _vowel(0.40, -0.25, 0.30)
_GOOSE_ONSET = _vowel(0.24, -0.30, 0.40, teeth=0.4)

_REST = _viseme(
    _shape(open=0, spread=0, protrusion=0, tuck=0, press=0.15, tongue=0, tongue_out=0, teeth=0), open=0.8, press=0.6
)

# By espeak-ng's phoneme names. Lips that must close win over any neighbour (high strength), but briefly (short reach).
_TABLE: dict[str, Viseme] = {
    "p b m m-": _viseme(_consonant(open=0, press=1, tongue_out=0, teeth=0), open=12, press=6, reach=0.45),
    "f v": _viseme(_consonant(open=0.10, tuck=1, tongue_out=0, teeth=0.3), open=5, tuck=6, reach=0.6),
    "T D": _viseme(_consonant(open=0.24, tongue=0.9, tongue_out=1, teeth=0.3), open=1.5, tongue_out=4),
    "t d n": _viseme(_consonant(open=0.22, tongue=0.8, tongue_out=0.1, teeth=0.4), open=0.7),
    "t# t2 t[ n- n^ ?": _viseme(_consonant(open=0.22, tongue=0.8, tongue_out=0.1, teeth=0.4)),
    "l": _viseme(_consonant(open=0.36, tongue=1, tongue_out=0.15, teeth=0.1)),
    "@L l/": _viseme(_consonant(open=0.34, spread=-0.15, tongue=0.95, teeth=0.1)),
    "s z": _viseme(_consonant(open=0.20, spread=0.30, protrusion=0, tongue=0.4, tongue_out=0, teeth=1)),
    "S Z tS dZ": _viseme(
        _consonant(open=0.28, spread=-0.55, protrusion=0.85, tongue=0.3, tongue_out=0, teeth=0.9),
        open=2,
        spread=3,
        protrusion=3,
    ),
    "k g N x": _viseme(_consonant(open=0.30, tongue=0.1), open=0.7),
    "h ;": _viseme(_consonant()),
    "r r-": _viseme(_consonant(open=0.24, spread=-0.40, protrusion=0.55, tongue=0.3, teeth=0.3)),
    "w w#": _viseme(_consonant(open=0.10, spread=-1, protrusion=1, tongue=0, teeth=0), open=2, spread=3, protrusion=3),
    "j": _viseme(_consonant(open=0.20, spread=0.50, tongue=0.4, teeth=0.4)),
    "i: i": _viseme(_EE),
    "I I2 I#": _viseme(_IH),
    "E": _viseme(_EH),
    "a aa": _viseme(_AE),
    "A: A@": _viseme(_AH),
    "0 O2": _viseme(_OH),
    "O: O@ o@": _viseme(_AW),
    "U": _viseme(_UH),
    "u:": _viseme(_GOOSE_ONSET, _OO),
    "V VR": _viseme(_UP),
    "@ @2 a# @-": _viseme(_SCHWA),
    "3 3: IR": _viseme(_ER),
    "eI": _viseme(_EH, _EE),
    "aI aI2 aI3": _viseme(_AE, _EE),
    "OI": _viseme(_AW, _EE),
    "aU": _viseme(_AE, _OO),
    "oU": _viseme(_OH, _OO),
    "i@ i@3": _viseme(_EE, _SCHWA),
    "e@": _viseme(_EH, _SCHWA),
    "U@": _viseme(_UH, _SCHWA),
    "aI@": _viseme(_AE, _IH, _SCHWA),
}
VISEMES: dict[str, Viseme] = {name: viseme for names, viseme in _TABLE.items() for name in names.split()}
_CLASSES: dict[str, str] = {name: names.split()[0] for names in _TABLE for name in names.split()}
_BURST_STOPS = frozenset({"p", "t", "t2", "k", "tS"})


def viseme_of(name: str) -> Viseme:
    """The viseme of an espeak-ng phoneme; a variant it does not know is taken for its base, else for a schwa."""
    return VISEMES.get(name) or VISEMES.get(name.rstrip("#-2:;")) or VISEMES["@"]


def viseme_class(name: str) -> str:
    """The first phoneme of those that look like this one, such as "p" for "b" and "m"; unknown names as above."""
    return _CLASSES.get(name) or _CLASSES.get(name.rstrip("#-2:;")) or _CLASSES["@"]


def segments_of(phonemes: Sequence[Phoneme], end_seconds: float) -> list[Segment]:
    """When the mouth makes each phoneme, between long rests before and after.

    espeak-ng stamps voiceless stops at their burst: the closure lies before. It stamps /b/ at the closure, but at the
    burst where the utterance starts with it.
    """
    segments = []
    for index, (name, start) in enumerate(phonemes):
        end = phonemes[index + 1].start_seconds if index + 1 < len(phonemes) else end_seconds + 0.3
        after_pause = index == 0 or phonemes[index - 1].is_pause
        if phonemes[index].is_pause:
            segments.append(Segment(start, end, _REST))
            continue
        if name in _BURST_STOPS:
            start, end = start - 0.055, start + 0.015
        elif name == "b":
            start, end = (start - 0.060, start + 0.010) if after_pause else (start, min(end, start + 0.070))
        segments.append(Segment(start, end, viseme_of(name)))
    first = segments[0].start
    last = max(end_seconds + 0.05, segments[-1].end)
    return [Segment(first - 1.0, first, _REST), *segments, Segment(last, last + 2.0, _REST)]


def mouth_trajectory(
    segments: Sequence[Segment],
    times: NDArray[np.float64],  # [T] seconds of the utterance, rising
    rng: np.random.Generator,
    *,
    target_noise: float,
    tempo: float,
) -> NDArray[np.float64]:  # [T, 8]
    """The mouth's parameters at the given times.

    Every segment pulls the mouth towards its targets with a dominance that falls off exponentially in time (Cohen and
    Massaro's model of co-articulation); the mouth is at the dominance-weighted mean, smoothed. tempo stretches all
    time constants, target_noise is the standard deviation of open, spread and protrusion around the targets.
    """
    margin = _LOW_PASS_TAPS * _GRID_SECONDS
    grid = np.arange(times[0] - margin, times[-1] + 2 * margin, _GRID_SECONDS)  # [G]
    centres, halves, targets, strengths, reaches = _stack(segments)  # [K], [K], [K, 8] three times
    noise = np.zeros_like(targets)
    noise[:, : PROTRUSION + 1] = rng.normal(0.0, target_noise, (len(targets), PROTRUSION + 1))
    noise[strengths[:, OPEN] > 4, OPEN] = 0  # lips that must close do close
    asked = ~np.isnan(targets)
    targets = np.where(asked, targets + noise, 0.0)
    distance = np.maximum(0.0, np.abs(grid - centres[:, None]) - _FLAT_TOP * halves[:, None])  # [K, G]
    rate = 1.0 / (_TAU_SECONDS * tempo * reaches)  # [K, 8]
    dominance = (asked * strengths)[:, None] * np.exp(-distance[..., None] * rate[:, None])  # [K, G, 8]
    shape = (dominance * targets[:, None]).sum(0) / (dominance.sum(0) + _FLOOR)  # [G, 8]
    smooth = _low_pass(shape, _LOW_PASS_SIGMA * tempo)
    return np.stack([np.interp(times, grid, column) for column in smooth.T], axis=1)


def _stack(segments: Sequence[Segment]) -> tuple[NDArray[np.float64], ...]:
    """The segments' targets as rows: centre, half width, target, strength and reach of each."""
    centres, halves, targets, strengths, reaches = [], [], [], [], []
    for start, end, viseme in segments:
        parts = len(viseme.targets)
        width = (end - start) / parts
        reach = np.ones(len(PARAMETERS))
        reach[[OPEN, TUCK, PRESS]] = viseme.reach
        for part, target in enumerate(viseme.targets):
            centres.append(start + (part + 0.5) * width)
            halves.append(max(width / 2, _SHORTEST_HALF_SECONDS))
            targets.append(target)
            strengths.append(viseme.strength)
            reaches.append(reach)
    return np.array(centres), np.array(halves), np.array(targets), np.array(strengths), np.array(reaches)


def _low_pass(shape: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """[G, 8] smoothed in time by a Gaussian of sigma grid steps."""
    taps = np.exp(-0.5 * (np.arange(-_LOW_PASS_TAPS, _LOW_PASS_TAPS + 1) / sigma) ** 2)
    padded = np.pad(shape, ((_LOW_PASS_TAPS, _LOW_PASS_TAPS), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(taps), axis=0)  # [G, 8, taps]
    return np.asarray(windows @ (taps / taps.sum()))
