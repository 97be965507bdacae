from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from make_videos import click_seconds, flash_frame, write_lrw_tree, write_video

import avppc.data
from avppc.clip import SPLITS
from avppc.data.config import PrepareConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.data.prepare import prepare
from avppc.data.prepare.worker import clip_id
from avppc.data.video.decode import decode_clip

SMALL = {"size": (48, 64), "options": {"preset": "ultrafast"}}
TOGETHER = {"flashes": (0.6,), "clicks": (0.6,)}


def refusals(out: Path) -> dict[str, str]:
    lines = (out / "refused.jsonl").read_text().splitlines()
    return {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}


def notes(out: Path) -> dict[str, str]:
    return {entry["path"]: entry["note"] for entry in map(json.loads, (out / "notes.jsonl").read_text().splitlines())}


def checksums(out: Path) -> dict[str, str]:
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    """LRW's layout with good, odd and broken files, prepared once: (data, out, exit code, what was printed)."""
    data = tmp_path_factory.mktemp("messy") / "data"
    write_lrw_tree(data, ["ABOUT", "HOUSE"], {"train": 3, "val": 1, "test": 2}, **SMALL)
    train = data / "ABOUT" / "train"
    write_video(train / "lrw.mp4", **TOGETHER)
    write_video(train / "fps-30.mp4", fps=30, frames=35, **TOGETHER, **SMALL)
    write_video(train / "fps-2997.mp4", fps=Fraction(30_000, 1001), frames=35, **TOGETHER, **SMALL)
    write_video(train / "late-sound.mp4", audio_start=0.2, **TOGETHER, **SMALL)
    good = (train / "ABOUT_00001.mp4").read_bytes()
    (train / "bad-empty.mp4").write_bytes(b"")
    (train / "bad-text.mp4").write_text("not a video\n" * 100)
    (train / "bad-truncated.mp4").write_bytes(good[: len(good) // 2])
    (train / "bad-bits.mp4").write_bytes(good[:2000] + bytes(byte ^ 0x55 for byte in good[2000:6000]) + good[6000:])
    write_video(train / "bad-no-sound.mp4", audio_codec=None, **SMALL)
    write_video(train / "bad-no-picture.mp4", video_codec=None)
    write_video(train / "bad-4-fps.mp4", fps=4, frames=8, **SMALL)
    write_video(train / "bad-short.mp4", frames=20, **SMALL)
    (train / "ABOUT_00001.txt").write_text("Duration: 0.4 seconds\n")
    (train / "holiday.JPG").write_bytes(b"no video")
    (data / "_UNLABELED").mkdir()
    write_video(data / "_UNLABELED" / "long.mp4", frames=100, seed=50, **SMALL)
    os.symlink("/etc/hostname", train / "bad-link.mp4")
    (data / "manifest.jsonl").write_text(json.dumps({"path": "HOUSE/train/HOUSE_00002.mp4", "face": 17}) + "\n")
    out = data.parent / "out"
    config = PrepareConfig(data, out, clips_per_shard=4, workers=2)
    return data, out, prepare.execute(config), config


class TestMessyFolder:
    def test_exit_code_says_that_some_were_refused(self, messy):
        assert messy[2] == 3

    def test_each_bad_file_is_listed_with_its_reason(self, messy):
        found = refusals(messy[1])
        train = "ABOUT/train/"
        expected = {
            "bad-empty.mp4": "the file is empty",
            "bad-text.mp4": "damaged or not a video",
            "bad-truncated.mp4": "damaged or not a video",
            "bad-bits.mp4": "damaged",
            "bad-no-sound.mp4": "no audio stream",
            "bad-no-picture.mp4": "no video stream",
            "bad-4-fps.mp4": "frames missing",
            "bad-short.mp4": "too short: 20 frames",
            "bad-link.mp4": "a link that leaves the data's folder",
        }
        assert found.keys() == {train + name for name in expected}
        for name, reason in expected.items():
            assert found[train + name].startswith(reason)

    def test_everything_else_is_in(self, messy):
        data, out, _, _ = messy
        bad = refusals(out).keys()
        for split in SPLITS:
            with PackedDataset(out, split) as dataset:
                paths = data.glob(f"*/{split}/*.mp4")
                expected = {path.relative_to(data).as_posix() for path in paths} - bad
                if split == "train":
                    expected |= {"_UNLABELED/long.mp4", "_UNLABELED/long.mp4#29", "_UNLABELED/long.mp4#58"}
                assert set(dataset.sources) == expected
                assert len(dataset.sources) == len(expected)
                assert len(set(dataset.clip_ids.tolist())) == len(dataset)

    def test_clips_are_what_the_decoder_gives(self, messy):
        data, out, _, _ = messy
        with PackedDataset(out) as dataset:
            batch = dataset.batch(torch.arange(len(dataset)))
            assert dataset.words == ("ABOUT", "HOUSE")
            for row, source in enumerate(dataset.sources):
                path, _, start = source.partition("#")
                clip = decode_clip(data / path, start_frame=int(start or 0))
                assert torch.equal(batch.video[row], clip.video)
                assert torch.equal(batch.audio[row], clip.audio)
                word = source.split("/")[0]
                assert batch.labels[row] == {"ABOUT": 0, "HOUSE": 1, "_UNLABELED": -1}[word]
                assert batch.speakers[row] == (17 if path == "HOUSE/train/HOUSE_00002.mp4" else -1)
                assert batch.clip_ids[row] == clip_id(source)

    def test_conversions_are_noted(self, messy):
        found = notes(messy[1])
        assert found.keys() == {f"ABOUT/train/{name}.mp4" for name in ("fps-30", "fps-2997", "late-sound")}
        assert found["ABOUT/train/fps-30.mp4"] == "frame rate 30: converted to 25 by nearest time stamp"
        assert found["ABOUT/train/fps-2997.mp4"] == "frame rate 29.97: converted to 25 by nearest time stamp"
        assert found["ABOUT/train/late-sound.mp4"].startswith("sound padded with zeros: 0 to ")

    def test_flash_and_click_are_together_in_the_shards(self, messy):
        with PackedDataset(messy[1]) as dataset:
            for name in ("lrw", "fps-30", "fps-2997", "late-sound"):
                row = dataset.sources.index(f"ABOUT/train/{name}.mp4")
                clip = dataset.batch(torch.tensor([row]))
                assert flash_frame(clip.video[0].numpy()) == 15
                assert click_seconds(clip.audio[0].numpy()) == pytest.approx(0.6, abs=0.003)

    def test_same_command_again_keeps_everything_and_tells_the_same(self, messy, capsys):
        _, out, _, config = messy
        before = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
        assert prepare.execute(config) == 3
        assert {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()} == before
        printed = capsys.readouterr()
        assert "refused: 9, listed in refused.jsonl" in printed.out
        assert "1  no audio stream" in printed.out
        assert "converted: 3, listed in notes.jsonl" in printed.out
        assert "not videos, left alone: 1 .jpg\n" in printed.out
        assert "units were finished before and are intact" in printed.err

    def test_other_settings_are_refused_before_anything_is_touched(self, messy):
        data, out, _, _ = messy
        before = checksums(out)
        with pytest.raises(
            ValueError, match=r"made otherwise \(crop was 'auto', is 'centre'\); --overwrite replaces it"
        ):
            prepare.execute(PrepareConfig(data, out, clips_per_shard=4, crop="centre"))
        assert checksums(out) == before


COMMAND = """
import sys
from pathlib import Path
from avppc.data.config import PrepareConfig
from avppc.data.prepare import prepare
sys.exit(prepare.execute(PrepareConfig(Path(sys.argv[1]), Path(sys.argv[2]), clips_per_shard=2, workers=2)))
"""


def start_prepare(data: Path, out: Path, **options) -> subprocess.Popen:
    package = Path(avppc.data.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(data), str(out)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A small sound folder and what an undisturbed run makes of it: (data, checksums)."""
    data = tmp_path_factory.mktemp("plain") / "data"
    write_lrw_tree(data, ["ABOUT", "HOUSE"], {"train": 9, "test": 1}, **SMALL)
    out = data.parent / "out"
    assert prepare.execute(PrepareConfig(data, out, clips_per_shard=2, workers=2)) == 0
    found = checksums(out)
    assert sum(name.startswith("shards/") for name in found) == 10
    return data, found


class TestInterruption:
    @pytest.mark.parametrize("units_first", [0, 4])
    def test_killed_and_started_again_gives_the_same_shards(self, plain, tmp_path, units_first):
        data, expected = plain
        out = tmp_path / "out"
        process = start_prepare(data, out)
        while process.poll() is None:
            shards = list(out.glob("shards/*"))  # with the half-written ones, whose names begin with a dot
            if len(list(out.glob("units/*.json"))) >= units_first and shards:
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was through before it could be killed"
        assert not (out / "index.json").exists()
        assert prepare.execute(PrepareConfig(data, out, clips_per_shard=2, workers=2)) == 0
        assert checksums(out) == expected

    def test_a_full_disk_is_told_and_leaves_no_half_shard(self, plain, tmp_path):
        """The limit on file sizes stands for the disk: writing a shard fails in its middle."""
        data, expected = plain
        out = tmp_path / "out"
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # noqa: E731  # a single use
        process = start_prepare(data, out, preexec_fn=limit)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "OSError: [Errno 27] File too large: " in errors
        assert "train-00000-00.safetensors" in errors or "train-00001-00.safetensors" in errors
        assert os.listdir(out / "shards") == []
        assert not (out / "index.json").exists()
        assert prepare.execute(PrepareConfig(data, out, clips_per_shard=2, workers=2)) == 0
        assert checksums(out) == expected

    def test_a_damaged_shard_is_made_anew(self, plain, tmp_path, capsys):
        data, expected = plain
        out = tmp_path / "out"
        config = PrepareConfig(data, out, clips_per_shard=2, workers=1)
        assert prepare.execute(config) == 0
        path = out / "shards" / "train-00003-00.safetensors"
        content = bytearray(path.read_bytes())
        content[-5] ^= 4
        path.write_bytes(content)
        assert prepare.execute(config) == 0
        printed = capsys.readouterr().err.replace("\n", " ")
        assert "made anew: train-00003" in printed
        assert checksums(out) == expected

    def test_a_video_added_and_removed(self, plain, tmp_path):
        data, expected = plain
        out = tmp_path / "out"
        copy = tmp_path / "data"
        for path in data.rglob("*.mp4"):
            target = copy / path.relative_to(data)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
        config = PrepareConfig(copy, out, clips_per_shard=2, workers=1)
        write_video(copy / "ZOO.mp4", **SMALL)
        assert prepare.execute(config) == 0
        with PackedDataset(out) as dataset:
            assert len(dataset) == 19
            assert dataset.sources[-1] == "ZOO.mp4"
        (copy / "ZOO.mp4").unlink()
        assert prepare.execute(config) == 0
        found = checksums(out)
        assert {name: found[name] for name in found if name.startswith("shards/")} == {
            name: expected[name] for name in expected if name.startswith("shards/")
        }
        with PackedDataset(out) as dataset:
            assert len(dataset) == 18


class TestShares:
    @pytest.mark.parametrize("launcher", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
    def test_shares_together_give_what_one_run_gives(self, plain, tmp_path, monkeypatch, capsys, launcher):
        data, expected = plain
        out = tmp_path / "out"
        assert prepare.execute(PrepareConfig(data, out, clips_per_shard=2, workers=1, shard="1/2")) == 0
        assert not (out / "index.json").exists()
        assert "5 of 10 units are for other shares" in capsys.readouterr().out
        monkeypatch.setenv(launcher[0], "0")
        monkeypatch.setenv(launcher[1], "2")
        assert prepare.execute(PrepareConfig(data, out, clips_per_shard=2, workers=1)) == 0
        assert checksums(out) == expected

    def test_the_flag_goes_before_torchrun_and_that_before_slurm(self, tmp_path, monkeypatch):
        assert PrepareConfig(tmp_path, tmp_path).share() == (0, 1)
        monkeypatch.setenv("SLURM_PROCID", "6")
        assert PrepareConfig(tmp_path, tmp_path).share() == (0, 1)  # one of the two says nothing
        monkeypatch.setenv("SLURM_NTASKS", "8")
        assert PrepareConfig(tmp_path, tmp_path).share() == (6, 8)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert PrepareConfig(tmp_path, tmp_path).share() == (1, 3)
        assert PrepareConfig(tmp_path, tmp_path, shard="0/2").share() == (0, 2)
        monkeypatch.setenv("RANK", "3")
        with pytest.raises(ValueError, match="RANK/WORLD_SIZE must be"):
            PrepareConfig(tmp_path, tmp_path)

    @pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "-1/2", "0/0"])
    def test_bad_shares(self, tmp_path, shard):
        with pytest.raises(ValueError, match='shard must be "i/n" with i from 0 to n - 1'):
            PrepareConfig(tmp_path, tmp_path, shard=shard)


def test_long_videos_are_cut_with_a_stride(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write_video(data / "talk.mp4", frames=110, size=(96, 96), options={"qp": "0", "preset": "ultrafast"})
    assert prepare.execute(PrepareConfig(data, out, stride=20, clips_per_shard=2, workers=1)) == 0
    with PackedDataset(out) as dataset:
        assert dataset.sources == ("talk.mp4", *(f"talk.mp4#{start}" for start in (20, 40, 60, 80)))
        batch = dataset.batch(torch.arange(5))
        assert torch.equal(batch.video[0, 20:], batch.video[1, :9])
        assert np.array_equal(batch.audio[0, 20 * 640 :], batch.audio[1, : 9 * 640])
        assert sorted(path.name for path in (out / "shards").iterdir()) == [
            f"train-00000-0{number}.safetensors" for number in range(3)
        ]


def test_nothing_usable(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    assert prepare.execute(PrepareConfig(data, out)) == 1
    assert "has no videos" in capsys.readouterr().err
    assert not out.exists()
    (data / "a.mp4").write_bytes(b"no")
    assert prepare.execute(PrepareConfig(data, out, workers=1)) == 1
    assert "no usable clip" in capsys.readouterr().out
    assert refusals(out).keys() == {"a.mp4"}
    assert not (out / "index.json").exists()


def test_videos_that_are_all_refused_unopened_are_listed(tmp_path, capsys):
    """And what an earlier run has made of other videos stays, and is not sent anywhere."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    write_video(data / "a.mp4", size=(48, 64), options={"preset": "ultrafast"})
    assert prepare.execute(PrepareConfig(data, out, workers=1)) == 0
    before = (out / "index.json").read_bytes()
    line = {"path": "a.mp4", "bytes": (data / "a.mp4").stat().st_size, "clip_frames": 29}
    (data / "manifest.jsonl").write_text(json.dumps(line | {"problems": ["no sound"], "usable": False}) + "\n")
    for place in (out, tmp_path / "new"):
        capsys.readouterr()
        assert prepare.execute(PrepareConfig(data, place, workers=1, upload=f"file://{tmp_path}/sent")) == 1
        told = capsys.readouterr().out
        assert "no usable clip" in told
        assert "refused: 1, listed in refused.jsonl" in told
        assert refusals(place) == {"a.mp4": "left out: `avppc index` has found: no sound"}
    assert (out / "index.json").read_bytes() == before
    assert not (tmp_path / "new" / "index.json").exists()
    assert not (tmp_path / "sent").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames must be from 1 to 10000"),
        ({"stride": -1}, "stride must be at least 0"),
        ({"crop": "face"}, "crop must be one of"),
        ({"crop_rows": (9, 9)}, "crop_rows, second must be at least 10, got 9"),
        ({"crop_columns": (1, 2, 3)}, "crop_columns must be two numbers"),
        ({"centre_fraction": 0.0}, "centre_fraction must be from 0.01 to 1.0"),
        ({"clips_per_shard": 0}, "clips_per_shard must be from 1"),
        ({"workers": -1}, "workers must be from 0"),
        ({"timeout_seconds": 0.0}, "timeout_seconds must be at least 1.0"),
    ],
)
def test_bad_settings(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(tmp_path, tmp_path, **options)
