"""Pretraining runs: what they leave behind, and that a kill at any moment changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import tiny_runs
import torch
from hand_edited import change_json
from safetensors.torch import load_file
from tiny_runs import tiny_config, write_tiny_set

from avppc import load_encoder
from avppc.cli import main
from avppc.config import BaselineConfig, OptimizerConfig
from avppc.settings import config_to_dict, read_checked_json
from avppc.train import hardware, loop
from avppc.train.log import read_metrics
from avppc.train.loop import pretrain
from avppc.train.run_folder import read_run_config

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def whole_run(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(tiny_config(tiny_set, out))
    return out


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    last = sorted((run / "checkpoints").iterdir())[-1]
    assert last.name == "step_00000012"
    return {**load_file(last / "model.safetensors"), **load_file(last / "optimizer.safetensors")}


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


def test_run_leaves_everything_needed(whole_run: Path, tiny_set: Path) -> None:
    names = {path.name for path in whole_run.iterdir()}
    assert {
        "config.json",
        "data.json",
        "environment.json",
        "task.json",
        "metrics.jsonl",
        "train.log",
        "tensorboard",
        "checkpoints",
    } <= names
    assert read_run_config(whole_run) == tiny_config(tiny_set, whole_run)
    rows = read_metrics(whole_run)
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert all(len(row["task_accuracy"]) == 42 and row["clips_per_second"] > 0 for row in rows)
    assert len(json.loads((whole_run / "task.json").read_text())["task_loss"]) == 42
    assert sorted(path.name for path in (whole_run / "checkpoints").iterdir()) == ["step_00000010", "step_00000012"]
    encoder = load_encoder(whole_run)
    saved = final_tensors(whole_run)
    assert all(torch.equal(value, saved[f"video_encoder.{name}"]) for name, value in encoder.state_dict().items())
    assert any(path.name.startswith("events") for path in (whole_run / "tensorboard").iterdir())


def test_kill_at_three_moments_gives_the_same_bits(whole_run: Path, tiny_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    for rows_seen in (1, 2, 3):
        process = start_run(tiny_set, out)
        try:
            wait_for_rows(out, rows_seen, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "encoder.safetensors").exists()
    pretrain(tiny_config(tiny_set, out))
    assert_same_bits(final_tensors(out), final_tensors(whole_run))
    same = ("step", "loss", "task_loss", "task_accuracy", "learning_rate", "grad_norm")
    rows, undisturbed = read_metrics(out), read_metrics(whole_run)
    # A row covers the steps since the row before it, or since the start of the process: the last row is whole.
    assert [row["step"] for row in rows] == [row["step"] for row in undisturbed]
    assert {name: rows[-1][name] for name in same} == {name: undisturbed[-1][name] for name in same}


def start_run(data: Path, out: Path) -> subprocess.Popen[bytes]:
    """The same run in a process of its own, which dawdles so that it can be killed in the middle."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from tiny_runs import tiny_config; from avppc.train import loop\n"
        "clip = loop.torch.nn.utils.clip_grad_norm_\n"
        "def slow(*args): time.sleep(0.25); return clip(*args)\n"
        "loop.torch.nn.utils.clip_grad_norm_ = slow\n"
        "sys.exit(loop.execute(tiny_config(Path(sys.argv[2]), Path(sys.argv[3]))))\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    arguments = [sys.executable, "-c", code, str(TESTS), str(data), str(out)]
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)


def wait_for_rows(run: Path, rows: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(run)) < rows:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_finished_run_is_left_as_it_is(whole_run: Path, tiny_set: Path) -> None:
    before = final_tensors(whole_run)
    rows = read_metrics(whole_run)
    pretrain(tiny_config(tiny_set, whole_run))
    assert_same_bits(before, final_tensors(whole_run))
    assert read_metrics(whole_run) == rows


def test_other_settings_are_refused_by_name(whole_run: Path, tiny_set: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings \(seed is 0 there, 1 here\)"):
        pretrain(tiny_config(tiny_set, whole_run, seed=1))


def test_a_run_may_move_and_its_data_be_spelled_otherwise(
    whole_run: Path, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(tiny_config(tiny_set, tmp_path / "before", steps=2))
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.chdir(tiny_set.parent)
    pretrain(tiny_config(Path(tiny_set.name), tmp_path / "after", steps=2))  # finished: nothing to do
    assert not (tmp_path / "before").exists()
    # The same clips at another place, which the run then remembers.
    pretrain(tiny_config(write_tiny_set(tmp_path / "other"), tmp_path / "after", steps=2))
    assert read_run_config(tmp_path / "after").data == tmp_path / "other"


def test_a_run_does_not_go_on_with_other_clips_at_the_same_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = write_tiny_set(tmp_path / "data"), tmp_path / "run"
    pretrain(tiny_config(data, run, steps=2))
    shutil.rmtree(data)
    pretrain_again = partial(pretrain, tiny_config(write_tiny_set(data), run, steps=2))
    pretrain_again()  # the same clips, made anew
    shutil.rmtree(data)
    monkeypatch.setitem(tiny_runs.SPLITS, "train", 25)
    write_tiny_set(data)
    with pytest.raises(ValueError, match=r"run holds a run on other clips: those of .*data have the checksum "):
        pretrain_again()
    (run / "data.json").write_text("[]")
    with pytest.raises(ValueError, match=r"data\.json must hold the train_sha256 of a run's clips, got \[\]"):
        pretrain_again()
    (run / "data.json").unlink()  # as in a run of before
    pretrain_again()


@pytest.mark.parametrize("seed", [2**63, 2**64, 10**30])
def test_seeds_that_no_generator_takes_are_refused(seed: int, tiny_set: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed must be from 0 to 9223372036854775807"):
        tiny_config(tiny_set, tmp_path / "run", seed=seed)


def test_directory_of_something_else_is_refused(tiny_set: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        pretrain(tiny_config(tiny_set, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_too_few_clips_leave_no_run_behind(tiny_set: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size is 64, but .* has 24 training clips"):
        pretrain(tiny_config(tiny_set, tmp_path / "run", batch_size=64))
    assert not (tmp_path / "run").exists()


def test_too_short_clips_leave_no_run_behind(tiny_set: Path, tmp_path: Path) -> None:
    baselines = BaselineConfig(min_shift_frames=10, far_shift_frames=10)
    with pytest.raises(
        ValueError, match=r"clips of 29 frames are too short for the task 'synchronization': .* needs 31"
    ):
        pretrain(tiny_config(tiny_set, tmp_path / "run", task="synchronization", baselines=baselines))
    assert not (tmp_path / "run").exists()


def test_a_decay_that_the_optimiser_does_not_take_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"beta2 must be from 0 to 0\.999999, got 1\.0"):
        OptimizerConfig(beta2=1.0)


def test_damaged_checkpoint_is_passed_over(whole_run: Path, tiny_set: Path, tmp_path: Path, caplog) -> None:
    out = tmp_path / "damaged"
    pretrain(tiny_config(tiny_set, out, steps=12))
    path = out / "checkpoints" / "step_00000012" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    pretrain(tiny_config(tiny_set, out))
    assert "passing over a damaged checkpoint" in caplog.text
    assert_same_bits(final_tensors(out), final_tensors(whole_run))


@pytest.mark.parametrize("lost", ["files", "progress"])
def test_a_checkpoint_that_names_nothing_is_passed_over(
    lost: str, whole_run: Path, tiny_set: Path, tmp_path: Path, caplog
) -> None:
    out = tmp_path / "run"
    pretrain(tiny_config(tiny_set, out, steps=12))
    path = out / "checkpoints" / "step_00000012" / "progress.json"
    change_json(path, **{lost: {}})
    pretrain(tiny_config(tiny_set, out))
    assert "names no files, or says nothing of the progress" in caplog.text
    assert_same_bits(final_tensors(out), final_tensors(whole_run))


def test_foreign_files_among_the_checkpoints_are_left_alone(tiny_set: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    pretrain(tiny_config(tiny_set, tmp_path / "run", steps=4, checkpoint_every=1))
    for name in ("step_best", "step_best2"):
        (checkpoints / name).mkdir()
    (checkpoints / "step_99999999").write_text("not a checkpoint")
    pretrain(tiny_config(tiny_set, tmp_path / "run", steps=4, checkpoint_every=1))
    ours = ["step_00000003", "step_00000004"]
    assert sorted(path.name for path in checkpoints.iterdir()) == [*ours, "step_99999999", "step_best", "step_best2"]


def test_checkpoint_of_another_model_is_refused_by_name(tiny_set: Path, tmp_path: Path) -> None:
    pretrain(tiny_config(tiny_set, tmp_path / "run", steps=2))
    change_json(tmp_path / "run" / "config.json", audio_width=8)  # as if this checkpoint came from elsewhere
    with pytest.raises(ValueError, match=r"step_00000002 is not a checkpoint of these settings"):
        pretrain(tiny_config(tiny_set, tmp_path / "run", steps=2, audio_width=8))


def test_accumulated_batches_are_averaged(tiny_set: Path, tmp_path: Path) -> None:
    pretrain(tiny_config(tiny_set, tmp_path / "run", steps=2, accumulate=3, checkpoint_every=1))
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["step"] == 2
    progress = json.loads((tmp_path / "run" / "checkpoints" / "step_00000002" / "progress.json").read_text())
    assert progress["progress"]["sampler"] == {"epoch": 2, "batches_consumed": 0}  # 6 batches, 3 an epoch


@pytest.mark.parametrize("task", ["visual-permutative", "synchronization", "time-arrow", "correspondence"])
def test_every_task_goes_on_where_it_was_stopped(task: str, tiny_set: Path, tmp_path: Path) -> None:
    """Also one with a state of its own, in batches of chosen speakers; the command line takes the same names."""
    baselines = BaselineConfig(sync_mode="curriculum")
    changes = {"task": task, "baselines": baselines, "speakers_per_batch": 1, "steps": 6, "checkpoint_every": 3}
    pretrain(tiny_config(tiny_set, tmp_path / "whole", **changes))
    pretrain(tiny_config(tiny_set, tmp_path / "stopped", **changes))
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step_00000006")
    (tmp_path / "stopped" / "encoder.safetensors").unlink()
    pretrain(tiny_config(tiny_set, tmp_path / "stopped", **changes))
    whole, stopped = (load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "stopped"))
    assert_same_bits(whole, stopped)
    assert all(0 <= row["right"] <= 1 for row in read_metrics(tmp_path / "whole") if task != "visual-permutative")


def test_sub_tasks_are_chosen_by_flags(tiny_set: Path, tmp_path: Path, capsys) -> None:
    flags = ["--steps", "1", "--batch-size", "8", "--threads", "1", "--device", "cpu", "--encoder.width", "4"]
    command = ["pretrain", "--data", str(tiny_set), "--out"]
    chosen = ["--subtasks", "1to1,2to2", "--exclude", "Ap->Af", "--objective.weighting", "group"]
    assert main([*command, str(tmp_path / "run"), *flags, *chosen]) == 0
    names = json.loads((tmp_path / "run" / "task.json").read_text())["task_loss"]
    assert len(names) == 17
    assert "Ap->Af" not in names
    assert main([*command, str(tmp_path / "bad"), *flags, "--subtasks", "3to1"]) == 2
    assert "subtasks must hold groups" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "bad").exists()


def test_loss_that_is_not_finite_stops_the_run(tiny_set: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_set, tmp_path / "run")
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e30, clip_norm=1e30, warmup_fraction=0.0)
    with pytest.raises(FloatingPointError, match=r"not finite in the last 11 steps up to step 12 .* have diverged"):
        pretrain(dataclasses.replace(config, optimizer=optimizer))


def test_command_line_gives_the_same_settings(tiny_set: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    flags = ["--steps", "2", "--batch-size", "8", "--threads", "1", "--encoder.width", "4", "--device", "cpu"]
    assert main(["pretrain", "--data", str(tiny_set), "--out", str(out), *flags]) == 0
    saved = read_checked_json(out / "config.json")
    assert saved == config_to_dict(read_run_config(out))
    assert (saved["steps"], saved["encoder"]["width"], saved["preset"]) == (2, 4, "laptop")
    assert main(["pretrain", "--data", str(tiny_set), "--out", str(out), *flags, "--seed", "3"]) == 2
    assert "seed is 0 there, 3 here" in " ".join(capsys.readouterr().err.split())


def test_the_progress_tells_of_other_programs() -> None:
    row = {"loss": 1.0, "clips_per_second": 100.0, "data_wait": 0.0, "skipped": 0}
    said = "other programs take 37% of the processors"
    assert said in loop._progress_text(row, {"right": 0.5}, 0.374)
    assert "other programs" not in loop._progress_text(row, {"right": 0.5}, 0.09)
    assert "other programs" not in loop._progress_text(row, {"right": 0.5}, None)


def test_the_share_of_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 seconds of all processors, 60 were busy, of which 25 in this process."""
    readings = [hardware._ProcessorSeconds(1000.0, 400.0, 50.0), hardware._ProcessorSeconds(1100.0, 460.0, 75.0)]
    monkeypatch.setattr(hardware, "_processor_seconds", lambda: readings.pop(0) if readings else None)
    others = hardware.OtherPrograms()
    assert others.lap() == pytest.approx(0.35)
    assert others.lap() is None


def test_the_processors_seconds_grow() -> None:
    before = hardware._processor_seconds()
    if before is None:
        pytest.skip("this system has no /proc/stat")
    sum(range(10**6))
    now = hardware._processor_seconds()
    assert now.all >= before.all
    assert now.own > before.own
    assert 0 <= before.busy <= before.all
