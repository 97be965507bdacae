"""What a run is: its settings and its clips, written as a whole, the same from every folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hand_edited import change_json, read_plain
from tiny_runs import tiny_config, write_tiny_set

from avppc.config import DiagnoseConfig, EvaluateConfig, ReportConfig
from avppc.data.packed.dataset import split_sha256
from avppc.evaluate.diagnose.diagnose import diagnose
from avppc.evaluate.lipreading.evaluate import evaluate
from avppc.evaluate.report.report import render
from avppc.export.export import _describe_data
from avppc.files import sole_use
from avppc.train import loop, run_folder
from avppc.train.loop import pretrain
from avppc.train.run_folder import data_of, read_run_config

IDENTITY = ("config.json", "data.json", "environment.json", "task.json")


@pytest.fixture(scope="module")
def own_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set "packed" and a run "run" that was started beside it."""
    folder = tmp_path_factory.mktemp("own")
    write_tiny_set(folder / "packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretrain(tiny_config(Path("packed"), Path("run"), steps=2))
    return folder


@pytest.fixture(scope="module")
def other_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which another set has the same name."""
    folder = tmp_path_factory.mktemp("other")
    write_tiny_set(folder / "packed", seed=1)
    return folder


class TestClips:
    def test_a_run_knows_its_clips_from_every_folder(
        self, own_clips: Path, other_clips: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(other_clips)
        run = own_clips / "run"
        assert read_plain(run / "config.json")["data"] == str(own_clips / "packed")
        assert data_of(run, None) == own_clips / "packed"
        pretrain(tiny_config(own_clips / "packed", run, steps=2))

    def test_other_clips_at_a_relative_place_of_before_are_refused(
        self, own_clips: Path, other_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As in runs that kept the path as it was typed."""
        run = shutil.copytree(own_clips / "run", tmp_path / "run")
        change_json(run / "config.json", data="packed")
        monkeypatch.chdir(other_clips)
        message = r"run was trained on clips of packed \(seen from .*\) with the checksum .*: give .* by --data"
        with pytest.raises(ValueError, match=message):
            evaluate(EvaluateConfig(run, rows=("frozen",)))
        with pytest.raises(ValueError, match=message):
            diagnose(DiagnoseConfig(run))
        with pytest.raises(ValueError, match="holds a run on other clips"):
            pretrain(tiny_config(Path("packed"), run, steps=2))
        assert "was trained on clips of packed" in render(ReportConfig(run))
        assert _describe_data(run, Path("packed")) == "`packed`"
        monkeypatch.chdir(own_clips)
        assert data_of(run, None) == Path("packed")
        assert "24 clips" in _describe_data(run, Path("packed"))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="no packed training clips are there"):
            data_of(run, None)
        pretrain(tiny_config(own_clips / "packed", run, steps=2))  # the same clips, whatever their place is called
        assert data_of(run, None) == own_clips / "packed"

    def test_other_clips_that_are_given_are_taken_and_told(
        self, own_clips: Path, other_clips: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = own_clips / "run"
        assert data_of(run, own_clips / "packed") == own_clips / "packed"
        assert caplog.text == ""
        assert data_of(run, other_clips / "packed") == other_clips / "packed"
        assert "run was trained on other clips than those of" in caplog.text

    def test_a_report_calls_nobody(self, own_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = shutil.copytree(own_clips / "run", tmp_path / "run")
        change_json(run / "config.json", data="s3://bucket/set")
        monkeypatch.setattr("avppc.data.packed.dataset.fetch_packed", lambda *args: pytest.fail("it was fetched"))
        assert "they lie at s3://bucket/set" in render(ReportConfig(run))
        assert _describe_data(run, read_run_config(run).data) == "`set`"


class TestIdentity:
    @pytest.mark.parametrize("written", range(4))
    def test_what_an_interrupted_call_left_is_completed(
        self, written: int, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config, calls = tiny_config(tiny_set, tmp_path / "run", steps=1), 0
        write = run_folder.write_checked_json

        def fill_up(path: Path, content: dict[str, object]) -> None:
            nonlocal calls
            calls += 1
            if calls > written:
                raise OSError(28, "No space left on device", str(path))
            write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(run_folder, "write_checked_json", fill_up)
            with pytest.raises(OSError, match="No space left on device"):
                pretrain(config)
        assert not (config.out / "config.json").exists()
        pretrain(config)
        assert all("checksum" in json.loads((config.out / name).read_text()) for name in IDENTITY)
        assert read_plain(config.out / "data.json") == {"train_sha256": split_sha256(tiny_set, "train")}

    def test_a_run_of_before_without_its_clips_is_completed(
        self, own_clips: Path, other_clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = shutil.copytree(own_clips / "run", tmp_path / "run")
        for name in ("data.json", "environment.json"):
            (run / name).unlink()
        pretrain(tiny_config(own_clips / "packed", run, steps=2))
        assert "run did not hold the checksum of its clips; from now on" in caplog.text
        assert (run / "environment.json").exists()
        with pytest.raises(ValueError, match="holds a run on other clips"):
            pretrain(tiny_config(other_clips / "packed", run, steps=2))

    @pytest.mark.parametrize("name", ["data.json", "task.json"])
    def test_a_file_of_something_else_is_not_taken_for_a_beginning(
        self, name: str, tiny_set: Path, tmp_path: Path
    ) -> None:
        (tmp_path / name).write_text('{"rows": 3}')
        with pytest.raises(ValueError, match="is not empty and holds no run"):
            pretrain(tiny_config(tiny_set, tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_a_folder_is_claimed_before_a_word_is_written(
        self, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "run").mkdir()
        with sole_use(tmp_path / "run"), pytest.raises(ValueError, match="run is in use: another process works there"):
            pretrain(tiny_config(tiny_set, tmp_path / "run"))
        assert list((tmp_path / "run").iterdir()) == []

        def is_locked(*args: object, **named: object) -> None:
            with pytest.raises(ValueError, match="in use"), sole_use(tmp_path / "run"):
                pass
            raise OSError("as if the disk were full")

        monkeypatch.setattr(loop, "open_run", is_locked)
        with pytest.raises(OSError, match="as if the disk were full"):
            pretrain(tiny_config(tiny_set, tmp_path / "run"))

    @pytest.mark.parametrize("name", IDENTITY)
    def test_a_flipped_bit_is_noticed(self, name: str, own_clips: Path, tmp_path: Path) -> None:
        run = shutil.copytree(own_clips / "run", tmp_path / "run")
        content = bytearray((run / name).read_bytes())
        content[content.index(b'": ') - 1] ^= 1  # the last letter of the first name
        (run / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: its checksum is not that of its content: the file is damaged"):
            render(ReportConfig(run, data=own_clips / "packed"))

    def test_settings_that_an_older_run_does_not_know_have_their_defaults(
        self, own_clips: Path, tmp_path: Path
    ) -> None:
        run = shutil.copytree(own_clips / "run", tmp_path / "run")
        settings = read_plain(run / "config.json")
        del settings["start_anew"], settings["baselines"]["margin"]
        (run / "config.json").write_text(json.dumps(settings))
        pretrain(tiny_config(own_clips / "packed", run, steps=2))
