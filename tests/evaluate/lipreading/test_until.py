"""`avppc bench-train --until`: a pretraining that stops when enough words are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import write_tiny_set

from avppc.cli import main
from avppc.evaluate.lipreading import until
from avppc.train.config import BenchTrainConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("until") / "packed")


def config_for(data: Path, **changes: object) -> BenchTrainConfig:
    settings = {"batch_size": 8, "steps": 2, "pretrain_steps": 5, "device": "cpu", "threads": 1, **changes}
    return BenchTrainConfig(data, **settings)  # type: ignore[arg-type]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The rates that the looks find, one after the other; the list empties."""
    found = [0.2, 0.5, 0.7, 0.9]
    monkeypatch.setattr(until, "LABELS_PER_WORD", 4)
    monkeypatch.setattr(until._Reader, "rate", lambda reader, encoder: found.pop(0))
    return found


def test_it_stops_where_enough_words_are_read(data: Path, rates: list[float]) -> None:
    record = until.measure_until(config_for(data, until=0.5))
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
    monkeypatch.setattr(until, "LABELS_PER_WORD", 4)
    reader = until._Reader(data, bf16=False)
    reader.config = replace(reader.config, epochs=8)
    torch.manual_seed(5)
    encoder = until.VideoEncoder().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    rate = reader.rate(encoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.training
    assert reader.rate(encoder) == rate > 1 / 3
    torch.nn.init.zeros_(encoder.project[0].weight)
    assert reader.rate(encoder) == pytest.approx(1 / 3, abs=0.05)
