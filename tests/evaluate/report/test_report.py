"""The report of a finished run: what is on the page, and that it needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from PIL import Image
from report_runs import SHAPE, WORDS, Page, make_row, write_clips, write_evaluation, write_run
from tiny_runs import tiny_config, write_tiny_set

from avppc.cli import main
from avppc.config import EvaluateConfig, PretrainConfig, ReportConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.data.source import DataSource
from avppc.evaluate.lipreading.results import RowResult, write_row
from avppc.evaluate.media import make_clip_sheet
from avppc.evaluate.record import Metrics, RunRecord, read_record
from avppc.evaluate.report.report import duration, execute, percent, render
from avppc.files import sha256_of
from avppc.losses.config import ObjectiveConfig
from avppc.losses.subtasks import SUBTASKS
from avppc.train.config import ScaleConfig
from avppc.train.loop import pretrain

SECTIONS = ("lipreading", "confusions", "training", "subtasks", "clips", "settings", "commands")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything there is, never changed."""
    root = tmp_path_factory.mktemp("finished")
    directory = root / "runs" / "one <run>"
    write_run(directory, write_clips(root / "packed"))
    (directory / "encoder.safetensors").touch()
    write_evaluation(directory, labels=1)
    write_evaluation(directory, labels=10)
    return directory


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    return render(ReportConfig(finished))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_section_is_there_and_no_part_is_missing(page: Page) -> None:
    assert [identity for identity in page.attributes("id") if identity in SECTIONS] == list(SECTIONS)
    assert {f"#{name}" for name in SECTIONS} <= set(page.attributes("href"))
    assert "notice" not in page.attributes("class")
    labels = page.attributes("aria-label")
    for start in ("Bar chart", "Confusion matrix", "Loss, learning rate", "Accuracy and loss", "Clips per second"):
        assert any(label.startswith(start) for label in labels), start
    assert sum(tag == "svg" for tag, _ in page.elements) == 7  # 2 confusion matrices, 1 each of the others
    assert sum(tag == "figcaption" for tag, _ in page.elements) == 8  # the clips have one too


def test_the_table_holds_what_the_json_files_say(finished: Path, page: Page) -> None:
    names = {"frozen": "AV-PPC, frozen", "supervised": "supervised from scratch", "random": "random encoder, frozen"}
    for row, name in names.items():
        stored = json.loads((finished / "evaluation" / f"{row}-10.json").read_text())
        cells = [
            name,
            "time bins",
            f"{100 * stored['wcr']:.1f} ± {100 * stored['interval95']:.1f} %",
            str(len(stored["draws"])),
            "0.003",
            "0.001" if row == "supervised" else "–",  # noqa: RUF001  # the page's sign for "none"
            "2.1 min",
        ]
        assert page.rows.count(cells) == 2  # for 1 and for 10 labels, which these runs give the same rates
    assert page.rows.count(["time bins", "0.003", "0.001", "38.3 %", "chosen"]) == 2  # supervised: 0.4 - 0.017
    assert "Draw with seed 2: validation 62.5 %, test 63.0 %." in page.text
    assert [row[2] for row in page.rows if row[0] == "guessing (chance)"] == ["20.0 %", "20.0 %"]


def test_means_of_the_groups_are_those_of_the_log(finished: Path, page: Page) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()][-5:]
    for group in ("1to1", "1to2", "2to1", "2to2"):
        numbers = [place for place, subtask in enumerate(SUBTASKS) if subtask.group == group]
        accuracies = [row["task_accuracy"][place] for row in rows for place in numbers]
        losses = [row["task_loss"][place] for row in rows for place in numbers]
        cells = page.row(group.replace("to", " → "))
        assert cells[1] == str(len(numbers))
        assert cells[2] == f"{100 * sum(accuracies) / len(accuracies):.1f} %"
        assert cells[3] == f"{math.log(16) - sum(losses) / len(losses):.2f}"
    assert page.row("between modalities")[1] == "18"
    assert page.row("within one modality")[1] == "4"
    assert page.row("all")[1] == "42"
    assert "Means over steps 36 to 60" in page.text
    assert "log N = 2.77 nats" in page.text


def test_pictures_of_the_subtasks_hold_each_value(finished: Path, page: Page) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()][-5:]
    texts = [text.strip() for text in page.texts]
    for place in range(len(SUBTASKS)):
        accuracy = sum(row["task_accuracy"][place] for row in rows) / len(rows)
        loss = sum(row["task_loss"][place] for row in rows) / len(rows)
        assert f"{100 * accuracy:.1f}" in texts
        assert f"{math.log(16) - loss:.2f}" in texts


def test_page_loads_nothing_and_runs_nothing(html: str, page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert all(value.startswith("data:image/png;base64,") for value in page.attributes("src"))
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.attributes("href"))
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html
    assert re.search(r"https?://", html) is None
    assert len(html.encode()) < 3_000_000


def test_ids_are_unique_and_every_reference_has_its_target(html: str, page: Page) -> None:
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    references = {value[1:] for value in page.attributes("href") if value.startswith("#")}
    references |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert references
    assert references <= set(ids)


def test_figures_take_their_colours_from_the_page(html: str) -> None:
    figures = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert re.findall(r"(?:fill|stroke): (?!none|var\(--)[^;\"]+", figures) == []
    used = set(re.findall(r"var\(--([a-z-]+)\)", html))
    dark = re.search(r"prefers-color-scheme: dark.*?\n  }", html, flags=re.DOTALL)
    assert dark is not None
    assert used - {"sans", "mono"} <= set(re.findall(r"--([a-z-]+):", dark[0]))


def test_words_and_names_are_escaped(html: str, page: Page) -> None:
    assert not {"b", "run", "64"} & {tag for tag, _ in page.elements}
    for text in ("one <run>", "riscv<64>", "clips/<0>.mp4"):
        assert text in page.text
    texts = [text.strip() for text in page.texts]
    for word in WORDS:
        assert texts.count(word) >= 4  # both ways of two confusion matrices
    assert "ABOUT / BILLION" in page.text


def test_most_confused_pair_comes_first(page: Page) -> None:
    first, second = (row for row in page.rows if row[0] == "ABOUT / BILLION")
    spoken = 5 + 62 + 40
    assert first == second == ["ABOUT / BILLION", f"{4100 / spoken:.1f} %", f"{100 / 67:.1f} %"]


def test_same_files_give_the_same_page(finished: Path, html: str) -> None:
    assert render(ReportConfig(finished)) == html


def test_page_is_named_on_the_last_line(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "page.html"
    assert main(["report", "--run", str(finished), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report written to {out}"
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_by_default_the_page_lies_in_the_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tmp_path / "nowhere")
    assert execute(ReportConfig(tmp_path / "run")) == 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", tmp_path / "nowhere")
    page = tmp_path / "run" / "report.html"
    page.write_text("old")
    before = sorted(tmp_path.rglob("*"))

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        execute(ReportConfig(tmp_path / "run"))
    assert page.read_text() == "old"
    assert sorted(tmp_path.rglob("*")) == before


def test_data_that_is_asked_for_must_be_there(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a packed data set"):
        render(ReportConfig(finished, data=tmp_path))


def test_commands_give_the_settings_again(finished: Path, page: Page) -> None:
    lines = page.texts[page.texts.index(next(text for text in page.texts if text.startswith("avppc pretrain")))]
    commands = [shlex.split(line) for line in lines.replace("\\\n", " ").splitlines()]
    assert [words[1] for words in commands] == ["pretrain", "evaluate", "evaluate", "report"]
    config = read_record(finished).config
    assert tyro.cli(PretrainConfig, args=commands[0][2:]) == config
    for words, labels in zip(commands[1:3], (1, 10), strict=True):
        expected = EvaluateConfig(
            finished, labels_per_word=labels, draws=3, heads=("gru", "bins"), trajectories=Path("VIDEOS")
        )
        assert tyro.cli(EvaluateConfig, args=words[2:]) == expected
    assert tyro.cli(ReportConfig, args=commands[3][2:]) == ReportConfig(finished)


def test_settings_that_differ_from_the_preset_are_marked(page: Page) -> None:
    assert page.row("learning_rate")[1] == "0.0015"
    assert page.row("past_frames")[1] == "12"
    assert "8 settings changed from the preset laptop" in page.text
    assert page.attributes("class").count("changed") == 8


def test_many_words_give_a_picture_without_names(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    words = [f"WORD{number}" for number in range(150)]
    write_run(directory, tmp_path / "nowhere")
    write_row(directory, make_row(directory, "frozen", words=words))
    html = render(ReportConfig(directory))
    page = Page(html)
    (picture,) = (value for value in page.attributes("href") if value.startswith("data:image/png"))
    assert max(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))).size) >= 150
    assert "those below 5 left out" not in page.text
    assert "WORD75" not in page.text
    assert len(html.encode()) < 1_000_000


def test_clips_show_the_frames_they_say(finished: Path) -> None:
    config = read_record(finished).config
    sheet = make_clip_sheet(DataSource(config.data), config.cut, config.features, clips=5)
    assert (sheet.split, sheet.clips_in_split, sheet.tiles) == ("test", 10, 15)
    assert [strip.word for strip in sheet.strips] == list(WORDS)
    assert sheet.spans == [("past", 12), ("gap", 3), ("future", 12), ("unused", 2)]
    with PackedDataset(config.data, "test") as dataset:
        for strip in sheet.strips:
            number = dataset.sources.index(strip.source)
            assert dataset.words[int(dataset.labels[number])] == strip.word
            mouth, sound = (
                np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
                for uri in (strip.mouth, strip.sound)
            )
            shown = (8 * np.arange(0, 29, 2) + number).astype(np.uint8)
            np.testing.assert_array_equal(mouth, np.tile(np.repeat(shown, SHAPE.width), (SHAPE.height, 1)))
            assert sound.shape == (config.features.bands, 4 * SHAPE.frames)
            assert sound.min() == 0
            assert sound.max() == 255


def test_figures_in_words() -> None:
    assert percent(0.4624) == "46.2\u00a0%"
    assert percent(math.nan) == "\u2013"
    assert [duration(seconds) for seconds in (8.4, 99.4, 125, 7200)] == [
        "8\u00a0s",
        "99\u00a0s",
        "2.1\u00a0min",
        "2.0\u00a0h",
    ]


@pytest.mark.parametrize(
    ("settings", "candidates"),
    [
        ({}, 8),
        ({"accumulate": 4}, 8),
        ({"accumulate": 4, "scale": ScaleConfig(cached_negatives=True)}, 32),
        ({"objective": ObjectiveConfig(negatives="same-clip")}, 16),
        ({"task": "visual-permutative"}, 29 - 2 - 2 * 3),  # moments of a clip: less jitter and local motion's reach
        ({"task": "visual-permutative", "objective": ObjectiveConfig(moments="none")}, 8),
    ],
)
def test_guessing_is_among_all_candidates(settings: dict[str, Any], candidates: int, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path / "run", batch_size=8, **settings)
    assert RunRecord(tmp_path, config, None, Metrics(tmp_path, [], {}), []).candidates == candidates


def test_report_of_a_baseline_task_names_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(tiny_config(write_tiny_set(tmp_path / "packed"), run, task="time-arrow", steps=4))
    draws = [{"seed": 0, "val_wcr": 0.5, "test_wcr": 0.5}]
    chosen, words = {"head": "bins", "head_learning_rate": 1e-2}, ["OPEN", "SHUT"]
    settings = {"task": "time-arrow", "encoder_sha256": sha256_of(run / "encoder.safetensors")}
    result = RowResult("frozen", 4, 0.5, 0.2, 0.5, chosen, [], draws, words, 9, [[5, 0], [4, 0]], 1.0, settings)
    write_row(run, result)
    page = render(ReportConfig(run))
    assert '<p class="kicker">Time arrow</p>' in page
    assert "time-arrow, frozen" in page
    assert "the frozen time-arrow encoder" in page
    assert "AV-PPC" not in page
    assert "log N" not in page
