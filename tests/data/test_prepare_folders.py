"""`avppc prepare` on folders as people have them: what becomes of each video, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import pytest
from make_videos import write_video

from avppc.cli import main
from avppc.data.packed import PackedDataset

SMALL = {"size": (48, 64), "options": {"preset": "ultrafast"}}


def write(path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_video(path, **SMALL, **options)


def prepare(data: Path, out: Path, *flags: str) -> int:
    return main(["prepare", "--data", str(data), "--out", str(out), "--workers", "1", *flags])


class TestLayout:
    def test_a_corpus_is_cut_into_clips_and_its_test_part_kept_apart(self, tmp_path):
        write(tmp_path / "data/CORPUS/train/long.mp4", frames=60)
        write(tmp_path / "data/CORPUS/test/long.mp4", frames=30)
        assert prepare(tmp_path / "data", tmp_path / "out") == 0
        with PackedDataset(tmp_path / "out") as train, PackedDataset(tmp_path / "out", "test") as test:
            assert train.words == ()
            assert train.sources == ("CORPUS/train/long.mp4", "CORPUS/train/long.mp4#29")
            assert test.sources == ("CORPUS/test/long.mp4",)

    def test_corpora_taken_for_words_are_doubted_aloud(self, tmp_path, capsys):
        for corpus in ("GRID", "TCD"):
            write(tmp_path / f"data/{corpus}/train/long.mp4", frames=60)
        assert prepare(tmp_path / "data", tmp_path / "out") == 0
        printed = capsys.readouterr().out
        assert "2 of 2 videos of words (GRID, TCD, ...) go on after the one clip kept of each" in printed
        assert "--layout tree" in printed
        assert prepare(tmp_path / "data", tmp_path / "out", "--layout", "tree") == 0
        assert "videos of words" not in capsys.readouterr().out
        with PackedDataset(tmp_path / "out") as dataset:
            assert len(dataset) == 4
            assert dataset.words == ()

    def test_a_set_without_a_training_part_says_what_to_do(self, tmp_path):
        write(tmp_path / "data/test/a.mp4")
        assert prepare(tmp_path / "data", tmp_path / "out") == 0
        with pytest.raises(ValueError, match=r"split 'train' .* available: 'test'; .* prepare such a folder by itself"):
            PackedDataset(tmp_path / "out")
        assert prepare(tmp_path / "data/test", tmp_path / "other") == 0
        with PackedDataset(tmp_path / "other") as dataset:
            assert dataset.sources == ("a.mp4",)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mxf", {"video_codec": "mpeg2video", "audio_codec": "pcm_s16le", "rate": 48_000, "options": {}}),
        ("a.asf", {"video_codec": "mpeg4", "audio_codec": "mp2", "rate": 48_000, "options": {}}),
        ("a.vob", {"video_codec": "mpeg2video", "audio_codec": "mp2", "rate": 48_000, "options": {}}),
        ("a.f4v", {}),
        ("a.3g2", {"video_codec": "mpeg4", "options": {}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_containers_of_camcorders_and_old_software(tmp_path, name, options):
    (tmp_path / "data").mkdir()
    write_video(tmp_path / "data" / name, size=(48, 64), frames=32, **options)
    assert prepare(tmp_path / "data", tmp_path / "out") == 0
    with PackedDataset(tmp_path / "out") as dataset:
        assert dataset.sources == (name,)
