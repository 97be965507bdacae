"""Pretraining by several processes: the curves and weights of one process with the whole batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from launch import pretrain_in_processes, pretrain_until
from safetensors.torch import load_file
from tiny_runs import tiny_config

from avppc.config import OptimizerConfig, PretrainConfig, ScaleConfig
from avppc.train.distributed import Processes, join_processes
from avppc.train.log import read_metrics
from avppc.train.loop import pretrain

STEPS, RATE = 6, 5e-4
CASES = {
    "all": {},
    "ring": {"gather": "ring"},
    "cached": {"batch_size": 6, "accumulate": 2, "scale": ScaleConfig(cached_negatives=True)},
}


def config_of(case: str, data: Path, out: Path) -> PretrainConfig:
    settings = {"batch_size": 12, "log_every": 1, "steps": STEPS, "precision": "fp32", "checkpoint_every": 100}
    settings["optimizer"] = OptimizerConfig(learning_rate=RATE)
    settings["scale"] = ScaleConfig(batch_slices=1)  # batch norms of several processes see the whole batch
    return tiny_config(data, out, **settings | CASES[case])


@pytest.fixture(scope="module")
def alone(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for case in CASES:
        pretrain(config_of(case, tiny_set, folder / case))
    return folder


@pytest.fixture(scope="module", params=[2, 3], ids=lambda count: f"{count}-processes")
def together(request: pytest.FixtureRequest, tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs by several processes, and one that a single process began."""
    folder = tmp_path_factory.mktemp(f"together-{request.param}")
    pretrain_until(config_of("all", tiny_set, folder / "begun-by-one"), 3)
    configs = [config_of(case, tiny_set, folder / case) for case in CASES]
    continued = config_of("all", tiny_set, folder / "begun-by-one")
    pretrain_in_processes([*configs, continued], request.param)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors")


def assert_same_run(run: Path, expected: Path, first_step: int = 1) -> None:
    rows, wanted = read_metrics(run), read_metrics(expected)[first_step - 1 :]
    assert [row["step"] for row in rows[-len(wanted) :]] == list(range(first_step, STEPS + 1))
    # Adam's first steps are signs of gradients: rounding grows from step to step, so the first is held closest.
    # An accuracy turns by one row of a batch where two scores are nearly alike.
    tolerances = {"loss": (1e-5,) * 2, "task_loss": (1e-4,) * 2, "grad_norm": (1e-5, 5e-3), "task_accuracy": (0.1,) * 2}
    for name, (first, later) in tolerances.items():
        got, truth = (torch.tensor([row[name] for row in part]) for part in (rows[-len(wanted) :], wanted))
        for step, tolerance in enumerate([first] + [later] * (len(wanted) - 1)):
            text = f"{name} at step {first_step + step}: {got[step].tolist()} for {truth[step].tolist()}"
            assert torch.allclose(got[step], truth[step], rtol=tolerance, atol=tolerance), text
    ours, theirs = weights(run), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        close = torch.allclose(ours[name], value, rtol=1e-3, atol=0.05 * RATE * STEPS)  # 5% of the way it can go
        assert close, f"{name} differs by up to {(ours[name] - value).abs().max()}"


@pytest.mark.parametrize("case", CASES)
def test_processes_equal_one_with_the_whole_batch(together: Path, alone: Path, case: str) -> None:
    assert_same_run(together / case, alone / case)


def test_a_run_goes_on_with_another_number_of_processes(together: Path, alone: Path) -> None:
    assert_same_run(together / "begun-by-one", alone / "all", first_step=4)


def test_ring_and_copies_give_the_same(alone: Path, together: Path) -> None:
    first, second = (torch.tensor([row["loss"] for row in read_metrics(together / case)]) for case in ("all", "ring"))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_sigterm_to_one_process_stops_all_with_a_checkpoint(tiny_set: Path, tmp_path: Path, alone: Path) -> None:
    config = config_of("all", tiny_set, tmp_path / "run")
    pretrain_in_processes([config], 2, stop_at=2)
    # The signal came in step 2; all processes know of it a step later.
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step_00000003"]
    assert not (config.out / "encoder.safetensors").exists()
    pretrain(config)
    assert_same_run(config.out, alone / "all", first_step=4)


def test_batch_that_cannot_be_dealt_out_is_refused(tiny_set: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 5 processes, got 12"):
        Processes(0, 5, torch.device("cpu")).share(12)


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, RuntimeError, MemoryError, TypeError])
def test_whatever_fails_on_one_process_is_told_to_the_others(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for its number: a process that raises without giving it leaves them there."""
    told: list[int] = []

    def add_up(self: Processes, value: torch.Tensor) -> torch.Tensor:
        told.append(int(value))
        return value

    def fail() -> None:
        raise error("no more")

    monkeypatch.setattr(Processes, "sum", add_up)
    with pytest.raises(error, match="no more"):
        Processes(0, 2, torch.device("cpu")).all_or_none(fail)
    assert told == [1]


@pytest.mark.parametrize(("name", "text"), [("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("RANK", "2"), ("RANK", "-1")])
def test_an_environment_that_no_launcher_makes_is_refused(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", name: text}.items():
        monkeypatch.setenv(variable, value)
    with (
        pytest.raises(ValueError, match=f"the environment's {name} must be from . to .*, got '{text}'"),
        join_processes("cpu"),
    ):
        pass


def test_cached_negatives_need_representations(tiny_set: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(config_of("cached", tiny_set, tmp_path / "run"), task="time-arrow")
    with pytest.raises(
        ValueError, match="cached_negatives needs a permutative task or multiway synchronization, task is 'time-arrow'"
    ):
        pretrain(config)
    assert not config.out.exists()
