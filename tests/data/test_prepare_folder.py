"""What `avppc prepare` may touch: its own output, by its own record, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from make_videos import write_video

from avppc.cli import main
from avppc.config.data import PrepareConfig
from avppc.data import prepare
from avppc.data.packed import PackedDataset

SMALL = {"size": (48, 64), "options": {"preset": "ultrafast"}}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


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
        prepare.run(PrepareConfig(data, out, workers=1, overwrite=True))
    assert contents(out) == {name: b"{}"}


def test_only_what_the_record_names_is_removed(tmp_path):
    """A smaller set takes the place of a larger one; files that others have put beside its own stay."""
    data, out = make_videos(tmp_path / "data", "a"), tmp_path / "out"
    for split in ("val", "test"):
        make_videos(data / "WORD" / split, "c", "d")
    config = PrepareConfig(data, out, workers=1, clips_per_shard=1)
    assert prepare.run(config) == 0
    assert json.loads((out / "prepare.json").read_text())["units"] == {"train": 1, "val": 2, "test": 2}
    ours = set(contents(out))
    foreign = {"shards/imagenet-000001.tar", "shards/train-00000.safetensors", "units/thesis.txt", "units/val-9.json"}
    for name in foreign:
        (out / name).write_text("mine")
    for name in ("val/d", "test/c", "test/d"):
        (data / "WORD" / f"{name}.mp4").unlink()
    assert prepare.run(config) == 0
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
    assert prepare.run(PrepareConfig(data, out, workers=1)) == 0


def test_a_set_is_not_sent_over_another_index(tmp_path):
    data, out = make_videos(tmp_path / "data", "a"), tmp_path / "out"
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.json").write_text('{"pages": 3}')
    with pytest.raises(ValueError, match=r"site/index\.json is no index of a packed data set"):
        prepare.run(PrepareConfig(data, out, workers=1, upload=f"file://{site}"))
    assert contents(site) == {"index.json": b'{"pages": 3}'}
