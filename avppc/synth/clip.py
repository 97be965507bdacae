"""One clip from its place in the plan: speech, mouth movement, picture and sound."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from avppc.clip import CLIP_FRAMES, SPLITS, VIDEO_FPS
from avppc.synth import visemes
from avppc.synth import voice as sound
from avppc.synth.config import AFTER, BEFORE, Difficulty
from avppc.synth.render import render
from avppc.synth.speaker import Face, Speaker
from avppc.synth.voice import Espeak, Speech

_CLIP_SECONDS = CLIP_FRAMES / VIDEO_FPS
_SPEAKER_STREAM, _SPEECH_STREAM, _MOUTH_STREAM, _PICTURE_STREAM, _SOUND_STREAM = range(5)


class Job(NamedTuple):
    """A clip to make. Its random numbers depend on the seed and on its split, folder and number alone."""

    folder: str  # the word, or the folder of unlabelled clips
    split: str
    number: int  # from 1, as in the file's name
    word: str | None  # None: any of the words given to the maker

    @property
    def stem(self) -> str:
        """Path under the root, without suffix."""
        return f"{self.folder}/{self.split}/{self.folder}_{self.number:05d}"

    def entropy(self, seed: int) -> list[int]:
        """The seed of the clip's random numbers, as numpy's default_rng takes it."""
        return [seed, SPLITS.index(self.split), zlib.crc32(self.folder.encode()), self.number]

    def rng(self, seed: int, stream: int) -> np.random.Generator:
        """A generator of the clip's random numbers for one purpose: each _STREAM is independent of the others."""
        return np.random.default_rng([*self.entropy(seed), stream])

    def draw_speaker(self, seed: int, speakers: int) -> int:
        """The number, from 0, of the speaker of this clip among the split's."""
        return int(self.rng(seed, _SPEAKER_STREAM).integers(speakers))


@dataclass(frozen=True, eq=False)
class MadeClip:
    """A clip before it is encoded."""

    frames: NDArray[np.uint8]
    """[29, 384, 256] in I420 layout: 256 rows of luma, then both chromas."""
    audio: NDArray[np.float32]
    """[18560] mono at 16 kHz, -1 to 1."""
    mouth: NDArray[np.float16]
    """[29, 8] the true mouth; columns as visemes.PARAMETERS."""
    word_seconds: float | None
    """Duration of the labelled word."""
    facts: dict[str, Any]
    """What the manifest says about it."""


class _Utterance(NamedTuple):
    text: str
    word_offset: int | None  # of the labelled word in the text


def make_clip(
    job: Job,
    speaker: Speaker,
    difficulty: Difficulty,
    espeak: Espeak,
    *,
    seed: int,
    free_words: tuple[str, ...] = (),
) -> MadeClip:
    """Speaks, moves, films and mixes one clip; free_words are what unlabelled clips talk about."""
    rng = job.rng(seed, _SPEECH_STREAM)
    utterance = _labelled_text(job.word, rng, difficulty) if job.word else _free_text(free_words, rng)
    voice = speaker.voice
    speech = espeak.say(
        utterance.text,
        voice.name,
        rate_wpm=int(np.clip(voice.rate_wpm * rng.uniform(0.88, 1.12), 100, 230)),
        pitch=int(np.clip(voice.pitch + rng.integers(-6, 7), 0, 99)),
        pitch_range=int(np.clip(voice.pitch_range + rng.integers(-10, 11), 0, 99)),
    )
    if utterance.word_offset is None:
        word = None
        centre = rng.uniform(0.25, 0.75) * speech.end_seconds
    else:
        word = _word_span(speech, utterance.word_offset)
        centre = sum(word) / 2 + rng.normal(0, difficulty.jitter_seconds)
    start = centre - _CLIP_SECONDS / 2
    mouth = _move_mouth(speech, start, speaker.face, job.rng(seed, _MOUTH_STREAM), difficulty)
    frames, picture = render(mouth, speaker.face, job.rng(seed, _PICTURE_STREAM), difficulty)
    audio, snr_db = sound.mix(sound.cut_speech(speech, start), job.rng(seed, _SOUND_STREAM), difficulty)
    word_seconds = round(word[1] - word[0], 4) if word else None
    facts = {
        "text": utterance.text,
        "word_start_seconds": round(word[0] - start, 4) if word else None,
        "word_seconds": word_seconds,
        "phonemes": [[name, round(seconds - start, 4)] for name, seconds in speech.phonemes],
        "snr_db": round(snr_db, 2),
        **picture,
    }
    return MadeClip(frames, audio, mouth.astype(np.float16), word_seconds, facts)


def _labelled_text(word: str, rng: np.random.Generator, difficulty: Difficulty) -> _Utterance:
    """The word, in context as often as the difficulty says."""
    before = f"{rng.choice(BEFORE)} " if rng.random() < difficulty.context else ""
    after = f" {rng.choice(AFTER)}" if rng.random() < difficulty.context else ""
    return _Utterance(f"{before}{word.lower()}{after}", len(before))


def _free_text(words: tuple[str, ...], rng: np.random.Generator) -> _Utterance:
    """A phrase around two of the given words."""
    first, second = rng.choice(len(words), 2, replace=False)
    parts = (rng.choice(BEFORE), words[first].lower(), rng.choice(AFTER), words[second].lower(), rng.choice(AFTER))
    return _Utterance(" ".join(parts), None)


def _word_span(speech: Speech, text_offset: int) -> tuple[float, float]:
    """Start and end, seconds of the utterance, of the word at this place in the text."""
    starts = [word.start_seconds for word in speech.words if word.text_offset <= text_offset]
    ends = [word.start_seconds for word in speech.words if word.text_offset > text_offset]
    start = starts[-1] if starts else 0.0
    return start, max(ends[0] if ends else speech.end_seconds, start + 1 / VIDEO_FPS)


def _move_mouth(
    speech: Speech, start: float, face: Face, rng: np.random.Generator, difficulty: Difficulty
) -> NDArray[np.float64]:  # [29, 8]
    """The mouth in the middle of each frame's time."""
    times = start + (np.arange(CLIP_FRAMES) + 0.5) / VIDEO_FPS
    mouth = visemes.mouth_trajectory(
        visemes.segments_of(speech.phonemes, speech.end_seconds),
        times,
        rng,
        target_noise=difficulty.target_noise,
        tempo=face.tempo * rng.uniform(0.9, 1.1),
    )
    silent = np.where(mouth[:, visemes.PRESS] < 0.5, face.rest_open, 0.0)
    mouth[:, visemes.OPEN] = np.maximum(mouth[:, visemes.OPEN], silent)
    return mouth
