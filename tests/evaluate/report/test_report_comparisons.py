"""What the report says of the frozen encoder beside the supervised one, and what it does not claim."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from report_runs import Page, make_row, write_run

from avppc.config import ReportConfig
from avppc.evaluate.lipreading.results import write_row
from avppc.evaluate.record import read_record
from avppc.evaluate.report.report import compare, render, summarize


@pytest.mark.parametrize(
    ("supervised", "verdict", "sentence"),
    [
        (0.30, "above", "The frozen encoder lies 20.0 points above it, more than both 95% intervals together."),
        (
            0.48,
            "not told apart",
            "lies 2.0 points above it, no more than both 95% intervals together: these numbers do",
        ),
        (
            0.52,
            "not told apart",
            "lies 2.0 points below it, no more than both 95% intervals together: these numbers do",
        ),
        (0.70, "below", "The frozen encoder lies 20.0 points below it, more than both 95% intervals together."),
    ],
)
def test_summary_claims_what_the_intervals_allow(
    tmp_path: Path, supervised: float, verdict: str, sentence: str
) -> None:
    directory = tmp_path / "run"
    write_run(directory, tmp_path / "nowhere")
    rows = [make_row(directory, "supervised", supervised), make_row(directory, "frozen", 0.5)]
    for row in rows:
        write_row(directory, row)
    (pair,) = compare(rows)
    assert pair.verdict == verdict
    assert sentence in summarize(read_record(directory))


def test_verdict_at_the_very_sum_of_the_intervals(tmp_path: Path) -> None:
    low, high = (
        make_row(tmp_path, row, rate, interval95=0.125, wcr=rate)
        for row, rate in (("supervised", 0.25), ("frozen", 0.5))
    )
    assert compare([low, high])[0].verdict == "not told apart"


def test_rows_of_different_settings_are_pointed_out(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    write_run(directory, tmp_path / "nowhere")
    rows = [make_row(directory, row) for row in ("supervised", "frozen")]
    rows[1].settings["epochs"] = 7
    for row in rows:
        write_row(directory, row)
    text = Page(render(ReportConfig(directory))).text
    assert "evaluated with different settings (epochs): they should not be compared" in text
    assert "--rows supervised" in text
    assert "--epochs 7" in text


def test_rows_of_the_same_clips_elsewhere_are_of_the_same_settings(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    write_run(directory, tmp_path / "nowhere")
    rows = [make_row(directory, row) for row in ("supervised", "frozen")]
    for row, data in zip(rows, ("packed", "/data/packed"), strict=True):
        row.settings.update(data=data, data_sha256="0" * 64)
        write_row(directory, row)
    page = Page(render(ReportConfig(directory))).text
    assert "different settings" not in page
    assert page.count("avppc evaluate --run") == 1
    del rows[0].settings["data_sha256"]  # a row of before: only the place tells the data
    write_row(directory, rows[0])
    assert "different settings (data, data_sha256)" in Page(render(ReportConfig(directory))).text


def test_rows_of_another_encoder_are_pointed_out(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    write_run(directory, tmp_path / "nowhere")
    (directory / "encoder.safetensors").write_bytes(b"new")
    rows = [make_row(directory, row) for row in ("supervised", "frozen")]
    rows[0].settings["encoder_sha256"] = hashlib.sha256(b"old").hexdigest()
    rows[1].settings["encoder_sha256"] = hashlib.sha256(b"new").hexdigest()
    for row in rows:
        write_row(directory, row)
    text = Page(render(ReportConfig(directory))).text
    assert "has changed since these rows were evaluated: supervised from scratch (10 labels a word)." in text
    assert "evaluated with different settings (encoder_sha256)" in text
