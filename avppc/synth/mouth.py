"""The mouth: lips, teeth and tongue of every frame, as a small patch to lay over the face."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from avppc.synth import visemes
from avppc.synth.face import MOUTH_X, MOUTH_Y, Image, over
from avppc.synth.speaker import Color, Face

PATCH_LEFT, PATCH_TOP, PATCH_WIDTH, PATCH_HEIGHT = 84, 138, 88, 64
PATCH = (slice(PATCH_TOP, PATCH_TOP + PATCH_HEIGHT), slice(PATCH_LEFT, PATCH_LEFT + PATCH_WIDTH))
_X, _Y = MOUTH_X - PATCH_LEFT, MOUTH_Y - PATCH_TOP  # the mouth in its patch
_FINE = 2  # lips' edge and interior are drawn this much finer
_SHIFT = 4  # fractional bits of OpenCV's coordinates
_CLOSED_GAP = 0.35  # pixels; below, the lips show one line
_LOWER_LIP_SHARE = 0.70  # of the gap: the lower lip moves more than the upper

_S = np.linspace(-1.0, 1.0, 41)  # from the left corner to the right
_ARC = 1 - _S**2
_CAVITY = np.full((PATCH_HEIGHT * _FINE, PATCH_WIDTH * _FINE, 3), (22, 14, 38), np.uint8)
_TONGUE, _TONGUE_FORWARD = np.array([95.0, 88.0, 165.0]), np.array([125.0, 113.0, 210.0])
_TOOTH = np.array([0.88, 0.97, 1.0])
_COLUMN = np.arange(PATCH_WIDTH, dtype=np.float32)

Column = NDArray[np.float64]  # [T, 1] one value a frame
Curve = NDArray[np.float64]  # [T, 41] along the mouth
Outline = NDArray[np.int32]  # [T, points, 2] in OpenCV's fixed-point coordinates


class MouthLook(NamedTuple):
    """Colours of the mouth in one clip, as light and camera give them."""

    lip: Color
    tooth_brightness: float  # gray level


class Patch(NamedTuple):
    """The mouth of one frame."""

    color: Image  # [64, 88, 3]
    alpha: Image  # [64, 88] 1 on the lips and between them


class Ellipses(NamedTuple):
    """An ellipse of each frame in the middle of the mouth, on the fine canvas."""

    centres: Outline  # [T, 1, 2]
    axes: Outline  # [T, 1, 2]


@dataclass(frozen=True)
class MouthShapes:
    """The mouth of T frames, ready to draw; "fine" outlines are for the canvas of twice the size."""

    gap: NDArray[np.float64]
    """[T] pixels between the lips, in the middle."""
    half_width: NDArray[np.float64]
    """[T] pixels from the middle to a corner of the opening."""
    lips: Outline
    """Around both lips, fine."""
    upper_lip: Outline
    opening: Outline
    """What is between the lips, fine."""
    closure: Outline
    """The line between closed lips."""
    shine: Outline
    """The highlight on the lower lip."""
    upper_teeth: Outline
    lower_teeth: Outline
    """Fine; empty (bottom above top) where they do not show."""
    lower_teeth_show: NDArray[np.bool_]
    """[T]"""
    tucked_teeth: Outline
    """Upper teeth on a tucked lower lip, fine."""
    tucked: NDArray[np.float64]
    """[T] 0, where they do not show, to 1."""
    tongue: Ellipses
    tongue_tip: Ellipses
    tongue_out: NDArray[np.float64]
    """[T] 0 to 1."""


def shape_mouth(
    trajectory: NDArray[np.float64],  # [T, 8]
    face: Face,
) -> MouthShapes:
    """Where everything of the mouth is in each frame: x grows to the right, y downwards."""
    column = {name: trajectory[:, index, None] for index, name in enumerate(visemes.PARAMETERS)}
    tuck, press, teeth, tongue, tongue_out = (
        np.clip(column[name], 0, 1) for name in ("tuck", "press", "teeth", "tongue", "tongue_out")
    )
    protrusion = np.clip(column["protrusion"], 0, 1.1)
    gap = np.maximum(column["open"], 0) * face.opening
    spread = column["spread"] * np.where(column["spread"] > 0, face.spread_gain, face.round_gain) + 0.5 * face.smile
    wide = np.minimum(gap / 15, 1)
    half_width = face.mouth_half_width * (1 + np.where(spread > 0, 0.16, 0.42) * spread) * (1 - 0.05 * wide)
    inner_half_width = half_width * (0.90 - 0.10 * protrusion)
    upper = face.upper_lip * (1 - 0.55 * press) * (1 + 0.35 * protrusion) * (1 - 0.12 * wide)
    lower = face.lower_lip * (1 - 0.50 * press) * (1 + 0.30 * protrusion) * (1 - 0.62 * tuck) * (1 - 0.10 * wide)

    line = _Y - (face.smile + 0.25 * np.maximum(0, spread)) * 2.2 * _S**2
    profile = _ARC ** (0.75 + 0.10 * protrusion)
    top = line - (1 - _LOWER_LIP_SHARE) * gap * profile * (1 + face.asymmetry * _S)
    bottom = line + _LOWER_LIP_SHARE * gap * profile
    bow = 1 + 0.30 * face.bow * (np.exp(-(((np.abs(_S) - 0.28) / 0.16) ** 2)) - np.exp(-((_S / 0.13) ** 2)))
    drawn_in = 2.2 * tuck * profile
    lip_top = top - upper * _ARC**0.75 * bow - 0.1
    lip_bottom = bottom + lower * _ARC**0.65 - drawn_in + 0.1
    outer_x, inner_x = _X + half_width * _S, _X + inner_half_width * _S

    upper_teeth = 0.5 + 2.8 * np.minimum(gap / 6, 1) + 1.5 * teeth + 0.8 * np.maximum(0, column["spread"])
    lower_teeth = 0.6 * teeth * gap + 0.15 * np.minimum(gap, 6) - 1.3 * (1 - teeth)
    tucked = np.clip((tuck - 0.35) / 0.65, 0, 1)
    drop = _LOWER_LIP_SHARE * gap
    tongue_y = _Y + drop * (1 - 0.75 * tongue) + 3 * (1 - tongue) - 0.8 * tongue_out
    tongue_height = np.maximum(1.5, 0.30 * gap + 1.4 * tongue)
    tip_y = _Y + 0.35 * drop + 0.8 * tongue_out
    return MouthShapes(
        gap=gap[:, 0],
        half_width=inner_half_width[:, 0],
        lips=_area(outer_x, lip_top, lip_bottom),
        upper_lip=np.concatenate([_points(outer_x, lip_top, 1), _points(inner_x, top, 1)[:, ::-1]], 1),
        opening=_area(inner_x, top, bottom),
        closure=_points(inner_x, (top + bottom) / 2, 1),
        shine=_points(_X + 0.5 * half_width * _S, bottom + 0.42 * lower - drawn_in, 1),
        upper_teeth=_area(_narrow(inner_x, 0.86), top - 2, top + upper_teeth * (1 - 0.55 * _S**2)),
        lower_teeth=_area(_narrow(inner_x, 0.78), bottom - lower_teeth * (1 - 0.5 * _S**2), bottom + 2),
        lower_teeth_show=lower_teeth[:, 0] > 0.3,
        tucked_teeth=_area(_narrow(inner_x, 0.62), top + 0.2, top + 0.2 + 2.3 * tucked * (1 - 0.5 * _S**2)),
        tucked=tucked[:, 0],
        tongue=_ellipses(tongue_y, inner_half_width * (0.50 + 0.10 * tongue_out), tongue_height),
        tongue_tip=_ellipses(tip_y, 0.46 * inner_half_width, 1.1 + 1.5 * tongue_out),
        tongue_out=tongue_out[:, 0],
    )


def _narrow(x: Curve, factor: float) -> Curve:
    return _X + factor * (x - _X)


def _points(x: Curve, y: Curve, scale: int) -> Outline:
    return np.round(np.stack([x, y], 2) * (scale << _SHIFT)).astype(np.int32)


def _area(x: Curve, top: Curve, bottom: Curve) -> Outline:
    """Around the area between two curves, for the fine canvas."""
    return np.concatenate([_points(x, top, _FINE), _points(x, bottom, _FINE)[:, ::-1]], 1)


def _ellipses(y: Column, half_width: Column, half_height: Column) -> Ellipses:
    return Ellipses(_points(np.full_like(y, _X), y, _FINE), _points(half_width, half_height, _FINE))


def draw_mouth(shapes: MouthShapes, frame: int, face: Face, look: MouthLook) -> Patch:
    """The mouth of one frame."""
    color = _draw_lips(shapes, frame, face, look)
    if shapes.gap[frame] > _CLOSED_GAP:
        color = over(_draw_inside(shapes, frame, look), color, _mask(shapes.opening[frame]))
    if shapes.tucked[frame] > 0:
        tooth = np.empty_like(color)
        tooth[:] = look.tooth_brightness * _TOOTH
        color = over(tooth, color, 0.85 * _mask(shapes.tucked_teeth[frame]))
    return Patch(color, _mask(shapes.lips[frame]))


def _draw_lips(shapes: MouthShapes, frame: int, face: Face, look: MouthLook) -> Image:
    """Both lips, the upper one in shadow, a highlight on the lower, and the line between them where they meet."""
    canvas = np.empty((PATCH_HEIGHT, PATCH_WIDTH, 3), np.uint8)
    canvas[:] = np.clip(look.lip, 0, 255)
    _fill(canvas, shapes.upper_lip[frame], 0.80 * look.lip)
    _line(canvas, shapes.shine[frame], 1.22 * look.lip + 8, max(1, round(0.28 * face.lower_lip)))
    canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), 1.1), np.uint8)
    if shapes.gap[frame] <= _CLOSED_GAP:
        _line(canvas, shapes.closure[frame], 0.42 * look.lip, 1)
    return canvas.astype(np.float32)


def _draw_inside(shapes: MouthShapes, frame: int, look: MouthLook) -> Image:
    """Cavity, tongue and both rows of teeth, darker towards the corners."""
    canvas = _CAVITY.copy()
    tooth = look.tooth_brightness * _TOOTH
    tongue = _TONGUE + shapes.tongue_out[frame] * (_TONGUE_FORWARD - _TONGUE)
    _ellipse(canvas, shapes.tongue, frame, tongue)
    _fill(canvas, shapes.upper_teeth[frame], tooth)
    if shapes.lower_teeth_show[frame]:
        _fill(canvas, shapes.lower_teeth[frame], 0.9 * tooth)
    if shapes.tongue_out[frame] > 0.15:  # the tip, before the teeth
        _ellipse(canvas, shapes.tongue_tip, frame, tongue)
    inside = _coarse(canvas)
    shade = 1 - 0.55 * np.minimum(np.abs(_COLUMN - np.float32(_X)) / max(shapes.half_width[frame], 1), 1) ** 2
    inside *= np.repeat(shade.astype(np.float32), 3).reshape(1, PATCH_WIDTH, 3)
    return inside


def _mask(outline: NDArray[np.int32]) -> Image:
    """[64, 88] 1 inside a fine outline."""
    canvas = np.zeros((PATCH_HEIGHT * _FINE, PATCH_WIDTH * _FINE), np.uint8)
    cv2.fillPoly(canvas, [outline], (255,), cv2.LINE_AA, _SHIFT)
    mask = _coarse(canvas)
    mask *= np.float32(1 / 255)
    return mask


def _coarse(canvas: NDArray[np.uint8]) -> Image:
    """A fine canvas at the patch's own size."""
    return cv2.resize(canvas, (PATCH_WIDTH, PATCH_HEIGHT), interpolation=cv2.INTER_AREA).astype(np.float32)


def _fill(canvas: NDArray[np.uint8], outline: NDArray[np.int32], color: Color) -> None:
    cv2.fillPoly(canvas, [outline], _scalar(color), cv2.LINE_AA, _SHIFT)


def _line(canvas: NDArray[np.uint8], points: NDArray[np.int32], color: Color, thickness: int) -> None:
    cv2.polylines(canvas, [points], False, _scalar(color), thickness, cv2.LINE_AA, _SHIFT)


def _ellipse(canvas: NDArray[np.uint8], ellipses: Ellipses, frame: int, color: Color) -> None:
    centre, axes = ellipses.centres[frame, 0].tolist(), ellipses.axes[frame, 0].tolist()
    cv2.ellipse(canvas, centre, axes, 0, 0, 360, _scalar(color), -1, cv2.LINE_AA, _SHIFT)


def _scalar(color: Color) -> list[float]:
    return [min(max(float(value), 0.0), 255.0) for value in color]
