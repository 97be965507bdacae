"""The still part of a clip: a lit face, hair and background; all that moves is drawn over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from avppc.synth.config import Difficulty
from avppc.synth.speaker import Color, Face

SIZE = 256  # pixels, height and width of a frame
MOUTH_X, MOUTH_Y = 128.0, 163.0  # the middle of LRW's usual crop, rows 115:211 and columns 79:175
FACE_X, FACE_Y = 128.0, 118.0
_EYE_OFFSET, _EYE_Y, _BROW_Y = 24.0, 97.0, 83.0

Image = NDArray[np.float32]

_PIXELS = np.arange(SIZE, dtype=np.float32)
_X, _Y = _PIXELS[None, :], _PIXELS[:, None]


class Light(NamedTuple):
    """One lamp and the light all around."""

    direction: NDArray[np.float32]  # [3] unit vector towards the lamp: right, down, out of the picture
    directed: float  # share of the lamp, 0 to 1


@dataclass(frozen=True)
class StillFace:
    """Layers of a face at rest, without its lips."""

    face: Image
    """[256, 256, 4] blue, green, red, and alpha from 0 to 1."""
    background: Image
    """[256, 256, 3] what lies behind: room, shoulders, neck, hair."""
    shading: Image
    """[256, 256, 3] factor of the light on each point of the face, the same for the three colours."""


def as_image(array: NDArray[np.integer | np.floating]) -> Image:
    """An array from OpenCV as float32; OpenCV's own annotations do not tell the dtype."""
    return np.asarray(array, np.float32)


def smoothstep(low: float, high: float, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """0 before low, 1 after high, smooth between (low may be the greater)."""
    t = np.clip((x - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def draw_light(rng: np.random.Generator, difficulty: Difficulty) -> Light:
    """A lamp above the camera, the further aside and the stronger the harder the clips are."""
    slant = 0.75 * rng.uniform(-1, 1) * difficulty.light
    direction = np.array([slant, -0.35 + 0.3 * rng.uniform(-1, 1), 1.0], np.float32)
    return Light(direction / np.linalg.norm(direction), 0.25 + 0.55 * rng.random() * difficulty.light)


def paint_face(face: Face, light: Light, rng: np.random.Generator) -> StillFace:
    """The layers of this face; what rng draws (texture, background) changes from clip to clip."""
    x, y = (_X - FACE_X) / face.half_width, (_Y - FACE_Y) / face.half_height
    radius2 = (x * x + y * y).astype(np.float32)  # 1 at the edge of the face
    shading = _shading(x, y, radius2, light)
    skin = _relief(face) * (face.skin.astype(np.float32)[:, None, None] + _skin_noise(face, rng))  # [3, 256, 256]
    _paint_eyes(skin, face)
    _paint_beard(skin, face, radius2, rng)
    skin *= shading
    fringe = smoothstep(0, 10, (FACE_Y - face.half_height * 0.62) + 0.004 * (_X - FACE_X) ** 2 - _Y)
    _blend(skin, face.hair, fringe)
    layer = cv2.merge([*skin, smoothstep(1.0, 0.93, radius2)])
    return StillFace(as_image(layer), _paint_background(face, rng), as_image(cv2.cvtColor(shading, cv2.COLOR_GRAY2BGR)))


def _shading(x: Image, y: Image, radius2: Image, light: Light) -> Image:
    """Lambert's law on an ellipsoid, mixed with the light all around."""
    depth = np.sqrt(np.clip(1 - 0.92 * radius2, 0.03, 1))
    right, down, out = light.direction
    lambert = np.maximum(x * right + y * down + depth * out, 0)
    return np.asarray(lambert * light.directed + (1 - light.directed), np.float32)


def _skin_noise(face: Face, rng: np.random.Generator) -> Image:
    """[256, 256] gray levels: pores and blotches."""
    pores = cv2.GaussianBlur(_white_noise(rng, SIZE), (0, 0), 1.2) * 1.5
    blotches = cv2.resize(_white_noise(rng, SIZE // 16), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) * 0.4
    return np.asarray((pores + blotches) * face.texture, np.float32)


def _white_noise(rng: np.random.Generator, size: int) -> Image:
    return rng.standard_normal((size, size), dtype=np.float32)


def _relief(face: Face) -> Image:
    """[256, 256] factor on the skin: soft lights and shadows of nose, chin, cheeks and folds."""
    nose, chin = face.nose, MOUTH_Y + 13 + face.lower_lip
    blobs = [  # x, y, standard deviations, amount
        (FACE_X, 140, 9 * nose, 3, -0.28),
        (FACE_X - 7 * nose, 141, 2.6, 2, -0.35),
        (FACE_X + 7 * nose, 141, 2.6, 2, -0.35),
        (FACE_X, 128, 4, 12, 0.12),
        (FACE_X, 135, 6 * nose, 4, 0.10),
        (MOUTH_X, chin, 14, 3.5, -0.16),
        (MOUTH_X, MOUTH_Y - 10, 2.2, 4, -0.10),
        (FACE_X, MOUTH_Y + 30, 16, 8, 0.07),
    ]
    for side in (-1, 1):
        blobs += [
            (FACE_X + side * 33, MOUTH_Y - 14, 4, 14, -0.10 * (0.4 + face.age)),
            (FACE_X + side * 38, 132, 12, 10, 0.07),
            (FACE_X + side * _EYE_OFFSET, 94, 13, 7, -0.12),
        ]
    x, y, sigma_x, sigma_y, amount = np.array(blobs, np.float32).T
    columns = np.exp(-0.5 * ((_PIXELS - x[:, None]) / sigma_x[:, None]) ** 2)  # [blobs, 256]
    rows = amount[:, None] * np.exp(-0.5 * ((_PIXELS - y[:, None]) / sigma_y[:, None]) ** 2)
    return np.asarray(1 + rows.T @ columns, np.float32)


def over(above: Image, below: Image, alpha: Image) -> Image:
    """[H, W, 3] pictures one over the other, alpha [H, W] the share of the upper one."""
    return as_image(cv2.blendLinear(above, below, alpha, 1 - alpha))


def _blend(planes: Image, color: Color, amount: Image) -> None:
    """Moves [3, H, W] planes towards a colour, in place, by an amount [H, W]."""
    planes *= 1 - amount
    planes += amount * color.astype(np.float32)[:, None, None]


def _paint_eyes(skin: Image, face: Face) -> None:
    white = np.array([215.0, 211.0, 209.0])
    for side in (-1, 1):
        x = FACE_X + side * _EYE_OFFSET
        _dab(skin, (x, _EYE_Y), (9.0, 4.2), white, power=3)
        _dab(skin, (x, _EYE_Y), (3.8, 3.8), 0.5 * face.hair, power=3)
        _dab(skin, (x, _BROW_Y), (13.0, 2.6), face.hair, power=2, opacity=face.brow, arch=0.012)


def _dab(
    skin: Image,
    centre: tuple[float, float],
    radii: tuple[float, float],
    color: Color,
    *,
    power: int,  # hardness of the edge
    opacity: float = 1.0,
    arch: float = 0.0,  # lowers the sides
) -> None:
    """An elliptic spot of colour."""
    reach_x, reach_y = 2.5 * radii[0], 2.5 * radii[1] + arch * (2.5 * radii[0]) ** 2
    rows = slice(int(centre[1] - reach_y), int(centre[1] + reach_y) + 1)
    columns = slice(int(centre[0] - reach_x), int(centre[0] + reach_x) + 1)
    x = _X[:, columns] - np.float32(centre[0])
    y = _Y[rows] - np.float32(centre[1]) - np.float32(arch) * x * x
    spot = np.exp(-(((x / np.float32(radii[0])) ** 2 + (y / np.float32(radii[1])) ** 2) ** power))
    _blend(skin[:, rows, columns], color, np.float32(opacity) * spot)


def _paint_beard(skin: Image, face: Face, radius2: Image, rng: np.random.Generator) -> None:
    if face.beard == 0 and face.moustache == 0:
        return
    stubble = np.clip(0.6 + 0.8 * cv2.GaussianBlur(_white_noise(rng, SIZE), (0, 0), 0.8), 0, 1)
    lip = ((_X - MOUTH_X) / 24) ** 2 + ((_Y - (MOUTH_Y - 11)) / 4) ** 2
    chin = ((_X - MOUTH_X) / 20) ** 2 + ((_Y - (MOUTH_Y + 27)) / 11) ** 2
    jaw = np.exp(-(((radius2 - 0.92) / 0.28) ** 2)) * smoothstep(120, 170, _Y)
    beard = face.beard * np.clip(jaw + np.exp(-(chin**2)), 0, 1)
    _blend(skin, 0.8 * face.hair, np.clip(face.moustache * np.exp(-(lip**2)) + beard, 0, 1) * stubble)


def paint_room(rng: np.random.Generator) -> Image:
    """[3, 256, 256] planes of blue, green and red: what is far behind, out of focus."""
    rows, columns = rng.integers(2, 7, 2)
    patches = rng.uniform(20, 210, (rows, columns, 3))
    patches = 0.45 * patches + 0.55 * patches.mean(2, keepdims=True)
    image = np.stack(cv2.split(cv2.resize(patches.astype(np.float32), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)))
    clutter = cv2.resize(_white_noise(rng, SIZE // 8), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    image += clutter * np.float32(4 * rng.random())
    return image


def _paint_background(face: Face, rng: np.random.Generator) -> Image:
    image = paint_room(rng)
    x = _X - FACE_X
    _blend(image, 0.62 * face.skin, smoothstep(46, 40, np.abs(x)) * smoothstep(170, 185, _Y))  # neck
    _blend(image, rng.uniform(10, 200, 3), smoothstep(0, 6, _Y - (222 + 0.006 * x * x)))  # shoulders
    crown = (x / (face.half_width * 1.12)) ** 2 + ((_Y - (FACE_Y - 14)) / (face.half_height * 1.03)) ** 2
    _blend(image, face.hair, smoothstep(1.0, 0.9, crown) * smoothstep(150, 110, _Y))
    return as_image(cv2.merge(list(np.clip(image, 0, 255))))
