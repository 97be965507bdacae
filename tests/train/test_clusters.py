"""What clusters do to a run: signals, full disks, loss that is not finite, processes that die."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import pretrain_until
from safetensors.torch import load_file
from test_pretrain import start_run, wait_for_rows
from tiny_runs import SHAPE, WORDS, make_clip, tiny_config

from avppc.config import ScaleConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.data.packed.index import SHARD_FOLDER, PackedIndex
from avppc.data.packed.shard import ShardWriter
from avppc.files import LineFile, sole_use
from avppc.ops.log_mel.op import log_mel
from avppc.tasks import base
from avppc.tasks.config import TASK_NAMES
from avppc.tasks.registry import make_task
from avppc.train import checkpoint
from avppc.train.distributed import Processes
from avppc.train.log import MetricsLog, SkippedReport, SkippedSteps, read_metrics
from avppc.train.loop import pretrain

TESTS = Path(__file__).parent
BAD_CLIP, CLIPS, BATCH = 5, 24, 4
"""The bad clip comes once in an epoch of six steps."""


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


class TestSignal:
    def test_sigterm_saves_and_leaves_with_143(self, tiny_set: Path, tmp_path: Path) -> None:
        process = start_run(tiny_set, tmp_path / "run")
        wait_for_rows(tmp_path / "run", 1, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        assert not (tmp_path / "run" / "encoder.safetensors").exists()
        pretrain(tiny_config(tiny_set, tmp_path / "run"))
        pretrain(tiny_config(tiny_set, tmp_path / "undisturbed"))
        assert_same_bits(tensors(tmp_path / "run", 12), tensors(tmp_path / "undisturbed", 12))

    def test_the_handler_is_put_back(self, tiny_set: Path, tmp_path: Path) -> None:
        before = signal.getsignal(signal.SIGTERM)
        pretrain_until(tiny_config(tiny_set, tmp_path / "run"), 2)
        assert signal.getsignal(signal.SIGTERM) is before
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]

    def test_signal_in_the_last_step_ends_a_finished_run(self, tiny_set: Path, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match="was not stopped"):
            pretrain_until(tiny_config(tiny_set, tmp_path / "run", steps=2), 2)
        assert (tmp_path / "run" / "encoder.safetensors").exists()


class TestFullDisk:
    def test_the_previous_checkpoint_stays_and_training_goes_on(
        self, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        saved, save = [], checkpoint.write_tensors

        def fill_up(path: Path, content: dict[str, torch.Tensor]) -> None:
            saved.append(path.parent.name)
            if path.parent.name.startswith(".step_00000004."):
                path.write_bytes(b"half a file")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            save(path, content)
            if path.parent.name.startswith(".step_00000006."):
                kept = sorted(folder.name for folder in path.parent.parent.iterdir())
                assert [name[:14] for name in kept] == [".step_00000006", "step_00000002"]

        monkeypatch.setattr(checkpoint, "write_tensors", fill_up)
        pretrain(tiny_config(tiny_set, tmp_path / "run", steps=6))
        assert "checkpoint of step 4 could not be written" in caplog.text
        file = tmp_path / "run" / "checkpoints" / "step_00000004" / "model.safetensors"
        assert f"No space left on device: '{file}'); step_00000002 is kept" in caplog.text
        names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
        assert names == ["step_00000002", "step_00000006"]

    def test_a_run_whose_last_checkpoint_is_missing_fails(self, tiny_set: Path, tmp_path: Path) -> None:
        """A limit on the size of files stands for the full disk; here the system refuses, nothing is patched."""
        code = (
            "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
            "from pathlib import Path; from tiny_runs import tiny_config; from avppc.train.loop import pretrain\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            "pretrain(tiny_config(Path(sys.argv[2]), Path(sys.argv[3]), steps=2))\n"
        )
        arguments = [sys.executable, "-c", code, str(TESTS), str(tiny_set), str(tmp_path / "run")]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert "the last checkpoint is missing" in done.stderr
        assert "there is none yet" in done.stderr
        assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
        assert read_metrics(tmp_path / "run")[-1]["step"] == 2


@pytest.fixture(scope="module")
def set_with_a_bad_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One clip is full of samples of -32768, of which the patched features make NaN."""
    directory = tmp_path_factory.mktemp("bad") / "packed"
    (directory / SHARD_FOLDER).mkdir(parents=True)
    writer = ShardWriter(SHAPE, CLIPS)
    for number in range(CLIPS):
        clip = make_clip(number % 3, number)
        if number == BAD_CLIP:
            clip["audio"] = np.full(SHAPE.samples, -32768, np.int16)
        writer.add(f"{number}.mp4", **clip, label=number % 3, clip_id=100 + number, speaker=0)
    record = writer.write(directory / SHARD_FOLDER / "train-00000.safetensors")
    PackedIndex(SHAPE, WORDS, {"train": (record,)}).write(directory)
    return directory


@pytest.fixture
def nan_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(audio: torch.Tensor, *args: object) -> torch.Tensor:
        features = log_mel(audio, *args)
        features[(audio == -32768).all(1)] = torch.nan
        return features

    monkeypatch.setattr(base, "log_mel", spoiled)


@pytest.mark.usefixtures("nan_features")
class TestNotFinite:
    def test_the_step_is_skipped_and_the_clip_is_named(
        self, set_with_a_bad_clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = tiny_config(set_with_a_bad_clip, tmp_path / "run", batch_size=BATCH, log_every=4)
        pretrain(config)
        rows = read_metrics(config.out)
        assert rows[-1]["skipped"] == 2  # once in each of two epochs
        assert all(np.isfinite(row["loss"]) for row in rows)
        lines = [json.loads(line) for line in (config.out / "skipped_clips.jsonl").read_text().splitlines()]
        assert [line["suspects"] for line in lines] == [["5.mp4"], ["5.mp4"]]
        assert all("5.mp4" in line["clips"] and len(line["clips"]) == BATCH for line in lines)
        assert "by themselves these give features that are not finite: 5.mp4" in caplog.text
        assert all(value.isfinite().all() for value in tensors(config.out, 12).values())

    def test_a_full_disk_costs_the_names_not_the_run(
        self, set_with_a_bad_clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = tiny_config(set_with_a_bad_clip, tmp_path / "run", batch_size=BATCH, steps=6)
        pretrain_until(config, 1)
        (config.out / "skipped_clips.jsonl").symlink_to("/dev/full")
        pretrain(config)
        assert "could not be written: [Errno 28] No space left on device" in caplog.text
        assert read_metrics(config.out)[-1]["skipped"] == 1

    def test_it_is_as_if_the_step_had_not_been(self, set_with_a_bad_clip: Path, tmp_path: Path) -> None:
        """Weights, state and running statistics after the bad step are those before it."""
        config = tiny_config(
            set_with_a_bad_clip, tmp_path / "run", batch_size=BATCH, checkpoint_every=1, keep_checkpoints=12
        )
        pretrain(config)
        bad = json.loads((config.out / "skipped_clips.jsonl").read_text().splitlines()[0])["step"]
        counts = ("num_batches_tracked",)
        before, after, later = (
            (
                {name: value for name, value in tensors(config.out, step).items() if not name.endswith(counts)}
                for step in (bad - 1, bad, bad + 1)
            )
            if bad > 1
            else pytest.fail("the bad clip comes in the first step: choose another seed")
        )
        assert_same_bits(before, after)
        assert any(not torch.equal(value, later[name]) for name, value in after.items())

    def test_too_many_in_a_row_stop_the_run(self, set_with_a_bad_clip: Path, tmp_path: Path) -> None:
        config = tiny_config(
            set_with_a_bad_clip, tmp_path / "run", batch_size=CLIPS, log_every=1, scale=ScaleConfig(max_skipped_steps=2)
        )
        with pytest.raises(FloatingPointError, match=r"in the last 3 steps up to step 3 .*max_skipped_steps=2.*5\.mp4"):
            pretrain(config)

    def test_more_skipped_steps_than_are_remembered_are_counted(
        self, set_with_a_bad_clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        scale = ScaleConfig(max_skipped_steps=10)
        config = tiny_config(
            set_with_a_bad_clip, tmp_path / "run", batch_size=CLIPS, steps=10, log_every=10, scale=scale
        )
        pretrain(config)
        assert "skipped 10 steps up to step 10" in caplog.text
        assert "the clips of the last 8 are in" in caplog.text
        lines = [json.loads(line) for line in (config.out / "skipped_clips.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(3, 11))

    def test_a_resumed_run_goes_on_counting(self, set_with_a_bad_clip: Path, tmp_path: Path) -> None:
        config = tiny_config(set_with_a_bad_clip, tmp_path / "run", batch_size=BATCH)
        pretrain_until(config, 7)
        pretrain(config)
        assert read_metrics(config.out)[-1]["skipped"] == 2


@pytest.mark.parametrize("name", TASK_NAMES)
def test_no_clip_is_cleared_that_was_not_looked_at(name: str, set_with_a_bad_clip: Path, tmp_path: Path) -> None:
    task = make_task(name, tiny_config(set_with_a_bad_clip, tmp_path))
    for parameter in task.parameters():
        parameter.data.fill_(torch.nan)
    report = SkippedReport(tmp_path, PackedDataset(set_with_a_bad_clip), task, Processes(0, 1, torch.device("cpu")))
    clips = ["5.mp4", "7.mp4"]
    sentence, suspects = "no clip gives finite features any more: the weights have diverged", clips
    if not name.endswith("permutative"):
        sentence, suspects = "which clip is to blame cannot be told for this task", None
    assert report.write([(3, [105, 107])]) == sentence
    (line,) = map(json.loads, (tmp_path / "skipped_clips.jsonl").read_text().splitlines())
    assert line == {"step": 3, "suspects": suspects, "clips": clips}


def test_a_good_step_takes_no_place_among_the_skipped() -> None:
    skipped = SkippedSteps(torch.nn.Linear(1, 1), 1, 0, torch.device("cpu"))
    for step in range(1, 13):
        bad = torch.tensor(torch.nan if step in range(2, 11) else 1.0)
        skipped.check(bad, step, torch.tensor([100 + step]))
    assert skipped.new(skipped.counts()[0]) == (9, [(step, [100 + step]) for step in range(3, 11)])


class TestElasticRestart:
    def test_five_kills_of_a_rank_change_nothing(self, tiny_set: Path, tmp_path: Path) -> None:
        """torchrun starts all processes anew each time; weights and epochs end as in an undisturbed run."""
        kills = (2, 3, 5, 7, 9)
        self.torchrun(tiny_set, tmp_path / "run", kills)
        assert (tmp_path / "run-kills").read_text().split() == [str(step) for step in kills]
        self.torchrun(tiny_set, tmp_path / "undisturbed", ())
        assert_same_bits(tensors(tmp_path / "run", 12), tensors(tmp_path / "undisturbed", 12))
        progress = [
            json.loads((run / "checkpoints" / "step_00000012" / "progress.json").read_text())["progress"]
            for run in (tmp_path / "run", tmp_path / "undisturbed")
        ]
        assert progress[0] == progress[1]

    def torchrun(self, data: Path, out: Path, kills: tuple[int, ...]) -> None:
        arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        arguments += ["--max-restarts=5", "--monitor-interval=0.05", str(TESTS / "killed_rank.py")]
        arguments += [str(data), str(out), ",".join(map(str, kills))]
        changes = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "default"}
        environment = {**os.environ, **changes, "PYTHONPATH": str(TESTS.parents[1])}  # this package, not one installed
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_that_another_process_trains_is_left_to_it(tiny_set: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_set, tmp_path / "run")
    pretrain_until(config, 2)
    with sole_use(config.out), pytest.raises(ValueError, match="run is in use: another process works there"):
        pretrain(config)
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step_00000002"]
    pretrain(config)
    assert [row["step"] for row in read_metrics(config.out)] == [3, 6, 9, 12]


def test_what_one_process_refuses_is_refused_by_all_in_a_line(tiny_set: Path, tmp_path: Path) -> None:
    """Nobody waits for the process that refused, and no traceback of who did hides the reason."""
    (tmp_path / "taken").write_text("something else")
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "avppc"]
    arguments += ["pretrain", "--data", str(tiny_set), "--out", str(tmp_path), "--batch-size", "8", "--device", "cpu"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(TESTS.parents[1]),
    }
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert f"avppc: {tmp_path} is not empty and holds no run" in done.stderr
    assert "avppc: another process has refused to begin, and says why" in done.stderr
    assert "[rank1]: Traceback" not in done.stderr


def test_older_metrics_are_replaced_whole(tmp_path: Path) -> None:
    """A kill while the lines of steps that come again are dropped leaves the old file, not a part of the new one."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 6)]
    path.write_text("".join(lines))
    with path.open() as old:
        MetricsLog(tmp_path, 3).close()
        assert old.readlines() == lines
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_damaged_line_costs_no_later_ones(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "lo\xff\n[3]\n{"step": 4}\n{"step": 5, "l')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4]
    MetricsLog(tmp_path, 9).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4]


def test_metrics_that_cannot_be_written_are_said_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(tmp_path, 0)
    log._file.close()
    log._file = LineFile(Path("/dev/full"))
    log.write({"step": 1, "loss": 2.0})
    log.close()
    assert "metrics.jsonl: [Errno 28] No space left on device" in caplog.text
