from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from blob_faces import REFERENCE, SIDE, BlobFinder, BlobJob, paint_face, write_face_video
from hypothesis import given, settings
from hypothesis import strategies as st
from make_videos import moving_pattern, write_video

from avppc.data.config import PrepareConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.data.prepare import prepare
from avppc.data.video import faces as mouth
from avppc.data.video.crop import Crop
from avppc.data.video.decode import decode_clips
from avppc.data.video.source import DecodeError
from avppc.data.video.track import FaceSearch, Found, MouthTrack, similarity, smooth_track, track_mouth

TIMES = np.arange(100) / 25


def face(x: float, y: float = 50.0, side: float = 40.0, degrees: float = 0.0) -> Found:
    angle = np.radians(degrees)
    turned = side * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return Found(np.array([x, y]) + REFERENCE @ turned, np.array([x, y]))


def smoothed(faces: list[Found | None]) -> dict[int, tuple]:
    return smooth_track(list(range(len(faces))), TIMES[: len(faces)], faces, REFERENCE)


@given(
    st.integers(2, 9), st.floats(0.1, 500), st.floats(-180, 180), st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
)
@settings(deadline=None)
def test_similarity_is_recovered(count, zoom, degrees, shift):
    reference = np.random.default_rng(count).normal(size=(count, 2))
    angle = np.radians(degrees)
    matrix = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    a, b = similarity(reference, reference @ matrix.T + shift)
    assert [[a, -b], [b, a]] == pytest.approx(matrix, abs=1e-6 * zoom)


class TestWarp:
    LUMA = moving_pattern(3, 120, 160)

    def warp(self, x, y, a, b, size=96, luma=None):
        return MouthTrack({7: (x, y, a, b)}).warp(self.LUMA if luma is None else luma, 7, size)

    def test_upright_at_the_stored_size_it_is_the_window(self):
        assert np.array_equal(self.warp(79.5, 59.5, 96.0, 0.0), self.LUMA[12:108, 32:128])

    @pytest.mark.parametrize("turns", [1, 2, 3])
    def test_quarter_turns(self, turns):
        a, b = 96 * np.cos(turns * np.pi / 2), 96 * np.sin(turns * np.pi / 2)
        assert np.array_equal(self.warp(79.5, 59.5, a, b), np.rot90(self.LUMA[12:108, 32:128], turns))

    def test_large_faces_are_averaged_not_picked(self):
        """A chessboard of single pixels becomes grey."""
        board = (np.indices((300, 300)).sum(0) % 2 * 255).astype(np.uint8)
        found = self.warp(149.5, 149.5, 288.0, 0.0, luma=board)
        assert np.abs(found.astype(int) - 127).max() <= 30

    def test_beyond_the_frame_its_border_goes_on(self):
        found = self.warp(0.0, 0.0, 96.0, 0.0)
        assert (found[:40, :40] == self.LUMA[0, 0]).all()

    def test_frames_without_a_face(self):
        assert MouthTrack({7: (1, 1, 9, 0)}).warp(self.LUMA, 8, 96) is None


class TestSmoothing:
    def test_jitter_goes_movement_stays(self):
        noise = np.random.default_rng(0).normal(size=100)
        found = smoothed([face(50 + n + noise[n]) for n in range(100)])
        x = np.array([found[n][0] for n in range(100)])
        error = np.abs(x - (50 + np.arange(100)))
        assert error[6:-6].max() < 1
        assert error.max() < 2
        assert np.std(np.diff(x[6:-6])) < 0.4 < 1.2 < np.std(np.diff(np.arange(100) + noise))

    def test_one_wild_finding_is_ignored(self):
        faces: list[Found | None] = [face(50.0) for _ in range(40)]
        faces[20] = face(58.0, side=46.0)
        found = smoothed(faces)
        assert found[20] == pytest.approx((50, 50, 40, 0), abs=0.01)

    def test_short_gaps_are_bridged_long_ones_not(self):
        faces: list[Found | None] = [face(50.0 + n) for n in range(90)]
        faces[20:30] = [None] * 10
        faces[45:70] = [None] * 25
        found = smoothed(faces)
        assert [found[n][0] for n in range(20, 30)] == pytest.approx([50.0 + n for n in range(20, 30)], abs=0.5)
        # Up to 0.2 s next to a face it is taken to stay where it was.
        assert set(range(45)) | set(range(70, 90)) <= found.keys()
        assert not found.keys() & set(range(51, 64))

    @pytest.mark.parametrize("other", [face(120.0), face(50.0, side=70.0)], ids=["elsewhere", "larger"])
    def test_a_cut_parts_the_track(self, other):
        found = smoothed([face(50.0)] * 30 + [other] * 30)
        assert found.keys() == set(range(60)) - {30, 31}
        assert found[29] == pytest.approx((50, 50, 40, 0))
        assert found[32] == pytest.approx((*other.mouth, *similarity(REFERENCE, other.points)))

    def test_a_face_of_a_moment_is_a_mistake(self):
        found = smoothed([None] * 30 + [face(50.0)] * 5 + [None] * 30)
        assert found == {}

    def test_nobody_there(self):
        assert smoothed([None] * 30) == {}
        assert smoothed([]) == {}


class TestSearch:
    def test_small_faces_are_found_in_parts(self):
        """The finder wants faces of at least a third of the picture's width: this one has a tenth."""
        image = np.full((300, 400), 20, np.uint8)
        paint_face(image, 333.0, 71.0)
        rgb = image[..., None].repeat(3, -1)
        finder = BlobFinder(least=0.33)
        assert finder.find(rgb) is None
        search = FaceSearch(finder)
        found = search.find(rgb)
        assert found is not None
        assert found.mouth == pytest.approx([333, 71], abs=1)
        finder.calls = 0
        assert search.find(rgb).mouth == pytest.approx([333, 71], abs=1)
        assert finder.calls == 1  # near the last place first

    def test_an_empty_picture_is_not_searched_all_the_time(self):
        finder = BlobFinder()
        search = FaceSearch(finder)
        for _ in range(50):
            assert search.find(np.zeros((90, 160, 3), np.uint8)) is None
        assert finder.calls < 50 / 5 * 50


class TestVideo:
    def test_a_turning_wandering_growing_face_comes_out_the_same(self, tmp_path):
        places = [(60 + n, 55 + 8 * np.sin(n / 9), 20 * np.sin(n / 12), 1 + 0.2 * np.sin(n / 15)) for n in range(50)]
        path = write_face_video(tmp_path / "v.mp4", places)
        track = track_mouth(path, BlobFinder())
        (clip,) = decode_clips(path, crop=Crop("track", track=track))
        upright = np.full((60, 60), 20, np.uint8)
        paint_face(upright, 29.5, 29.5)
        expected = MouthTrack({0: (29.5, 29.5, SIDE, 0.0)}).warp(upright, 0, 96).astype(int)
        for image in clip.video.numpy():
            assert np.abs(image[8:-8, 8:-8].astype(int) - expected[8:-8, 8:-8]).mean() < 8

    def test_clips_without_a_face_are_refused(self, tmp_path):
        path = write_face_video(tmp_path / "v.mp4", [(60, 60)] * 35 + [None] * 30 + [(60, 60)] * 35)
        refused: list[tuple[int, str]] = []
        crop = Crop("track", track=track_mouth(path, BlobFinder()))
        clips = list(decode_clips(path, crop=crop, on_refused=lambda start, reason: refused.append((start, reason))))
        assert [clip.start_frame for clip in clips] == [0]
        assert [(start, re.sub(r"in \d+", "in n", reason)) for start, reason in refused] == [
            (29, "no face to follow: in n of 29 frames, the first at 1.60 s"),
            (58, "no face to follow: in n of 29 frames, the first at 2.32 s"),
        ]
        with pytest.raises(DecodeError, match="no face to follow"):
            list(decode_clips(path, crop=crop))

    def test_no_clip_goes_across_a_cut(self, tmp_path):
        path = write_face_video(tmp_path / "v.mp4", [(40, 40)] * 40 + [(110, 70)] * 47)
        starts: list[int] = []
        crop = Crop("track", track=track_mouth(path, BlobFinder()))
        clips = list(decode_clips(path, crop=crop, on_refused=lambda start, _: starts.append(start)))
        assert ([clip.start_frame for clip in clips], starts) == ([0, 58], [29])

    def test_looking_ends_where_it_may(self, tmp_path):
        path = write_face_video(tmp_path / "v.mp4", [(60, 60)] * 80)
        seen = []
        track = track_mouth(path, BlobFinder(), until_seconds=1.0, alive=lambda: seen.append(1))
        assert len(track.places) == len(seen) == 26

    def test_a_crop_needs_its_track(self):
        with pytest.raises(ValueError, match="a track is for crop mode 'track' and needed there"):
            Crop("track")
        with pytest.raises(ValueError, match="a track is for crop mode 'track'"):
            Crop("centre", track=MouthTrack({}))


class TestPrepare:
    def test_faces_are_followed(self, tmp_path, monkeypatch):
        data, out = tmp_path / "data", tmp_path / "out"
        (data / "HELLO" / "train").mkdir(parents=True)
        write_face_video(data / "HELLO" / "train" / "HELLO_1.mp4", [(60 + n / 2, 60) for n in range(60)])
        write_face_video(data / "long.mp4", [(60 + n / 2, 60) for n in range(60)])
        write_face_video(data / "nobody.mp4", [None] * 40)
        monkeypatch.setattr(prepare, "DecodeJob", BlobJob)
        monkeypatch.setattr(prepare, "make_finder", lambda name: None)
        assert prepare.execute(PrepareConfig(data, out, crop="mesh", workers=1)) == 3
        with PackedDataset(out) as dataset:
            assert dataset.sources == ("HELLO/train/HELLO_1.mp4", "long.mp4", "long.mp4#29")
            video = dataset.batch(torch.arange(3)).video.float()
        assert (video[0] - video[1]).abs().max() == 0
        assert (video[1, 3:] - video[2, 3:]).abs().mean() < 4  # the face stands still in the crop
        (line,) = (out / "refused.jsonl").read_text().splitlines()
        assert json.loads(line)["reason"] == "no face to follow: one was found in 0 of 40 frames"
        assert (out / "crops.png").read_bytes().startswith(b"\x89PNG")

    def test_boxes_of_the_manifest(self, tmp_path):
        data, out = tmp_path / "data", tmp_path / "out"
        data.mkdir()
        exact = {"options": {"qp": "0", "preset": "ultrafast"}}
        boxes = {"a": [20, 30, 116, 126], "b": [0, 100, 64, 196], "c": [200, 0, 300, 40], "d": None}
        for name in boxes:
            write_video(data / f"{name}.mp4", **exact)
        lines = [json.dumps({"path": f"{name}.mp4"} | ({"box": box} if box else {})) for name, box in boxes.items()]
        (data / "manifest.jsonl").write_text("\n".join(lines))
        assert prepare.execute(PrepareConfig(data, out, crop="box", workers=1)) == 3
        frame = moving_pattern(4, 256, 256)
        with PackedDataset(out) as dataset:
            assert dataset.sources == ("a.mp4", "b.mp4")
            video = dataset.batch(torch.tensor([0, 1])).video[:, 4].numpy()
        assert np.array_equal(video[0], frame[30:126, 20:116])
        assert np.array_equal(video[1], frame[100:196, 0:96])  # 64 wide: made square, moved into the frame
        refused = {
            entry["path"]: entry["reason"]
            for entry in map(json.loads, (out / "refused.jsonl").read_text().splitlines())
        }
        assert refused == {
            "c.mp4": "the box of rows 0:40, columns 200:300, made square, does not fit into a frame of 256 x 256",
            "d.mp4": "no box: crop 'box' needs one in the manifest",
        }

    @pytest.mark.parametrize("box", [[1, 2, 3], [1, 2, 3, 4.5], [5, 0, 5, 9], [-1, 0, 5, 9], "left", [0, 0, True, 9]])
    def test_impossible_boxes(self, tmp_path, box):
        data = tmp_path / "data"
        data.mkdir()
        (data / "manifest.jsonl").write_text(json.dumps({"path": "a.mp4", "box": box}))
        (data / "a.mp4").write_bytes(b"x")
        with pytest.raises(ValueError, match=r"manifest\.jsonl, line 1: box must"):
            prepare.execute(PrepareConfig(data, tmp_path / "out", crop="box"))


def missing(name: str) -> str | None:
    """Why a finder cannot be made here; None where it can."""
    try:
        mouth.make_finder(name)
    except ImportError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["mesh", "cascade"])
class TestFinders:
    def test_what_is_missing_is_told_before_anything_begins(self, tmp_path, name):
        reason = missing(name)
        if reason is None:
            pytest.skip(f"what crop {name!r} needs is installed")
        data = tmp_path / "data"
        data.mkdir()
        (data / "a.mp4").write_bytes(b"x")
        with pytest.raises(ImportError, match=rf"crop '{name}' needs .*pip install 'avppc\[{name}\]'"):
            prepare.execute(PrepareConfig(data, tmp_path / "out", crop=name))
        assert not (tmp_path / "out").exists()

    def test_nothing_is_found_in_noise(self, name):
        if (reason := missing(name)) is not None:
            pytest.skip(reason)
        finder = mouth.make_finder(name)
        assert finder.reference.ndim == 2
        noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
        assert finder.find(noise) is None
