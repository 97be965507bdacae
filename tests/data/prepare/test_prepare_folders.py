"""`avppc prepare` on folders as people have them: what becomes of each video, and what is said about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from make_videos import write_video
from PIL import Image

from avppc.cli import main
from avppc.data.packed.dataset import PackedDataset

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

    def test_a_set_without_a_training_part_says_what_to_do(self, tmp_path, capsys):
        write(tmp_path / "data/test/a.mp4")
        assert prepare(tmp_path / "data", tmp_path / "out") == 0
        assert "nothing to train on: all lie in folders named val or test" in capsys.readouterr().out
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


class TestShareOfTheEnvironment:
    """A plain line in a batch script sees the same variables as the processes of a launcher."""

    @pytest.fixture(autouse=True)
    def task_0_of_4(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("SLURM_PROCID", "0")
        monkeypatch.setenv("SLURM_NTASKS", "4")

    @pytest.fixture
    def data(self, tmp_path):
        for split in ("train", "val", "test"):
            write(tmp_path / f"data/{split}/a.mp4")
        return tmp_path / "data"

    def test_prepare_names_it_and_does_not_pass_for_done(self, data, tmp_path, capsys):
        out = tmp_path / "out"
        assert prepare(data, out) == 4
        printed = capsys.readouterr().out
        assert "1 of the 3 videos" in printed
        assert "look at" not in printed
        assert "half prepared: 2 of 3 units are for other shares" in printed
        assert "share 0 of 4, as SLURM_PROCID and SLURM_NTASKS in the environment say; --shard 0/1 does all" in printed
        with pytest.raises(ValueError, match=r"no index\.json; it is half prepared, 2 of 3 units are missing"):
            PackedDataset(out)
        assert prepare(data, out, "--shard", "0/1") == 0
        assert "half prepared" not in capsys.readouterr().out
        with PackedDataset(out, "test") as dataset:
            assert len(dataset) == 1

    def test_index_does_the_same(self, data, capsys):
        flags = ["index", "--data", str(data), "--workers", "1"]
        assert main(flags) == 4
        assert "as SLURM_PROCID and SLURM_NTASKS in the environment say" in capsys.readouterr().out
        assert main([*flags, "--shard", "0/1"]) == 0
        assert (data / "manifest.jsonl").is_file()

    def test_processes_of_a_launcher_and_shares_asked_for_end_well(self, data, tmp_path, monkeypatch):
        assert prepare(data, tmp_path / "a", "--shard", "0/3") == 0
        monkeypatch.setenv("SLURM_STEP_ID", "0")
        assert prepare(data, tmp_path / "b") == 0


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "crop: the middle square of the whole frame, of 256 x 256 video LRW's window (rows 115 to 210, columns "
             "79 to 174); --crop mesh or cascade finds the mouth; look at "),
        (["--crop", "centre", "--centre-fraction", "0.5"], "the whole frame, 0.5 of its shorter side; --crop mesh"),
        (["--crop", "window", "--crop-rows", "0", "48", "--crop-columns", "8", "56"],
         "crop: rows 0 to 47, columns 8 to 55; look at"),
    ],
    ids=["auto", "centre", "window"],
)  # fmt: skip
def test_it_is_said_which_part_is_stored_and_the_picture_names_its_rows(tmp_path, capsys, flags, text):
    write(tmp_path / "data/first.mp4")
    write(tmp_path / "data/\u97f3/second\x1b[31m.mp4")
    assert prepare(tmp_path / "data", tmp_path / "out", *flags) == 0
    assert text in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "out/crops.png"))
    height = len(sheet) // 2
    titles = [sheet[top : top + 14].max(1) > 0 for top in (0, height)]
    assert all(title.any() for title in titles)
    assert (sheet[:14] != sheet[height : height + 14]).any()
    assert (sheet[14 : 14 + 96, :96] == decode_first(tmp_path / "out")).all()


def decode_first(out: Path) -> np.ndarray:
    with PackedDataset(out) as dataset:
        return dataset.batch(torch.tensor([0])).video[0, 0].numpy()
