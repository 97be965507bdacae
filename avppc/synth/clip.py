"""One clip from its place in the plan: speech, mouth movement, picture and sound."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from avppc.clip import CLIP_FRAMES, SPLITS, VIDEO_FPS
from avppc.synth import mouth, visemes
from avppc.synth import voice as sound
from avppc.synth.config import AFTER, BEFORE, Difficulty, Look
from avppc.synth.face import (
    FACE_X,
    MOUTH_X,
    MOUTH_Y,
    SIZE,
    Image,
    Light,
    StillFace,
    as_image,
    draw_light,
    over,
    paint_face,
    smoothstep,
)
from avppc.synth.speaker import Face, Speaker
from avppc.synth.voice import Espeak, Speech

if TYPE_CHECKING:
    from avppc.synth.head import HeadScene

_CLIP_SECONDS = CLIP_FRAMES / VIDEO_FPS
_SPEAKER_STREAM, _SPEECH_STREAM, _MOUTH_STREAM, _PICTURE_STREAM, _SOUND_STREAM = range(5)
# Where the jaw moves the face; below row 182 all of it moves, up to 15 pixels for the widest mouth.
_JAW_TOP, _JAW_BOTTOM, _JAW_LEFT, _JAW_RIGHT = 136, 232, 60, 196
_JAW = (slice(_JAW_TOP, _JAW_BOTTOM), slice(_JAW_LEFT, _JAW_RIGHT))
_JAW_ROWS = np.arange(_JAW_TOP, _JAW_BOTTOM, dtype=np.float32)
_JAW_COLUMNS = np.tile(np.arange(_JAW_LEFT, _JAW_RIGHT, dtype=np.float32), (len(_JAW_ROWS), 1))
_JAW_WEIGHT = smoothstep(150, 182, _JAW_ROWS)
_PATCH_IN_JAW = (
    slice(mouth.PATCH_TOP - _JAW_TOP, mouth.PATCH_TOP - _JAW_TOP + mouth.PATCH_HEIGHT),
    slice(mouth.PATCH_LEFT - _JAW_LEFT, mouth.PATCH_LEFT - _JAW_LEFT + mouth.PATCH_WIDTH),
)
_JAW_DROP = 0.55  # pixels a pixel between the lips
_PIVOT = (128.0, 140.0)  # the head turns around this point
_NOISE_SIZE = 640
_NOISE_ZERO = 128
_LUMA_NOISE, _CHROMA_NOISE = 0.67, 0.3  # of the same noise on blue, green and red


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
    look: Look = "mouth",
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
    movement = _move_mouth(speech, start, speaker.face, job.rng(seed, _MOUTH_STREAM), difficulty)
    frames, picture = render(movement, speaker.face, job.rng(seed, _PICTURE_STREAM), difficulty, look)
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
    return MadeClip(frames, audio, movement.astype(np.float16), word_seconds, facts)


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
    movement = visemes.mouth_trajectory(
        visemes.segments_of(speech.phonemes, speech.end_seconds),
        times,
        rng,
        target_noise=difficulty.target_noise,
        tempo=face.tempo * rng.uniform(0.9, 1.1),
    )
    silent = np.where(movement[:, visemes.PRESS] < 0.5, face.rest_open, 0.0)
    movement[:, visemes.OPEN] = np.maximum(movement[:, visemes.OPEN], silent)
    return movement


class Camera(NamedTuple):
    """How the clip is filmed."""

    warps: NDArray[np.float64]  # [T, 2, 3] affine maps from the face to the picture
    tone: NDArray[np.uint8]  # [256] gray level seen for each gray level
    blur: float  # standard deviation, pixels
    noise: float  # standard deviation, gray levels


def render(
    trajectory: NDArray[np.float64],  # [T, 8]
    face: Face,
    rng: np.random.Generator,
    difficulty: Difficulty,
    look: Look = "mouth",
) -> tuple[NDArray[np.uint8], dict[str, float]]:
    """Frames in I420 layout, [T, 384, 256] (256 rows of luma, then both chromas), and what was drawn for them."""
    light = draw_light(rng, difficulty)
    scene: _DrawnScene | HeadScene
    if look == "head":
        from avppc.synth.head import HeadScene  # only here: it loads compiled operators

        scene = HeadScene(trajectory, face, light, rng, difficulty)
    else:
        scene = _DrawnScene(trajectory, face, light, rng)
    camera = _draw_camera(len(trajectory), rng, difficulty)
    film = _Film(camera, rng)
    picture = _tone(scene.still, camera)
    frames = np.empty((len(trajectory), SIZE * 3 // 2, SIZE), np.uint8)
    for index in range(len(trajectory)):
        picture[scene.moving] = _tone(scene.draw(index), camera)
        frames[index] = film.shoot(picture, index)
    facts = {"light": round(light.directed, 4), "blur": round(camera.blur, 4), "noise": round(camera.noise, 4)}
    return frames, {**facts, **scene.facts}


class _DrawnScene:
    """A drawn face whose jaw and mouth move."""

    moving = _JAW
    facts: Mapping[str, float] = MappingProxyType({})

    def __init__(self, trajectory: NDArray[np.float64], face: Face, light: Light, rng: np.random.Generator) -> None:
        self._face = face
        self._look = mouth.MouthLook(face.lip * rng.uniform(0.9, 1.1), face.tooth * (232 - 25 * rng.random()))
        self._still = paint_face(face, light, rng)
        self._shapes = mouth.shape_mouth(trajectory, face)
        self._folds = np.clip(0.10 * face.spread_gain * trajectory[:, visemes.SPREAD], 0, 0.2).astype(np.float32)
        self.still = _over(self._still.face, self._still.background)

    def draw(self, index: int) -> Image:
        """The moving part of one frame."""
        part = _move_jaw(self._still, _JAW_DROP * float(self._shapes.gap[index]))
        patch = mouth.draw_mouth(self._shapes, index, self._face, self._look)
        around = part[_PATCH_IN_JAW]
        skin = around * (1 - self._folds[index] * _cheek_folds())
        around[:] = over(patch.color * self._still.shading[mouth.PATCH], skin, patch.alpha)
        return part


def _over(layer: Image, background: Image) -> Image:
    """A [H, W, 4] layer with alpha over a background."""
    color, alpha = cv2.cvtColor(layer, cv2.COLOR_BGRA2BGR), cv2.extractChannel(layer, 3)
    return over(as_image(color), background, as_image(alpha))


def _tone(image: Image, camera: Camera) -> NDArray[np.uint8]:
    """[H, W, 3] as the camera's gray levels, [H, W, 4]: the fourth channel is there because four warp faster."""
    levels = cv2.LUT(cv2.convertScaleAbs(image), camera.tone)
    return np.asarray(cv2.cvtColor(levels, cv2.COLOR_BGR2BGRA), np.uint8)


def _move_jaw(still: StillFace, drop: float) -> Image:
    """The moving part of the face over the background, its lower part drop pixels further down."""
    rows = (_JAW_ROWS - np.float32(drop) * _JAW_WEIGHT)[:, None]
    moved = cv2.remap(still.face, _JAW_COLUMNS, np.repeat(rows, _JAW_COLUMNS.shape[1], 1), cv2.INTER_LINEAR)
    return _over(as_image(moved), still.background[_JAW])


@functools.cache
def _cheek_folds() -> Image:
    """[64, 88, 3] where the cheeks fold as the mouth spreads."""
    x = np.arange(mouth.PATCH_LEFT, mouth.PATCH_LEFT + mouth.PATCH_WIDTH, dtype=np.float32)
    y = np.arange(mouth.PATCH_TOP, mouth.PATCH_TOP + mouth.PATCH_HEIGHT, dtype=np.float32)[:, None]
    height = ((y - (MOUTH_Y - 6)) / 12) ** 2
    left, right = (np.exp(-(((x - (MOUTH_X + side * 30)) / 4) ** 2 + height)) for side in (-1, 1))
    return np.repeat((left + right).astype(np.float32)[..., None], 3, axis=2)


def _draw_camera(frames: int, rng: np.random.Generator, difficulty: Difficulty) -> Camera:
    pose = difficulty.pose
    right = FACE_X - _PIVOT[0] + rng.normal(0, 3 * pose) + _walk(frames, 0.45 * pose, rng)
    down = rng.normal(0, 3 * pose) + _walk(frames, 0.45 * pose, rng)
    tilt = np.deg2rad(rng.normal(0, 4 * pose) + _walk(frames, 0.35 * pose, rng))
    scale = np.exp(rng.normal(0, 0.06 * pose) + _walk(frames, 0.002 * pose, rng))
    shear = rng.normal(0, 0.05 * pose) + _walk(frames, 0.004 * pose, rng)
    turn = 1 - abs(rng.normal(0, 0.06 * pose))  # a turned head is narrower
    cos, sin = np.cos(tilt), np.sin(tilt)
    linear = scale[:, None, None] * np.stack([cos * turn, -sin + shear, sin * turn, cos], 1).reshape(-1, 2, 2)
    pivot = np.array(_PIVOT)
    shift = pivot + np.stack([right, down], 1) - linear @ pivot
    gamma, contrast, brightness = rng.uniform(0.8, 1.25), rng.uniform(0.75, 1.15), rng.uniform(-18, 18)
    tone = ((np.arange(256) / 255) ** gamma - 0.5) * contrast * 255 + 127 + brightness
    return Camera(
        warps=np.concatenate([linear, shift[..., None]], 2),
        tone=np.clip(tone, 0, 255).astype(np.uint8),
        blur=float(rng.uniform(0, 1)) * difficulty.blur,
        noise=float(rng.uniform(1, 5)) * difficulty.noise,
    )


def _walk(frames: int, amount: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """[T] a smooth random walk around 0."""
    kernel = np.hanning(9)
    walk = np.convolve(np.cumsum(rng.normal(size=frames + 8)), kernel / kernel.sum(), "valid")
    return np.asarray(amount * (walk - walk.mean()))


class _Film:
    """Takes the pictures: warp, blur and noise; its noise comes from one large field, shifted each frame."""

    def __init__(self, camera: Camera, rng: np.random.Generator) -> None:
        self._camera = camera
        self._luma_noise = _scaled_noise(camera.noise * _LUMA_NOISE)
        self._chroma_noise = _scaled_noise(camera.noise * _CHROMA_NOISE)
        self._shifts = rng.integers(0, _NOISE_SIZE - SIZE, (len(camera.warps), 2))

    def shoot(self, picture: NDArray[np.uint8], index: int) -> NDArray[np.uint8]:
        """One frame, [384, 256] I420, of a [256, 256, 4] picture."""
        seen = cv2.warpAffine(
            picture, self._camera.warps[index], (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        planes = np.asarray(cv2.cvtColor(seen, cv2.COLOR_BGRA2YUV_I420), np.uint8)
        luma, chroma = planes[:SIZE], planes[SIZE:]
        if self._camera.blur > 0.3:
            luma = np.asarray(cv2.GaussianBlur(luma, (0, 0), self._camera.blur), np.uint8)  # chroma is coarse enough
        y, x = self._shifts[index]
        cv2.addWeighted(luma, 1, self._luma_noise[y : y + SIZE, x : x + SIZE], 1, -_NOISE_ZERO, dst=planes[:SIZE])
        cv2.addWeighted(chroma, 1, self._chroma_noise[y : y + SIZE // 2, x : x + SIZE], 1, -_NOISE_ZERO, dst=chroma)
        return planes


@functools.cache
def _noise_field() -> Image:
    return np.random.default_rng(5).standard_normal((_NOISE_SIZE, _NOISE_SIZE), dtype=np.float32)


def _scaled_noise(sigma: float) -> NDArray[np.uint8]:
    """The noise field with this standard deviation, around 128."""
    return np.asarray(cv2.convertScaleAbs(_noise_field(), alpha=sigma, beta=_NOISE_ZERO), np.uint8)
