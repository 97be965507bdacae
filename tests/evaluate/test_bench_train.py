"""`avppc bench-train`: figures that fit each other; with --until, a stop when enough words are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import write_tiny_set

from avppc.cli import main
from avppc.config import ObjectiveConfig, PretrainConfig
from avppc.data.source import DataSource
from avppc.evaluate import bench_train
from avppc.evaluate.bench_train import WARM_UP_STEPS, step_flop
from avppc.tasks.permutative import PermutativeTask
from avppc.train.config import BenchTrainConfig
from avppc.train.step import StepResult, TrainingStep


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("bench") / "packed")


def config_for(data: Path, **changes: object) -> BenchTrainConfig:
    settings = {"batch_size": 8, "steps": 2, "pretrain_steps": 5, "device": "cpu", "threads": 1, **changes}
    return BenchTrainConfig(data, **settings)  # type: ignore[arg-type]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rates that the looks find, one after the other; the list empties."""
    found = [0.2, 0.5, 0.7, 0.9]
    monkeypatch.setattr(bench_train, "LABELS_PER_WORD", 4)
    monkeypatch.setattr(bench_train._Reader, "rate", lambda reader, encoder: found.pop(0))
    return found


def test_it_stops_where_enough_words_are_read(data: Path, rates: list[float]) -> None:
    record = bench_train.measure_until(config_for(data, until=0.5))
    assert record.reached
    assert (record.steps, record.rate) == (4, 0.5)
    assert [(look[0], look[2]) for look in record.looks] == [(2, 0.2), (4, 0.5)]
    assert 0 < record.looks[0][1] < record.looks[1][1] == record.seconds
    assert record.clips_per_second == pytest.approx(4 * 8 / record.seconds)


def test_it_says_where_the_steps_are_over_first(
    data: Path, rates: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--batch-size", "8", "--steps", "2", "--pretrain-steps", "5", "--device", "cpu", "--threads", "1"]
    assert main(["bench-train", "--data", str(data), *flags, "--until", "0.8"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["reached"]
    assert [look[0] for look in found["looks"]] == [2, 4, 5]  # the last steps are fewer


def test_a_look_changes_neither_the_encoder_nor_the_random_numbers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that gives the picture's parts reads such words; one of constant features reads one word in three."""
    monkeypatch.setattr(bench_train, "LABELS_PER_WORD", 4)
    reader = bench_train._Reader(DataSource(data), bf16=False)
    reader.config = replace(reader.config, epochs=8)
    torch.manual_seed(5)
    encoder = bench_train.VideoEncoder().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    rate = reader.rate(encoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.training
    assert reader.rate(encoder) == rate > 1 / 3
    torch.nn.init.zeros_(encoder.project[0].weight)
    assert reader.rate(encoder) == pytest.approx(1 / 3, abs=0.05)


def test_figures_of_the_step_fit_each_other(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = PermutativeTask.__init__

    def count(task: PermutativeTask, *args: object) -> None:
        made.append(task)
        make(task, *args)

    monkeypatch.setattr(PermutativeTask, "__init__", count)
    taken = []
    take = TrainingStep.take

    def count_steps(step: TrainingStep, number: int, *args: Any) -> StepResult:
        taken.append(number)
        return take(step, number, *args)

    monkeypatch.setattr(TrainingStep, "take", count_steps)
    flags = ["--batch-size", "8", "--steps", "2", "--device", "cpu", "--threads", "1"]
    assert main(["bench-train", "--data", str(data), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clips_per_second"] == pytest.approx(8 / found["step_seconds"])
    assert list(found["parts_seconds"]) == ["data", "forward", "backward", "optimiser"]
    assert sum(found["parts_seconds"].values()) == pytest.approx(found["step_seconds"])
    assert 0 <= found["data_wait"] < 1
    # 8 clips of 2 x 6 frames of 32 pixels through four convolutions, forward and twice as much backward
    assert 5e-4 < found["step_tflop"] < 2e-3
    utilisation = found["step_tflop"] / found["step_seconds"] / found["ceiling_tflops"]
    assert found["model_flop_utilisation"] == pytest.approx(utilisation)
    assert found["peak_mib"] > 100
    assert len(made) == 2  # the one that is timed, and one whose operations are counted, all in one thread
    assert taken == [*range(WARM_UP_STEPS + 2 + 2), 0]  # as `pretrain` takes them: timed and by parts


def test_slices_are_the_presets_or_those_asked_for(data: Path) -> None:
    assert [bench_train.pretrain_config(config_for(data, batch_slices=n)).scale.batch_slices for n in (0, 1, 4)] == [
        2,
        1,
        4,
    ]


def test_the_loss_is_counted_by_its_formula() -> None:
    config = PretrainConfig(Path("data"), Path("out"), batch_size=8, objective=ObjectiveConfig(dim=16))
    first, second = torch.ones(3, 5), torch.ones(5, 7)
    assert step_flop(config, lambda: first @ second, 0) == 2 * 3 * 5 * 7
    assert step_flop(config, lambda: first @ second, 42) == 2 * 3 * 5 * 7 + 6 * 42 * 8 * 16 * (8 + 16)


def test_the_step_beside_busy_programs(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run while the steps are timed once more, and at no other time; a failure ends them, too."""
    running: list[int] = []
    programs = bench_train.subprocess.Popen
    taken = TrainingStep.take

    def take(step: TrainingStep, *arguments: object) -> StepResult:
        running.append(sum(program.poll() is None for program in started))
        return taken(step, *arguments)  # type: ignore[arg-type]

    started: list[bench_train.subprocess.Popen[bytes]] = []
    monkeypatch.setattr(
        bench_train.subprocess, "Popen", lambda command: started.append(programs(command)) or started[-1]
    )
    monkeypatch.setattr(TrainingStep, "take", take)
    result = bench_train.measure(config_for(data, beside=2))
    assert result.beside_clips_per_second is not None
    assert result.beside_clips_per_second > 0
    first = running.index(2)
    assert running[first : first + 2] == [2, 2]
    assert sum(running) == 4
    assert bench_train.measure(config_for(data)).beside_clips_per_second is None
    with pytest.raises(KeyError), bench_train.busy_programs(1):
        raise KeyError
    assert all(program.poll() is not None for program in started)
