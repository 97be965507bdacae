"""Pictures come out as the file says they are to be shown, by every way that decodes them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from blob_faces import BlobFinder, paint_face, write_face_video
from make_videos import moving_pattern, set_matrix, write_video

from avppc.data.video.crop import Crop, Geometry
from avppc.data.video.decode import decode_clip
from avppc.data.video.inspect import inspect_video
from avppc.data.video.source import DecodeError
from avppc.data.video.track import track_mouth

EXACT = {"qp": "0", "preset": "ultrafast"}
# By the matrix's a, b, c, d: what becomes of a picture [H, W], and the kind of the note.
SHOWN = {
    (1, 0, 0, 1): (lambda image: image, None),
    (0, 1, -1, 0): (lambda image: np.rot90(image, 3), "rotation: turned by -90 degrees as the file asks"),
    (-1, 0, 0, -1): (lambda image: np.rot90(image, 2), "rotation: turned by 180 degrees as the file asks"),
    (0, -1, 1, 0): (lambda image: np.rot90(image, 1), "rotation: turned by 90 degrees as the file asks"),
    (-1, 0, 0, 1): (np.fliplr, "mirror image: left and right change places as the file asks"),
    (1, 0, 0, -1): (
        np.flipud,
        "mirror image: left and right change places, then turned by 180 degrees as the file asks",
    ),
    (0, 1, 1, 0): (
        np.transpose,
        "mirror image: left and right change places, then turned by 90 degrees as the file asks",
    ),
    (0, -1, -1, 0): (
        lambda image: np.rot90(image.T, 2),
        "mirror image: left and right change places, then turned by -90 degrees as the file asks",
    ),
}
by_matrix = pytest.mark.parametrize("matrix", SHOWN, ids=str)


class TestMatrix:
    @by_matrix
    def test_it_is_applied_and_noted(self, tmp_path, matrix):
        path = set_matrix(write_video(tmp_path / "v.mp4", options=EXACT), *matrix)
        shown, note = SHOWN[matrix]
        clip = decode_clip(path)
        assert np.array_equal(clip.video[3].numpy(), shown(moving_pattern(3, 256, 256))[115:211, 79:175])
        assert [*clip.notes] == inspect_video(path).notes == ([] if note is None else [note])

    def test_small_slips_and_scales_are_no_turns(self, tmp_path):
        path = set_matrix(write_video(tmp_path / "v.mp4", options=EXACT), 0.5, 0.002, -0.002, 0.5)
        assert np.array_equal(decode_clip(path).video[3].numpy(), moving_pattern(3, 256, 256)[115:211, 79:175])

    @pytest.mark.parametrize(
        ("matrix", "told"),
        [((0.966, 0.259, -0.259, 0.966), "by -15.0 degrees"), ((1, 0, 0.7, 0.7), "slanted"), ((1, 0, 1, 0), "slanted")],
        ids=["15-degrees", "slanted", "flat"],
    )
    def test_others_are_refused(self, tmp_path, matrix, told):
        path = set_matrix(write_video(tmp_path / "v.mp4"), *matrix)
        for read in (decode_clip, inspect_video):
            with pytest.raises(DecodeError, match=f"{told}.*only quarter turns and mirror images are possible"):
                read(path)

    @by_matrix
    def test_a_mouth_is_followed_in_the_picture_as_it_is_shown(self, tmp_path, matrix):
        """The mouth lies in the lower half of the face: it must come out there, wherever it is in the file."""
        shown = SHOWN[matrix][0]
        upright = np.full((160, 160), 20, np.uint8)
        upright[60:100, 40:80] = 200
        upright[87:93, 50:70] = 60
        turned = (turn(upright) for turn, _ in SHOWN.values())
        stored = next(image for image in turned if np.array_equal(shown(image), upright))
        path = write_video(
            tmp_path / "v.mp4",
            size=(160, 160),
            pattern=lambda number, height, width, seed: stored.copy(),
            options=EXACT,
        )
        clip = decode_clip(
            set_matrix(path, *matrix), crop=Crop("track", track=track_mouth(path, BlobFinder()), size=40)
        )
        assert np.abs(clip.video[5].numpy().astype(int) - upright[60:100, 40:80]).max() <= 4


class TestPixelShape:
    def test_pixels_become_square_before_the_crop(self, tmp_path):
        def picture(number: int, height: int, width: int, seed: int = 0) -> np.ndarray:
            image = np.full((height, width), 40, np.uint8)
            image[80:120, 66:96] = 200  # 40 x 30 pixels of 4:3 are a square, at columns 88 to 128 of 213
            return image

        path = write_video(tmp_path / "v.mp4", size=(160, 160), aspect=Fraction(4, 3), pattern=picture, options=EXACT)
        clip = decode_clip(path, crop=Crop("window", rows=(70, 130), columns=(78, 138), size=60))
        bright = clip.video[3].numpy() > 120
        assert bright.any(0).sum() == bright.any(1).sum() == 40
        assert np.flatnonzero(bright.any(0))[0] == np.flatnonzero(bright.any(1))[0] == 10
        note = "pixel shape: 4:3, scaled to square pixels"
        assert [*clip.notes] == inspect_video(path).notes == [note]

    @pytest.mark.parametrize("aspect", [Fraction(4, 3), Fraction(8, 9)], ids=str)
    def test_a_mouth_is_followed_in_square_pixels(self, tmp_path, aspect):
        width = round(160 * aspect)
        face = (width / 2, 60.0, 0.0, 1.0)

        def squeezed(number: int, height: int, columns: int, seed: int = 0) -> np.ndarray:
            wide = np.full((height, width), 20, np.uint8)
            paint_face(wide, *face)
            return wide[:, ((np.arange(columns) + 0.5) * width / columns).astype(int)]

        path = write_video(tmp_path / "v.mp4", size=(120, 160), aspect=aspect, pattern=squeezed, options=EXACT)
        track = track_mouth(path, BlobFinder())
        x, y, a, b = next(iter(track.places.values()))
        assert (x, y) == pytest.approx(face[:2], abs=1.5)
        assert np.hypot(a, b) == pytest.approx(40, abs=3)
        assert decode_clip(path, crop=Crop("track", track=track)).video.shape == (29, 96, 96)

    def test_almost_square_pixels_are_left_alone(self, tmp_path):
        path = write_video(tmp_path / "v.mp4", aspect=Fraction(404, 405), options=EXACT)
        clip = decode_clip(path)
        assert np.array_equal(clip.video[3].numpy(), moving_pattern(3, 256, 256)[115:211, 79:175])
        assert clip.notes == ()

    def test_pixels_are_turned_with_the_picture(self):
        geometry = Geometry(Fraction(2), transpose=True, flip_rows=True)
        assert geometry.shown_size(100, 60) == (120, 100)
        assert geometry.show(np.zeros((100, 60), np.uint8)).shape == (120, 100)

    def test_a_shape_that_makes_huge_frames_is_refused(self):
        with pytest.raises(ValueError, match=r"pixels of shape 100:1 make frames of 16000 x 90, at most 8192"):
            Geometry(Fraction(100)).shown_size(90, 160)


def test_a_matrix_that_leaves_nothing_is_ignored(tmp_path: Path):
    path = set_matrix(write_face_video(tmp_path / "v.mp4", [None] * 29), 0, 0, 0, 0)
    assert decode_clip(path).notes == ()
