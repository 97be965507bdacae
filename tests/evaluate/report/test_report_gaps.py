"""The report of a run that is unfinished, damaged or not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hand_edited import change_json
from report_runs import Page, write_run

from avppc.cli import main
from avppc.config import ReportConfig
from avppc.evaluate.record import read_record
from avppc.evaluate.report.report import execute, render
from avppc.files import write_json


def test_unfinished_run_without_evaluation_and_data(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tmp_path / "nowhere", steps=60, logged=20)
    text = Page(render(ReportConfig(tmp_path / "run"))).text
    assert "This run is unfinished: 20 of 60 steps are logged." in text
    assert "20 of 60 steps are logged, so all figures here are those of an unfinished run." in text
    assert "Its lip reading has not been evaluated yet." in text
    assert "So far, the 42 sub-tasks find" in text
    assert "Not evaluated yet" in text
    assert "There is no encoder file yet." in text
    assert f"{tmp_path / 'nowhere'} is not a packed data set" in text
    assert "Means over steps 1 to 20" in text


def test_run_that_logged_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tmp_path / "nowhere")
    for name in ("metrics.jsonl", "task.json", "environment.json"):
        (tmp_path / "run" / name).unlink()
    page = Page(render(ReportConfig(tmp_path / "run")))
    assert "none is logged yet" in page.text
    assert "Nothing is logged yet" in page.text
    assert "No sub-tasks are logged" in page.text
    assert "there is no environment.json" in page.text
    assert not any(tag == "svg" for tag, _ in page.elements)


@pytest.mark.parametrize(
    "changes",
    [{"objective": {"negatives": "same-clip"}}, {"accumulate": 2, "scale": {"cached_negatives": True}}],
    ids=["same-clip", "cached"],
)
def test_every_sentence_names_the_same_candidates(changes: dict[str, object], tmp_path: Path) -> None:
    """Of batches of 16 clips."""
    write_run(tmp_path / "run", tmp_path / "nowhere")
    change_json(tmp_path / "run" / "config.json", **changes)
    text = Page(render(ReportConfig(tmp_path / "run"))).text
    assert re.findall(r"among N = (\d+)", text) == ["32"] * 3
    assert re.findall(r"guessing: ([\d.]+)", text) == ["3.1"] * 2
    assert "log N = 3.47 nats" in text


def test_log_of_a_task_without_subtasks(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tmp_path / "nowhere")
    write_json(tmp_path / "run" / "task.json", {})
    page = Page(render(ReportConfig(tmp_path / "run")))
    assert "No sub-tasks are logged" in page.text
    assert sum(tag == "svg" for tag, _ in page.elements) == 2  # training and speed


def test_values_that_were_not_finite_are_left_out(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    write_run(directory, tmp_path / "nowhere")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row in rows[-5:-1]:
        row["task_accuracy"][0] = None
    rows[-1] |= {"loss": None, "clips_per_second": None}
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = read_record(directory)
    assert record.final(record.task_accuracy)[0] == rows[-1]["task_accuracy"][0]
    assert record.training_seconds == pytest.approx(55 * 16 / 160)
    assert "nan" not in Page(render(ReportConfig(directory))).text


def test_no_run_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="is not a directory: run must be"):
        execute(ReportConfig(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match=r"holds no run: there is no config\.json"):
        execute(ReportConfig(tmp_path))
    assert main(["report", "--run", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    write_run(directory, tmp_path / "nowhere")
    write_json(directory / "task.json", {"task_loss": ["Vp->Vf"], "task_accuracy": ["Vp->Vf"]})
    with pytest.raises(ValueError, match=r"metrics\.jsonl: task_accuracy of step 5 must hold 1 values"):
        render(ReportConfig(directory))
    (directory / "environment.json").write_text("[]")
    with pytest.raises(ValueError, match=r"environment\.json must hold a JSON object, got list"):
        render(ReportConfig(directory))
