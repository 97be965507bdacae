"""Runs that go on, runs that are refused, runs that are killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avppc.files import sole_use, temporary_name
from avppc.settings import write_checked_json
from avppc.synth.config import SynthConfig
from avppc.synth.dataset import _claim_folder, execute, read_records

_PROGRAM = """
import sys
from pathlib import Path
from avppc.synth.config import SynthConfig
from avppc.synth.dataset import execute

if __name__ == "__main__":
    sys.exit(execute(SynthConfig(Path(sys.argv[1]), words=3, clips_per_word=14, val_clips_per_word=1,
                          test_clips_per_word=1, workers=2)))
"""


def _checksums(root: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.mp4")}


@pytest.fixture
def copy(small_set: Path, small_config: SynthConfig, tmp_path: Path) -> SynthConfig:
    shutil.copytree(small_set, tmp_path / "copy")
    return dataclasses.replace(small_config, out=tmp_path / "copy")


def test_a_finished_set_is_left_alone(copy: SynthConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.out.rglob("*") if path.suffix in (".mp4", ".npy", ".txt")}
    manifest = (copy.out / "manifest.jsonl").read_bytes()
    assert execute(dataclasses.replace(copy, workers=1)) == 0
    assert "42 clips of 10 words, 0 of them made now" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    assert (copy.out / "manifest.jsonl").read_bytes() == manifest


def test_a_set_that_another_process_makes_is_left_to_it(copy: SynthConfig, tmp_path: Path) -> None:
    before = _checksums(copy.out)
    for config in (copy, dataclasses.replace(copy, words=3, overwrite=True)):  # nothing of it is deleted, either
        with sole_use(copy.out), pytest.raises(ValueError, match="copy is in use: another process works there"):
            execute(config)
    assert _checksums(copy.out) == before
    assert execute(copy) == 0
    new = dataclasses.replace(copy, out=tmp_path / "new")
    new.out.mkdir()
    with sole_use(new.out), pytest.raises(ValueError, match="new is in use"):
        execute(new)
    assert list(new.out.iterdir()) == []


def test_damaged_settings_are_not_taken_for_others(copy: SynthConfig) -> None:
    path = copy.out / "synth.json"
    path.write_text(path.read_text().replace('"words": 10', '"words": 18'))
    with pytest.raises(ValueError, match=r"synth\.json: its checksum is not that of its content"):
        execute(dataclasses.replace(copy, overwrite=True))


def test_only_what_is_missing_or_damaged_is_made_again(copy: SynthConfig) -> None:
    before = _checksums(copy.out)
    order = [record["path"] for record in read_records(copy.out / "manifest.jsonl").values()]
    missing, damaged, without_mouth = (copy.out / order[index] for index in (3, 17, 41))
    missing.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-100])
    without_mouth.with_suffix(".npy").unlink()
    assert execute(copy) == 0
    records = list(read_records(copy.out / "manifest.jsonl").values())
    assert [record["path"] for record in records] == order
    after = _checksums(copy.out)
    assert {str(copy.out / record["path"]): record["sha256"] for record in records} == after
    changed = {str(path) for path in (missing, damaged, without_mouth)}
    assert {path for path in before if before[path] != after[path]} <= changed
    assert without_mouth.with_suffix(".npy").is_file()


def test_another_configuration_is_refused_and_replaced_only_on_demand(copy: SynthConfig) -> None:
    other = dataclasses.replace(copy, difficulty="easy", words=1, clips_per_word=1, extra_clips=0)
    before = _checksums(copy.out)
    with pytest.raises(ValueError, match=r"holds a data set of other settings.*'medium' there, 'easy' here"):
        execute(other)
    assert _checksums(copy.out) == before
    mine = [copy.out / name for name in ("mine.txt", "ABOUT/train/mine.mp4", "ABOUT/notes.txt", "_UNLABELED/mine.mp4")]
    for path in mine:
        path.write_text("not of this program")
    with (copy.out / "manifest.jsonl").open("a") as manifest:  # as `avppc index` lists whatever is there
        manifest.write(json.dumps({"path": "ABOUT/train/mine.mp4", "sha256": "0" * 64}) + "\n")
    (copy.out / "ABOUT" / "train" / ".ABOUT_00001.mp4.tmp").write_text("half")
    assert execute(dataclasses.replace(other, overwrite=True)) == 0
    assert len(_checksums(copy.out)) == 3 + 2
    assert {path.read_text() for path in mine} == {"not of this program"}
    assert not list(copy.out.rglob(".*.tmp"))
    assert json.loads((copy.out / "synth.json").read_text())["config"]["difficulty"] == "easy"


def test_a_set_from_before_looks_goes_on_as_mouths(copy: SynthConfig, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.loads((copy.out / "synth.json").read_text())
    del settings["checksum"]
    assert settings["config"].pop("look") == "mouth"
    write_checked_json(copy.out / "synth.json", settings)
    with pytest.raises(ValueError, match=r"look 'mouth' there, 'head' here"):
        _claim_folder(dataclasses.replace(copy, look="head"))
    assert execute(copy) == 0
    assert "0 of them made now" in capsys.readouterr().out


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(ValueError, match="out must be an empty or missing folder"):
        execute(SynthConfig(tmp_path, overwrite=True))
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        execute(SynthConfig(tmp_path / "thesis.tex"))
    (tmp_path / "synth.json").write_text('{"format": "of another program"}')
    with pytest.raises(ValueError, match="is not of this program"):
        execute(SynthConfig(tmp_path, overwrite=True))
    assert (tmp_path / "thesis.tex").read_text() == "irreplaceable"


def test_a_run_killed_before_its_record_goes_on(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    half = temporary_name(tmp_path / "synth.json").name.replace(f"-{os.getpid()}-", f"-{ended.pid}-")
    (tmp_path / half).write_text("{")
    _claim_folder(SynthConfig(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["synth.json"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker processes in /proc")
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """First a worker is killed, then the main process; the third run finishes, and what was done is never redone."""
    program, out = tmp_path / "program.py", tmp_path / "set"
    program.write_text(_PROGRAM)
    command = [sys.executable, str(program), str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    kept: dict[str, str] = {}
    for victim, clips in (("worker", 5), ("main", 15)):
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            _wait_until(lambda clips=clips: len(_journal(out)) >= clips)
            workers = _workers_of(process.pid)
            assert len(workers) == 2
            os.kill(workers[0] if victim == "worker" else process.pid, signal.SIGKILL)
            _, errors = process.communicate(timeout=60)
        if victim == "worker":
            assert process.returncode == 1
            assert "the same command goes on from there" in errors
        _wait_until(lambda workers=workers: not any(map(_is_running, workers)))  # nobody is left behind
        assert not (out / "manifest.jsonl").exists()
        found = _checksums(out)
        assert kept.items() <= found.items()
        kept = {path: found[path] for path in (str(out / record["path"]) for record in _journal(out))}
        assert clips <= len(kept) < 48
    assert subprocess.run(command, env=environment, stderr=subprocess.DEVNULL, timeout=120).returncode == 0
    records = list(read_records(out / "manifest.jsonl").values())
    assert len(records) == 48
    found = _checksums(out)
    assert {str(out / record["path"]): record["sha256"] for record in records} == found
    assert kept.items() <= found.items()
    assert not list(out.rglob(".*.tmp"))
    assert not (out / "manifest.partial.jsonl").exists()


def _journal(out: Path) -> list[dict[str, str]]:
    path = out / "manifest.partial.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line]


def _wait_until(condition: object, seconds: float = 60.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def _status(pid: int) -> tuple[str, int] | None:
    """State and parent of a process."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return state, int(parent)


def _is_running(pid: int) -> bool:
    status = _status(pid)
    return status is not None and status[0] != "Z"


def _workers_of(pid: int) -> list[int]:
    """Grandchildren: the fork server's children."""
    parents = {int(path.name): _status(int(path.name)) for path in Path("/proc").iterdir() if path.name.isdigit()}
    children = {child for child, status in parents.items() if status and status[1] == pid}
    return sorted(child for child, status in parents.items() if status and status[1] in children)
