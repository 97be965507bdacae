"""What `avppc prepare` may touch: its own output, by its own record, and nothing else; what its processes leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import troubled_worker
from make_videos import write_lrw_tree, write_video

from avppc.cli import main
from avppc.data.config import PrepareConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.data.prepare import prepare
from avppc.files import temporary_name

SMALL = {"size": (48, 64), "options": {"preset": "ultrafast"}}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refusals(out: Path) -> dict[str, str]:
    lines = (out / "refused.jsonl").read_text().splitlines()
    return {entry["path"]: entry["reason"] for entry in map(json.loads, lines)}


def make_videos(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_video(folder / f"{name}.mp4", **SMALL)
    return folder


@pytest.mark.parametrize("place", ["equal", "inside", "around", "linked"])
def test_an_output_that_is_not_apart_from_the_videos_is_refused(tmp_path, place, capsys):
    """Videos in folders with the names that a packed set has: they were deleted."""
    course = tmp_path / "course"
    make_videos(course / "units", "a")
    make_videos(course / "shards", "b")
    os.symlink(course, tmp_path / "link")
    out = {"equal": course, "inside": course / "units", "around": tmp_path, "linked": tmp_path / "link" / "new"}[place]
    before = contents(tmp_path)
    assert main(["prepare", "--data", str(course), "--out", str(out), "--overwrite"]) == 2
    assert "out must be a folder apart from data" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["shards/imagenet-000001.tar", "units/thesis.txt", "prepare.json", "notes.jsonl"])
def test_a_folder_of_something_else_is_refused(tmp_path, name):
    data, out = make_videos(tmp_path / "data", "a"), tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("{}")
    with pytest.raises(ValueError, match=r"out must be an empty or missing folder|was not written by avppc prepare"):
        prepare.execute(PrepareConfig(data, out, workers=1, overwrite=True))
    assert contents(out) == {name: b"{}"}


def test_only_what_the_record_names_is_removed(tmp_path):
    """A smaller set takes the place of a larger one; files that others have put beside its own stay."""
    data, out = make_videos(tmp_path / "data", "a"), tmp_path / "out"
    for split in ("val", "test"):
        make_videos(data / "WORD" / split, "c", "d")
    config = PrepareConfig(data, out, workers=1, clips_per_shard=1)
    assert prepare.execute(config) == 0
    assert json.loads((out / "prepare.json").read_text())["units"] == {"train": 1, "val": 2, "test": 2}
    ours = set(contents(out))
    foreign = {"shards/imagenet-000001.tar", "shards/train-00000.safetensors", "units/thesis.txt", "units/val-9.json"}
    for name in foreign:
        (out / name).write_text("mine")
    for name in ("val/d", "test/c", "test/d"):
        (data / "WORD" / f"{name}.mp4").unlink()
    assert prepare.execute(config) == 0
    gone = {f"{kind}-{end}" for kind in ("val-00001", "test-00000", "test-00001") for end in ("00.safetensors",)}
    gone = {f"shards/{name}" for name in gone} | {f"units/{name[:-15]}.json" for name in gone}
    assert set(contents(out)) == (ours - gone) | foreign
    assert json.loads((out / "prepare.json").read_text())["units"] == {"train": 1, "val": 1}
    assert len(PackedDataset(out, "val")) == 1


def test_a_run_killed_before_its_record_goes_on(tmp_path):
    data, out = make_videos(tmp_path / "data", "a"), tmp_path / "out"
    out.mkdir()
    (out / ".prepare.json.half").write_text("{")
    (out / "lost+found").mkdir()
    assert prepare.execute(PrepareConfig(data, out, workers=1)) == 0


def test_a_set_is_not_sent_over_another_index(tmp_path):
    data, out = make_videos(tmp_path / "data", "a"), tmp_path / "out"
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.json").write_text('{"pages": 3}')
    with pytest.raises(ValueError, match=r"site/index\.json is no index of a packed data set"):
        prepare.execute(PrepareConfig(data, out, workers=1, upload=f"file://{site}"))
    assert contents(site) == {"index.json": b'{"pages": 3}'}


def test_a_video_that_crashes_or_hangs_the_decoder_is_refused(tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("a", "b-crash", "c-stop", "d-hang", "e-once", "f-spin", "g-big", "h"):
        write_video(data / f"{name}.mp4", **SMALL)
    config = PrepareConfig(data, out, workers=1, timeout_seconds=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "DecodeJob", troubled_worker.TroubledJob)
        assert prepare.execute(config) == 3
    found = refusals(out)
    if not Path("/proc/self/status").exists():
        found["g-big.mp4"] = "no memory for it: a file may take 4 GiB"  # the system sets no such limit
    assert found == {
        "b-crash.mp4": "it crashes the decoder (signal 11, SIGSEGV)",
        "d-hang.mp4": "the decoder gives nothing for 1 s",
        "f-spin.mp4": "the decoder gives nothing for 1 s",
        "g-big.mp4": "no memory for it: a file may take 4 GiB",
    }
    with PackedDataset(out) as dataset:
        assert dataset.sources == ("a.mp4", "c-stop.mp4", "e-once.mp4", "h.mp4")
    assert prepare.execute(config) == 0  # with a quick decoder: what may be no fault of the video is tried again
    assert len(PackedDataset(out)) == 8


def test_what_another_process_is_writing_is_left_to_it(tmp_path):
    """Two runs into one folder make the same shards twice; neither takes away what the other has half written."""
    write_lrw_tree(tmp_path / "data", ["ABOUT"], {"train": 1}, **SMALL)
    config = PrepareConfig(tmp_path / "data", tmp_path / "out", workers=1)
    shards = tmp_path / "out" / "shards"
    assert prepare.execute(config) == 0
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    half = temporary_name(shards / "train-00000-00.safetensors").name
    here, elsewhere = half.split(".")[-1].split("-")[0], "0" * 8
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [
        half.replace(f"{here}-{os.getpid()}", f"{machine}-{process}")
        for machine, process in ((here, alive.pid), (here, ended.pid), (elsewhere, ended.pid))
    ]
    for name in (*names, ".notes.txt"):
        (shards / name).write_bytes(b"half")
    assert prepare.execute(config) == 0
    alive.communicate(b"\n")
    assert [(shards / name).exists() for name in (*names, ".notes.txt")] == [True, False, True, True]
    assert len(PackedDataset(config.out)) == 1
