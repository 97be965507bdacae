"""`avppc bench-train`: figures that fit each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from avppc.cli import main
from avppc.config import ObjectiveConfig, PretrainConfig
from avppc.tasks.permutative import PermutativeTask
from avppc.train.bench import WARM_UP_STEPS, step_flop
from avppc.train.step import StepResult, TrainingStep


def test_figures_of_the_step_fit_each_other(
    tiny_set: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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
    assert main(["bench-train", "--data", str(tiny_set), *flags]) == 0
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
    assert len(made) == 1  # the one that is timed
    assert taken == list(range(WARM_UP_STEPS + 2 + 2 + 1))  # as `pretrain` takes them: timed, by parts, and counted


def test_the_loss_is_counted_by_its_formula() -> None:
    config = PretrainConfig(Path("data"), Path("out"), batch_size=8, objective=ObjectiveConfig(dim=16))
    first, second = torch.ones(3, 5), torch.ones(5, 7)
    assert step_flop(config, lambda: first @ second, 0) == 2 * 3 * 5 * 7
    assert step_flop(config, lambda: first @ second, 42) == 2 * 3 * 5 * 7 + 6 * 42 * 8 * 16 * (8 + 16)
