"""Checkpoints that are damaged, or cannot be read for now: what they cost, and that nothing else is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hand_edited import change_json
from tiny_runs import tiny_config

from avppc.cli import main
from avppc.files import sha256_of
from avppc.train import checkpoint as state
from avppc.train.checkpoint import CheckpointSaver, CheckpointStore, NoWholeCheckpoint
from avppc.train.loop import pretrain

TENSORS = {"model": {"weight": torch.ones(3)}}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def damage(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Of steps 1 and 2."""
    store = CheckpointStore(tmp_path, 2)
    for step in (1, 2):
        store.save(step, TENSORS, {"sampler": step})
    return store


def test_a_run_without_a_whole_checkpoint_stops_and_keeps_them(
    tiny_set: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    checkpoints = out / "checkpoints"
    pretrain(tiny_config(tiny_set, out, steps=4, keep_checkpoints=1))
    damage(checkpoints / "step_00000004")
    with pytest.raises(ValueError, match=r"holds 1 checkpoints, and none is whole: .*\. Put .* --start-anew"):
        pretrain(tiny_config(tiny_set, out, steps=4, keep_checkpoints=1))
    assert names(checkpoints) == ["step_00000004"]
    # The new checkpoint of step 2 is kept beside the damaged one, which does not count, until one of its name comes.
    kept = []
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CheckpointStore, "_remove_old", lambda self, files: (remove(self, files), kept.append(names(checkpoints)))
        )
        pretrain(tiny_config(tiny_set, out, steps=4, keep_checkpoints=1, start_anew=True))
    assert kept == [["step_00000002", "step_00000004"], ["step_00000004"]]
    assert "starting anew" in caplog.text
    pretrain(tiny_config(tiny_set, tmp_path / "undisturbed", steps=4))
    weights = [sha256_of(run / "encoder.safetensors") for run in (out, tmp_path / "undisturbed")]
    assert weights[0] == weights[1]


remove = CheckpointStore._remove_old


@pytest.mark.parametrize("name", ["progress.json", "model.safetensors"])
@pytest.mark.parametrize("code", [5, 13])
def test_one_that_cannot_be_read_for_now_is_not_damaged(
    name: str, code: int, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = Path.stat

    def fail(path: Path, **options: bool) -> os.stat_result:
        if path.name == name and path.parent.name == "step_00000002":
            raise OSError(code, os.strerror(code), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(OSError, match=rf"step_00000002 cannot be read for now \(\[Errno {code}\].*move this one away"):
        store.latest()
    assert names(store.directory) == ["step_00000001", "step_00000002"]


def test_a_file_that_fails_while_it_is_read_is_not_damaged(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(state, "sha256_of", fail)
    with pytest.raises(OSError, match="step_00000002 cannot be read for now"):
        store.latest()


@pytest.mark.parametrize("version", [2, True])
def test_checkpoints_of_another_version_are_kept(version: object, store: CheckpointStore) -> None:
    for directory in store.directory.iterdir():
        change_json(directory / "progress.json", version=version)
    with pytest.raises(NoWholeCheckpoint, match=rf"holds 2 checkpoints, .* has version {version}"):
        store.latest()


def test_a_flipped_bit_in_the_progress_is_noticed(store: CheckpointStore) -> None:
    path = store.directory / "step_00000002" / "progress.json"
    path.write_text(path.read_text().replace('"sampler": 2', '"sampler": 3'))
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.step == 1


def test_the_step_of_an_older_checkpoint_is_that_of_its_name(store: CheckpointStore) -> None:
    """Which has no checksum of its own."""
    change_json(store.directory / "step_00000002" / "progress.json", step=6)
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.step == 1


def test_damaged_ones_go_when_enough_newer_ones_are_whole(store: CheckpointStore) -> None:
    damage(store.directory / "step_00000002")
    assert store.latest() is not None
    store.save(3, TENSORS, {"sampler": 3})
    assert names(store.directory) == ["step_00000001", "step_00000002", "step_00000003"]
    store.save(4, TENSORS, {"sampler": 4})
    assert names(store.directory) == ["step_00000003", "step_00000004"]


def test_an_old_one_that_cannot_be_removed_stays(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rename = os.rename

    def fail(old: Path, new: Path) -> None:
        if old.name == "step_00000001":
            raise PermissionError(13, "Permission denied")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail)
    store.save(3, TENSORS, {"sampler": 3})
    assert names(store.directory) == ["step_00000001", "step_00000002", "step_00000003"]
    assert "step_00000001 could not be removed: [Errno 13] Permission denied" in caplog.text


def test_what_others_have_put_there_stays(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    (store.directory / "step_00000001" / "notes.txt").write_text("mine")
    (store.directory / ".step_mine").mkdir()
    (store.directory / ".step_mine" / "notes.txt").write_text("mine")
    for step in (3, 4):
        store.save(step, TENSORS, {"sampler": step})
    store.clear_leftovers()
    assert names(store.directory) == [".step_mine", "step_00000001", "step_00000003", "step_00000004"]
    assert names(store.directory / ".step_mine") == ["notes.txt"]
    assert names(store.directory / "step_00000001") == ["model.safetensors", "notes.txt", "progress.json"]
    assert "step_00000001 stays: it also holds notes.txt" in caplog.text


def test_all_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        directory = CheckpointStore(tmp_path, 1).save(1, TENSORS, {"sampler": 1})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o640}


def test_a_full_disk_is_told_with_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*step_00000001/model.safetensors'"):
        CheckpointStore(tmp_path, 1).save(1, TENSORS, {"sampler": 1})
    assert names(tmp_path) == []


def test_a_run_whose_settings_are_not_its_checkpoints_is_told_in_a_line(
    tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(tiny_config(tiny_set, tmp_path / "run", steps=2))
    change_json(tmp_path / "run" / "config.json", audio_width=8)
    for command in (
        ["diagnose", "--run", str(tmp_path / "run")],
        ["check-sync", "--data", str(tiny_set), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "sync")],
    ):
        assert main([*command, "--device", "cpu"]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "step_00000002 is not a checkpoint of these settings" in error


def test_an_old_checkpoint_that_could_not_be_removed_is_removed_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, 1)
    store.save(1, TENSORS, {"sampler": 1})
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_remove_old", lambda self, names: None)
        store.save(2, TENSORS, {"sampler": 2})
    assert names(tmp_path) == ["step_00000001", "step_00000002"]
    again = CheckpointStore(tmp_path, 1)
    again.clear_leftovers()
    assert names(tmp_path) == ["step_00000001", "step_00000002"]  # which of them is whole is not known yet
    assert again.latest() is not None
    again.clear_leftovers()
    assert names(tmp_path) == ["step_00000002"]


def test_a_disk_that_does_not_even_tell_what_is_there_costs_the_checkpoint_alone(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error", "checkpoints")

    monkeypatch.setattr(CheckpointStore, "save", broken)
    monkeypatch.setattr(CheckpointStore, "newest_name", broken)
    saver = CheckpointSaver(store)
    saver.save(3, TENSORS, {})
    with pytest.raises(OSError, match=r"the last checkpoint is missing: .* Input/output error: 'checkpoints'"):
        saver.finish()
    assert "step 3 could not be written" in caplog.text
    assert "cannot be read" in caplog.text
