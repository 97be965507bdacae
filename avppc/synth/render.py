"""The picture of a clip: jaw and mouth move the still face, a camera moves around it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from avppc.synth import mouth, visemes
from avppc.synth.config import Difficulty
from avppc.synth.face import (
    FACE_X,
    MOUTH_X,
    MOUTH_Y,
    SIZE,
    Image,
    StillFace,
    as_image,
    draw_light,
    over,
    paint_face,
    smoothstep,
)
from avppc.synth.speaker import Face

# Where the jaw moves the face; below row 182 all of it moves, up to 15 pixels for the widest mouth.
_JAW_TOP, _JAW_BOTTOM, _JAW_LEFT, _JAW_RIGHT = 136, 232, 60, 196
_JAW = (slice(_JAW_TOP, _JAW_BOTTOM), slice(_JAW_LEFT, _JAW_RIGHT))
_JAW_ROWS = np.arange(_JAW_TOP, _JAW_BOTTOM, dtype=np.float32)
_JAW_COLUMNS = np.tile(np.arange(_JAW_LEFT, _JAW_RIGHT, dtype=np.float32), (len(_JAW_ROWS), 1))
_JAW_WEIGHT = smoothstep(150, 182, _JAW_ROWS)
_JAW_DROP = 0.55  # pixels a pixel between the lips
_PIVOT = (128.0, 140.0)  # the head turns around this point
_NOISE_SIZE = 640
_NOISE_ZERO = 128
_LUMA_NOISE, _CHROMA_NOISE = 0.67, 0.3  # of the same noise on blue, green and red


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
) -> tuple[NDArray[np.uint8], dict[str, float]]:
    """Frames in I420 layout, [T, 384, 256] (256 rows of luma, then both chromas), and what was drawn for them."""
    light = draw_light(rng, difficulty)
    look = mouth.MouthLook(face.lip * rng.uniform(0.9, 1.1), face.tooth * (232 - 25 * rng.random()))
    still = paint_face(face, light, rng)
    camera = _draw_camera(len(trajectory), rng, difficulty)
    shapes = mouth.shape_mouth(trajectory, face)
    film = _Film(camera, rng)
    picture = _tone(_over(still.face, still.background), camera)
    frames = np.empty((len(trajectory), SIZE * 3 // 2, SIZE), np.uint8)
    folds = _cheek_folds()
    for index in range(len(trajectory)):
        part = _move_jaw(still, _JAW_DROP * float(shapes.gap[index]))
        fold = np.float32(np.clip(0.10 * face.spread_gain * trajectory[index, visemes.SPREAD], 0, 0.2))
        patch = mouth.draw_mouth(shapes, index, face, look)
        around = part[_PATCH_IN_JAW]
        around[:] = over(patch.color * still.shading[mouth.PATCH], around * (1 - fold * folds), patch.alpha)
        picture[_JAW] = _tone(part, camera)
        frames[index] = film.shoot(picture, index)
    return frames, {"light": round(light.directed, 4), "blur": round(camera.blur, 4), "noise": round(camera.noise, 4)}


_PATCH_IN_JAW = (
    slice(mouth.PATCH_TOP - _JAW_TOP, mouth.PATCH_TOP - _JAW_TOP + mouth.PATCH_HEIGHT),
    slice(mouth.PATCH_LEFT - _JAW_LEFT, mouth.PATCH_LEFT - _JAW_LEFT + mouth.PATCH_WIDTH),
)


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
