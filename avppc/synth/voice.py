"""The sound of a clip: espeak-ng speaks, with the time of every phoneme and word; then a room and noise."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, c_char, c_char_p, c_int, c_short, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import espeakng_loader
import numpy as np
from numpy.typing import NDArray

from avppc.clip import CLIP_SAMPLES, SAMPLE_RATE_HZ
from avppc.synth.config import Difficulty

_LEVEL = 0.07  # root mean square of the speech
_DECAY = 6.9  # -60 dB over the reverberation time, in nepers

# From espeak-ng's speak_lib.h.
_OUTPUT_SYNCHRONOUS = 2
_PHONEME_EVENTS = 0x0001
_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_POSITION_CHARACTER = 1
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4
_EVENT_LIST_END, _EVENT_WORD, _EVENT_PHONEME = 0, 1, 7

_PAUSE = "_"  # names of pauses start with it
_STRESS_MARKS = "',%=|"


def cut_speech(
    speech: Speech,
    start_seconds: float,  # of the clip, in the utterance; may lie outside it
) -> NDArray[np.float64]:  # [18560]
    """The clip's span of the utterance at 16 kHz, silence where there is none."""
    samples = _resample(speech.samples / 32768.0, speech.sample_rate_hz)
    start = round(start_seconds * SAMPLE_RATE_HZ)
    clip = np.zeros(CLIP_SAMPLES)
    low, high = max(0, start), min(len(samples), start + CLIP_SAMPLES)
    if high > low:
        clip[low - start : high - start] = samples[low:high]
    return clip


def _resample(samples: NDArray[np.float64], rate_hz: int) -> NDArray[np.float64]:
    """To 16 kHz by cutting the spectrum off at 8 kHz (band-limited interpolation)."""
    chunk = rate_hz // np.gcd(rate_hz, SAMPLE_RATE_HZ)  # samples that last a whole number of samples at 16 kHz
    chunks = 1 << int(np.ceil(np.log2(len(samples) / chunk + 1)))  # zeros behind; a power of two keeps the FFT fast
    target = chunks * chunk * SAMPLE_RATE_HZ // rate_hz
    spectrum = np.fft.rfft(samples, chunks * chunk)[: target // 2 + 1]
    resampled: NDArray[np.float64] = np.fft.irfft(spectrum, target) * (target / (chunks * chunk))
    return resampled[: -(-len(samples) * SAMPLE_RATE_HZ // rate_hz)]


def mix(
    speech: NDArray[np.float64],  # [S]
    rng: np.random.Generator,
    difficulty: Difficulty,
) -> tuple[NDArray[np.float32], float]:  # [S] from -1 to 1, and the speech-to-noise ratio in dB
    """Speech in a room, with white, pink or brown noise at a drawn ratio and overall level."""
    speech = speech * (_LEVEL / (_rms(speech) + 1e-6))
    if rng.random() < difficulty.reverb:
        speech = _reverberate(speech, rng)
    snr_db = float(rng.uniform(*difficulty.snr_db))
    noise = _colored_noise(len(speech), int(rng.integers(3)), rng)
    noise *= _rms(speech) / _rms(noise) * 10 ** (-snr_db / 20)
    gain = 10 ** (rng.uniform(-6, 6) / 20)
    return np.clip((speech + noise) * gain, -1, 1).astype(np.float32), snr_db


def _rms(samples: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(samples**2)))


def _reverberate(speech: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Speech plus its tail in a room of 80 to 500 ms reverberation time."""
    length = int(SAMPLE_RATE_HZ * rng.uniform(0.08, 0.5))
    response = rng.normal(size=length) * np.exp(-_DECAY * np.arange(length) / length)
    response *= rng.uniform(0.1, 0.5) / np.sqrt((response**2).sum())
    response[0] = 1.0
    size = 1 << (len(speech) + length - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(response, size), size)[: len(speech)]


def _colored_noise(length: int, color: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Noise whose power falls as 1 / frequency^color: white, pink, brown."""
    spectrum = np.fft.rfft(rng.normal(size=length))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** (color / 2)
    return np.fft.irfft(spectrum, length)


class _EventId(ctypes.Union):
    _fields_ = (("number", c_int), ("name", c_char_p), ("string", c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", c_int),
        ("unique_identifier", c_uint),
        ("text_position", c_int),  # in characters, from 1
        ("length", c_int),
        ("audio_position", c_int),  # ms
        ("sample", c_int),
        ("user_data", c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(c_int, POINTER(c_short), c_int, POINTER(_Event))


class Phoneme(NamedTuple):
    """A phoneme without its stress mark; names that start with "_" are pauses."""

    name: str
    start_seconds: float

    @property
    def is_pause(self) -> bool:
        """Whether nothing is said."""
        return self.name.startswith(_PAUSE)


class SpokenWord(NamedTuple):
    """A word, or a group that espeak-ng says as one ("in the"), by its place in the text."""

    text_offset: int
    start_seconds: float


class Speech(NamedTuple):
    """One utterance."""

    samples: NDArray[np.int16]  # [S]
    sample_rate_hz: int
    phonemes: tuple[Phoneme, ...]
    words: tuple[SpokenWord, ...]
    end_seconds: float  # of the last phoneme


@functools.cache
def voice_variants() -> frozenset[str]:
    """Names of the voice variants that espeak-ng has; it takes unknown names silently, so check against these."""
    return frozenset(path.name for path in (Path(espeakng_loader.get_data_path()) / "voices" / "!v").iterdir())


class Espeak:
    """The library, once a process. Not deterministic: the same call may give other samples and times 1 ms apart."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(espeakng_loader.get_data_path()).encode()
        self._library.espeak_Synth.argtypes = [
            c_char_p, c_size_t, c_uint, c_int, c_uint, c_uint, c_void_p, c_void_p,
        ]  # fmt: skip
        self.sample_rate_hz = int(
            self._library.espeak_Initialize(_OUTPUT_SYNCHRONOUS, 0, data, _PHONEME_EVENTS | _DONT_EXIT)
        )
        if self.sample_rate_hz <= 0:
            raise OSError(f"espeak-ng could not be started with the data in {data.decode()}")
        self._callback = _Callback(self._on_audio)  # kept: the library holds only the address
        self._library.espeak_SetSynthCallback(self._callback)
        self._chunks: list[NDArray[np.int16]] = []
        self._events: list[tuple[int, int, float, str]] = []  # (type, text position, seconds, name)

    def _on_audio(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        for event in _until_end(events):
            name = bytes(event.id).split(b"\0")[0].decode("utf-8", "replace") if event.type == _EVENT_PHONEME else ""
            self._events.append((event.type, event.text_position, event.audio_position / 1000, name))
        return 0

    def say(self, text: str, voice: str, *, rate_wpm: int, pitch: int, pitch_range: int) -> Speech:
        """Speaks text; voice is "language+variant", rate 80 to 450 words a minute, pitch and range 0 to 99."""
        language, _, variant = voice.partition("+")
        if variant and variant not in voice_variants():
            raise ValueError(f"voice must name a variant of espeak-ng after the '+', got {voice!r}")
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"voice must start with a language of espeak-ng, got {language!r}")
        for parameter, value in ((_RATE, rate_wpm), (_PITCH, pitch), (_PITCH_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._chunks, self._events = [], []
        data = text.encode() + b"\0"
        status = self._library.espeak_Synth(data, len(data), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None)
        if status != 0 or not self._chunks:
            raise OSError(f"espeak-ng said nothing for {text!r} (status {status})")
        return self._speech()

    def _speech(self) -> Speech:
        samples = np.concatenate(self._chunks)
        phonemes = tuple(
            Phoneme(name.strip(_STRESS_MARKS) or _PAUSE, s)
            for kind, _, s, name in self._events
            if kind == _EVENT_PHONEME
        )
        words = tuple(SpokenWord(position - 1, s) for kind, position, s, _ in self._events if kind == _EVENT_WORD)
        pauses = [phoneme.start_seconds for phoneme in phonemes if phoneme.is_pause]
        end = pauses[0] if pauses else len(samples) / self.sample_rate_hz
        return Speech(samples, self.sample_rate_hz, phonemes, words, end)


def _until_end(events: Any) -> Sequence[Any]:
    """The events of the C array before the one that ends it."""
    found: list[Any] = []
    while events[len(found)].type != _EVENT_LIST_END:
        found.append(events[len(found)])
    return found
