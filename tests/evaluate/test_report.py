from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image
from report_runs import SHAPE, WORDS, Page, make_row, write_clips, write_evaluation, write_run
from tiny_runs import tiny_config, write_tiny_set

from avppc.cli import main
from avppc.config import EvaluateConfig, PretrainConfig, ReportConfig
from avppc.data.packed import PackedDataset
from avppc.evaluate import plots
from avppc.evaluate.clip_strips import make_clip_sheet
from avppc.evaluate.confusion import confusion_rates, most_confused, order_by_confusion
from avppc.evaluate.record import read_record
from avppc.evaluate.report import compare, duration, percent, render, run, summarize
from avppc.evaluate.results import RowResult, write_row
from avppc.files import write_json
from avppc.tasks.permutative import SUBTASKS
from avppc.train.loop import pretrain

SECTIONS = ("lipreading", "confusions", "training", "subtasks", "clips", "settings", "commands")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything there is, never changed."""
    root = tmp_path_factory.mktemp("finished")
    directory = root / "runs" / "one <run>"
    write_run(directory, write_clips(root / "packed"))
    write_evaluation(directory, labels=1)
    write_evaluation(directory, labels=10)
    (directory / "encoder.safetensors").touch()
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


def test_intervals_end_at_all_and_nothing(tmp_path: Path) -> None:
    rows = [
        make_row(tmp_path, row, wcr=rate, interval95=0.3)
        for row, rate in (("random", 0.0), ("supervised", 0.95), ("frozen", 1.0))
    ]
    svg = plots.plot_rates([rows])
    for text in ("0.0 ± 30.0 %", "95.0 ± 30.0 %", "100.0 ± 30.0 %"):
        assert f">{text}</text>" in svg
    ticks = {int(text): float(x) for x, text in re.findall(r'<text [^>]* x="([\d.]+)"[^>]*>(\d+)</text>', svg)}
    assert max(ticks) == 100
    lines = re.findall(r'<path d="M (\S+) \S+\nL (\S+) \S+\n"[^>]*stroke: var\(--ink\); stroke-width: 1.4', svg)
    expected = [(0, 0.3), (0.65, 1), (0.7, 1)]
    for (start, end), (low, high) in zip(lines, expected, strict=True):
        scale = ticks[100] - ticks[0]
        assert float(start) == pytest.approx(ticks[0] + low * scale, abs=0.05)
        assert float(end) == pytest.approx(ticks[0] + high * scale, abs=0.05)


def test_contexts_are_lines_and_targets_columns() -> None:
    subtasks = [subtask for subtask in SUBTASKS if subtask.name in ("Vp->Ap,Af", "Ap,Af->Vp")]
    svg = plots.plot_subtasks(subtasks, np.array([0.111, 0.222]), np.array([1.0, 2.0]), 2.77)
    places = {
        text: (float(x), float(y))
        for x, y, text in re.findall(r'<text [^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>([\d.]+)</text>', svg)
    }
    assert [subtask.name for subtask in subtasks] == ["Vp->Ap,Af", "Ap,Af->Vp"]
    for first, second in (("11.1", "22.2"), ("1.00", "2.00")):
        assert places[first][0] > places[second][0]  # target Ap,Af is the last column
        assert places[first][1] < places[second][1]  # context Ap,Af the last line


def test_long_logs_are_thinned_to_means(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tmp_path / "nowhere")
    record = read_record(tmp_path / "run")

    def longest_path(rows: int) -> int:
        """Points of the longest line where the gradient's norm jumps up and down from row to row."""
        log = [
            {"step": row + 1, "loss": 1.0, "learning_rate": 1.0, "grad_norm": 1.0 + 4 * (row % 2)}
            for row in range(rows)
        ]
        thinned = dataclasses.replace(record, metrics=dataclasses.replace(record.metrics, rows=log))
        return max(path.count("\nL ") for path in re.findall(r'<path d="([^"]*)"', plots.plot_training(thinned)))

    assert longest_path(400) > 300
    assert longest_path(800) < 10  # two rows a point: level


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
    assert run(ReportConfig(tmp_path / "run")) == 0
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
        run(ReportConfig(tmp_path / "run"))
    assert page.read_text() == "old"
    assert sorted(tmp_path.rglob("*")) == before


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
        run(ReportConfig(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError, match=r"holds no run: there is no config\.json"):
        run(ReportConfig(tmp_path))
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


def test_data_that_is_asked_for_must_be_there(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a packed data set"):
        render(ReportConfig(finished, data=tmp_path))


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


def test_words_taken_for_each_other_stand_side_by_side() -> None:
    generator = np.random.default_rng(0)
    groups = generator.permutation(np.repeat(np.arange(4), 3))
    counts = np.where(groups[:, None] == groups, generator.integers(20, 40, (12, 12)), 1)
    order = order_by_confusion(confusion_rates(counts.tolist()))
    assert sorted(order) == list(range(12))
    assert np.count_nonzero(np.diff(groups[order])) == 3


def test_closest_ends_of_groups_meet() -> None:
    rates = np.eye(4)
    for first, second, share in ((0, 1, 0.4), (2, 3, 0.3), (1, 3, 0.1)):
        rates[first, second] = rates[second, first] = share
    assert order_by_confusion(rates) == [0, 1, 3, 2]


def test_words_never_confused_keep_their_order() -> None:
    assert order_by_confusion(np.eye(6)) == list(range(6))


def test_confusion_rates_and_pairs() -> None:
    rates = confusion_rates([[6, 2, 0], [0, 0, 0], [5, 0, 5]])
    np.testing.assert_array_equal(rates, [[0.75, 0.25, 0], [0, 0, 0], [0.5, 0, 0.5]])
    pairs = most_confused(rates, ["a", "b", "c"], 5)
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "c"), ("a", "b")]
    assert (pairs[0].first_as_second, pairs[0].second_as_first) == (0.0, 0.5)
    with pytest.raises(ValueError, match=r"square table, got shape \(1, 2\)"):
        confusion_rates([[1, 2]])


def test_clips_show_the_frames_they_say(finished: Path) -> None:
    config = read_record(finished).config
    sheet = make_clip_sheet(config.data, config.cut, config.features, clips=5)
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


def test_report_of_a_rival_task_names_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(tiny_config(write_tiny_set(tmp_path / "packed"), run, task="time-arrow", steps=4))
    draws = [{"seed": 0, "val_wcr": 0.5, "test_wcr": 0.5}]
    chosen, words = {"head": "bins", "head_learning_rate": 1e-2}, ["OPEN", "SHUT"]
    settings = {"task": "time-arrow"}
    result = RowResult("frozen", 4, 0.5, 0.2, 0.5, chosen, [], draws, words, 9, [[5, 0], [4, 0]], 1.0, settings)
    write_row(run, result)
    page = render(ReportConfig(run))
    assert '<p class="kicker">Time arrow</p>' in page
    assert "time-arrow, frozen" in page
    assert "the frozen time-arrow encoder" in page
    assert "AV-PPC" not in page
    assert "log N" not in page
