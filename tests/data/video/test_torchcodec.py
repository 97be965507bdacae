"""torchcodec against PyAV; skipped, with its reason, where torchcodec cannot be loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from make_videos import click_seconds, copy_cut, flash_frame, lose_packet, set_matrix, write_video

import avppc.data
from avppc.data.config import PrepareConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.data.prepare import prepare
from avppc.data.video import picked
from avppc.data.video.decode import decode_clip
from avppc.data.video.source import DecodeError


def _missing() -> str | None:
    try:
        picked.load_torchcodec()
    except ImportError as error:
        return str(error)
    return None


MISSING = _missing()
needs_torchcodec = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
EVENT = 0.6
TOGETHER = {"flashes": (EVENT,), "clicks": (EVENT,)}


@needs_torchcodec
class TestAgainstPyAV:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("plain.mp4", {}),
            ("stereo-44100.mp4", {"rate": 44_100, "layout": "stereo"}),
            ("late-audio.mp4", {"audio_start": 0.25}),
            ("fps-30.mp4", {"fps": 30, "frames": 36}),
            ("fps-2997.mp4", {"fps": Fraction(30_000, 1001), "frames": 35}),
            ("fps-50.mp4", {"fps": 50, "frames": 58}),
            ("b-frames.mp4", {"options": {"bf": "3", "g": "10"}}),
            ("vfr.mp4", {"fps": 90, "frames": 120, "skipped": [n for n in range(120) if n % 5 and n % 9]}),
            ("vp9.webm", {"video_codec": "libvpx-vp9", "audio_codec": "libopus", "rate": 48_000, "options": {}}),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_the_same_clip(self, tmp_path, name, options):
        path = write_video(tmp_path / name, **TOGETHER, **options)
        ours, theirs = decode_clip(path), decode_clip(path, backend="torchcodec")
        difference = np.abs(ours.video.numpy().astype(int) - theirs.video.numpy())
        assert difference.mean() < 1
        assert np.quantile(difference, 0.999) <= 3
        assert flash_frame(theirs.video.numpy()) == flash_frame(ours.video.numpy()) == 15
        assert click_seconds(theirs.audio.numpy()) == pytest.approx(EVENT, abs=0.003)
        assert np.array_equal(ours.audio.numpy(), theirs.audio.numpy())
        assert [*theirs.notes] == [note for note in ours.notes if not note.startswith("longer than the clip")]

    @pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (-1, 0, 0, 1), (0, 1, 1, 0)], ids=str)
    def test_pictures_are_turned_and_mirrored(self, tmp_path, matrix):
        path = set_matrix(write_video(tmp_path / "v.mp4", size=(96, 96), aspect=Fraction(4, 3)), *matrix)
        ours, theirs = decode_clip(path), decode_clip(path, backend="torchcodec")
        assert np.abs(ours.video.numpy().astype(int) - theirs.video.numpy()).mean() < 1
        assert theirs.notes == ours.notes

    @pytest.mark.parametrize("start", [1.0, 1.32])
    def test_hidden_frames_stay_hidden(self, tmp_path, start):
        source = write_video(tmp_path / "long.mp4", frames=100, flashes=(2.0,), options={"g": "25", "bf": "2"})
        cut = copy_cut(source, tmp_path / "cut.mp4", start)
        ours, theirs = decode_clip(cut), decode_clip(cut, backend="torchcodec")
        assert np.abs(ours.video.numpy().astype(int) - theirs.video.numpy()).mean() < 1
        assert flash_frame(theirs.video.numpy()) == flash_frame(ours.video.numpy())
        assert np.array_equal(theirs.audio.numpy(), ours.audio.numpy())

    def test_sound_after_a_gap_stays_where_it_is(self, tmp_path):
        whole = write_video(tmp_path / "whole.mp4", audio_codec="libopus", rate=48_000, **TOGETHER)
        clip = decode_clip(lose_packet(whole, tmp_path / "gap.mkv", 0.3), backend="torchcodec")
        assert click_seconds(clip.audio.numpy()) == pytest.approx(EVENT, abs=0.002)
        assert len(clip.notes) == 1
        assert clip.notes[0].startswith("sound padded with zeros: ")

    @pytest.mark.parametrize(
        ("name", "audio_codec", "reason"),
        [
            ("v.avi", "pcm_s16le", "pictures without time stamps: "),
            ("v.ts", "aac", r"torchcodec cannot decode it \(.+\): "),
        ],
    )
    def test_what_only_pyav_decodes_is_left_to_it(self, tmp_path, name, audio_codec, reason):
        path = write_video(tmp_path / name, audio_codec=audio_codec, frames=40, options={"bf": "2"})
        with pytest.raises(DecodeError, match=f"{reason}decode it with PyAV"):
            decode_clip(path, backend="torchcodec")

    def test_a_clip_further_on(self, tmp_path):
        path = write_video(tmp_path / "long.mp4", frames=150, flashes=(4.4,), clicks=(4.4,))
        clip = decode_clip(path, start_frame=100, backend="torchcodec")
        assert flash_frame(clip.video.numpy()) == 10
        assert click_seconds(clip.audio.numpy()) == pytest.approx(0.4, abs=0.003)

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (lambda path: b"", "the file is empty"),
            (lambda path: b"WORD\nDuration: 0.4 seconds\n" * 50, "."),
            (lambda path: write_video(path, frames=20).read_bytes(), "too short: 20 frames"),
            (lambda path: write_video(path, audio_codec=None).read_bytes(), "."),
            (lambda path: write_video(path, audio_start=0.9).read_bytes(), "sound missing"),
        ],
        ids=["empty", "text", "short", "mute", "late"],
    )
    def test_what_cannot_be_used_is_refused(self, tmp_path, make, reason):
        path = tmp_path / "clip.mp4"
        path.write_bytes(make(tmp_path / "source.mp4"))
        for source in (path, path.read_bytes()):
            with pytest.raises(DecodeError, match=reason):
                decode_clip(source, backend="torchcodec")


@needs_torchcodec
def test_prepare(tmp_path):
    """The same clips, refusals and sound by either decoder; torchcodec's pictures are those of decode_clip."""
    data, packed, refused = tmp_path / "data", {}, {}
    data.mkdir()
    write_video(data / "a.mp4", frames=100, skipped=range(40, 46), size=(64, 64))  # the second clip has a hole
    write_video(data / "b.mp4", frames=30, size=(64, 64))
    write_video(data / "c.mp4", frames=20, size=(64, 64))
    for decoder in ("torchcodec", "pyav"):
        out = tmp_path / decoder
        assert prepare.execute(PrepareConfig(data, out, decoder=decoder, workers=1)) == 3
        refused[decoder] = (out / "refused.jsonl").read_text()
        packed[decoder] = PackedDataset(out, "train")
    dataset = packed["torchcodec"]
    assert dataset.sources == packed["pyav"].sources == ("a.mp4", "a.mp4#58", "b.mp4")
    assert refused["torchcodec"] == refused["pyav"]
    theirs, ours = (packed[decoder].batch(torch.arange(3)) for decoder in ("torchcodec", "pyav"))
    assert torch.equal(theirs.audio, ours.audio)
    assert (theirs.video.int() - ours.video.int()).abs().float().mean() < 1
    for row, (name, start) in enumerate((("a.mp4", 0), ("a.mp4", 58), ("b.mp4", 0))):
        alone = decode_clip(data / name, start_frame=start, backend="torchcodec")
        assert torch.equal(theirs.video[row], alone.video)
    with pytest.raises(ValueError, match=r"made otherwise \(decoder was None, is 'torchcodec'\)"):
        prepare.execute(PrepareConfig(data, tmp_path / "pyav", decoder="torchcodec"))


def test_what_only_pyav_does_is_refused_before_anything_is_begun(tmp_path):
    with pytest.raises(ValueError, match="decoder 'torchcodec' follows no mouths, crop is 'mesh': give --decoder pyav"):
        PrepareConfig(tmp_path, tmp_path, decoder="torchcodec", crop="mesh")
    (tmp_path / "data").mkdir()
    write_video(tmp_path / "data" / "a.mp4", frames=40, size=(64, 64))
    (tmp_path / "words.tsv").write_text("clip\tstart_frame\tend_frame\tword\tsplit\na\t10\t20\tgo\ttrain\n")
    config = PrepareConfig(tmp_path / "data", tmp_path / "out", decoder="torchcodec", words=tmp_path / "words.tsv")
    with pytest.raises(ValueError, match="cuts no words out of recordings: give --decoder pyav"):
        prepare.execute(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(MISSING is None or find_spec("torchcodec") is None, reason="torchcodec is there, or not at all")
def test_all_of_this_with_the_libraries_of_pyav(tmp_path):
    """PyAV's wheel brings FFmpeg under names of its own: linked under the usual ones, torchcodec finds it."""
    libraries = Path(av.__file__).parents[1] / "av.libs"
    if not libraries.is_dir():
        pytest.skip("this PyAV uses the system's FFmpeg")
    for library in libraries.iterdir():
        name = re.sub(r"-[0-9a-f]{8}(?=\.so)", "", library.name)
        for link in {name, re.sub(r"(\.so\.\d+).*", r"\1", name)}:
            (tmp_path / link).symlink_to(library)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(Path(avppc.data.__file__).parents[2])},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if MISSING in result.stdout:
        pytest.skip(MISSING)  # it lacks something else
    assert result.returncode == 0, result.stdout[-3_000:]
    assert re.search(r"2[0-9] passed, 2 skipped", result.stdout), result.stdout[-500:]


@pytest.mark.skipif(MISSING is None, reason="torchcodec is there")
def test_what_is_missing_is_told(tmp_path):
    with pytest.raises(ImportError, match=r"backend 'torchcodec' cannot be loaded: pip install 'avppc\[codec\]'"):
        decode_clip(tmp_path / "a.mp4", backend="torchcodec")


def test_unknown_backend(tmp_path):
    with pytest.raises(ValueError, match="backend must be one of 'pyav', 'torchcodec'; got 'opencv'"):
        decode_clip(tmp_path / "a.mp4", backend="opencv")
