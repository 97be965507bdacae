"""The table of the proxy tasks: what it measures, what it keeps, and what it writes."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import write_tiny_set

import avppc.evaluate.lipreading.evaluate as lipreading
from avppc.cli import main
from avppc.config import EvaluateConfig, TableConfig
from avppc.data.packed import dataset
from avppc.evaluate.config import HeadName
from avppc.evaluate.lipreading.results import RowResult, pack_answers, unpack_answers
from avppc.evaluate.table import table as table_module
from avppc.evaluate.table.results import (
    PUBLISHED,
    Cell,
    CellResult,
    Entry,
    cells_of,
    combine,
    entries_of,
    paired_difference,
)
from avppc.evaluate.table.table import NOTHING, make_table, seeds_text, to_markdown
from avppc.files import sole_use
from avppc.tasks.config import TASK_NAMES

TINY = "batch_size=8;encoder.width=4;encoder.features=16;audio_width=4;objective.dim=16;checkpoint_every=1"
OURS, RIVAL = f"av-permutative:{TINY}", f"time-arrow:{TINY}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("table") / "packed")


def tiny_table(data: Path, out: Path, **changes: object) -> TableConfig:
    settings: dict[str, object] = {
        "tasks": (RIVAL, OURS),
        "labels": "4,1",
        "heads": ("gru", "bins"),
        "seeds": 2,
        "steps": 2,
        "draws": 2,
        "training_draws": 1,
        "most_clips": 12,
        "device": "cpu",
        "threads": 1,
        "workers": 1,
        **changes,
    }
    return TableConfig(data, out, **settings)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Evaluations of one epoch; the list gets the rows that are computed, not read."""
    protocol, computed = TableConfig.protocol, []

    def short(self: TableConfig, run: Path, labels: int, clips: int) -> EvaluateConfig:
        config = protocol(self, run, labels, clips)
        rates = {"head_learning_rates": (1e-2,), "scratch_learning_rates": (3e-3,), "finetune_learning_rates": (3e-3,)}
        return dataclasses.replace(config, epochs=1, training_epochs=1, selection_epochs=1, **rates)

    measure_rows = lipreading._measure_rows

    def count(inputs: object, rows: list[lipreading.RowWork]) -> object:
        computed.extend(f"{row.row} {row.config.heads[0]} {row.config.labels_per_word}" for row in rows)
        return measure_rows(inputs, rows)

    monkeypatch.setattr(TableConfig, "protocol", short)
    monkeypatch.setattr(lipreading, "_measure_rows", count)
    return computed


def test_table_is_whole_and_goes_on_at_the_missing_cell(data: Path, tmp_path: Path, quick: list[str]) -> None:
    config = tiny_table(data, tmp_path / "table")
    table = make_table(config)
    # 2 heads x 2 label counts x (a baseline + 2 tasks x 2 seeds), frozen and trained
    assert len(quick) == len(table.results) == 2 * 2 * 5 * 2
    assert quick == [  # the quick cells come first
        f"{row} {head} {labels}"
        for baseline, ours in (("random", "frozen"), ("supervised", "finetuned"))
        for labels in (4, 1)
        for head in ("gru", "bins")
        for row in (baseline, *[ours] * 4)
    ]

    page = (config.out / "table.md").read_text()
    assert page == to_markdown(table)
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == 2 * (1 + 2 + 2)
    assert rows[0].count("|") == 9  # task, GRU, time bins, best, ahead, slides: GRU, clips, minutes
    assert re.search(r"\| (\*\*)?\d+\.\d ± \d+\.\d \(\d+\.\d ± \d+\.\d\)(\*\*)? \|", rows[4])
    assert "59.9 (78.3)" in rows[3]
    assert "80.3 (83.2)" in rows[4]
    assert "| 16 |" in rows[4]  # clips seen: 2 steps of 8

    lines = list(csv.DictReader((config.out / "table.csv").read_text().splitlines()))
    assert len(lines) == 40
    assert {line["labels_per_word"] for line in lines} == {"4", "1"}
    html = (config.out / "table.html").read_text()
    assert html.count("<svg") == 1
    assert "avppc table --data" in html
    assert "words, " in html.split("preset laptop")[1].split("</p>")[0]  # on what it was measured, and chance
    assert html.count('"rate best"') >= len(table.columns) * 2
    content = json.loads((config.out / "table.json").read_text())
    assert len(content["cells"]) == 40
    assert {run["clips"] for run in content["runs"]} == {16}
    assert content["settings"]["seeds"] == 2

    quick.clear()
    missing = Cell("finetuned", Entry(OURS), 1, "gru", 1)
    (missing.directory(config) / "evaluation" / "finetuned-1.json").unlink()
    encoders = {path: path.stat().st_mtime_ns for path in config.out.glob("runs/*/encoder.safetensors")}
    assert len(encoders) == 4
    assert to_markdown(make_table(config)) == page  # on one CPU thread the same figures come again
    assert quick == ["finetuned gru 1"]
    quick.clear()
    make_table(dataclasses.replace(config, tasks=(OURS,)))  # the baselines do not depend on the tasks
    assert quick == []
    assert encoders == {path: path.stat().st_mtime_ns for path in encoders}


def test_interrupted_pretraining_and_more_seeds_go_on(data: Path, tmp_path: Path, quick: list[str]) -> None:
    config = tiny_table(data, tmp_path, tasks=(OURS,), labels="all", heads=("bins",), seeds=1, finetune=False)
    make_table(config)
    assert quick == ["random bins 0", "frozen bins 0"]
    run = entries_of(config)[0].pretraining(config, 0).out
    before = (run / "encoder.safetensors").read_bytes()
    (run / "encoder.safetensors").unlink()  # as if it had been killed at its end
    quick.clear()
    make_table(dataclasses.replace(config, seeds=2))
    assert (run / "encoder.safetensors").read_bytes() == before
    assert quick == ["frozen bins 0"]  # the second seed's
    page = (tmp_path / "table.md").read_text()
    assert "### all labels" in page
    assert "2 pretraining seeds" in page
    assert "supervised" not in page.split("Word classification")[0]
    assert "<svg" not in (tmp_path / "table.html").read_text()  # one count of labels makes no curve


def rates_in(table: Path) -> list[list[str]]:
    """The lines of table.csv without how long each took."""
    return [line[:-3] + line[-2:] for line in csv.reader((table / "table.csv").read_text().splitlines())]


def test_parts_in_any_order_make_the_table_of_one(data: Path, tmp_path: Path, quick: list[str]) -> None:
    config = tiny_table(data, tmp_path / "one", tasks=(OURS,), labels="4,1", heads=("bins",), finetune=False)
    make_table(config)
    assert len(quick) == 6
    quick.clear()
    for part, measured in (("2/3", 0), ("1/3", 3), ("0/3", 3), ("1/3", 0)):  # two runs make two parts busy
        make_table(dataclasses.replace(config, out=tmp_path / "parts", part=part))
        assert len(quick) == measured, part
        quick.clear()
    assert rates_in(tmp_path / "parts") == rates_in(tmp_path / "one")
    assert json.loads((tmp_path / "parts" / "table.json").read_text())["settings"]["part"] == ""
    assert "--part" not in (tmp_path / "parts" / "table.md").read_text()


def test_what_another_process_is_at_comes_last(
    data: Path, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run is pretrained elsewhere until all others are done, and then a cell of it is measured there."""
    config = tiny_table(data, tmp_path, tasks=(OURS, RIVAL), labels="4", heads=("bins",), seeds=1, finetune=False)
    entry = entries_of(config)[0]
    run = entry.pretraining(config, 0)
    cell = Cell("frozen", entry, 0, "bins", 4).directory(config)
    with contextlib.ExitStack() as other:
        for directory in (run.out, cell):
            directory.mkdir(parents=True)
        other.enter_context(sole_use(run.out))

        def wait(seconds: float) -> None:
            assert seconds == 2
            other.close()
            if not quick:
                other.enter_context(sole_use(cell))

        monkeypatch.setattr(table_module.time, "sleep", wait)
        table = make_table(config)
    assert [result.cell.entry for result in table.results] == [None, *entries_of(config)]
    assert quick == ["random bins 4", "frozen bins 4", "frozen bins 4"]
    told = capsys.readouterr().err.replace("\n", " ")
    assert told.count("another process is at the last 1: waiting for it") == 2
    assert told.index("pretraining 2 of 2") < told.index("pretraining 1 of 2")
    assert told.index("cell 3 of 3") < told.index("cell 2 of 3")


def test_pages_can_be_made_of_what_is_finished(data: Path, tmp_path: Path, quick: list[str]) -> None:
    config = tiny_table(data, tmp_path, tasks=(OURS,), labels="4", heads=("bins",), seeds=1, finetune=False)
    make_table(config)
    quick.clear()
    more = dataclasses.replace(config, tasks=(RIVAL, OURS), heads=("bins", "gru"), finetune=True, only_finished=True)
    page = to_markdown(make_table(more))
    assert quick == []
    assert not any("time-arrow" in path.name for path in (tmp_path / "runs").iterdir())
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert [row[1:4] for row in rows[3:5]] == [[NOTHING] * 3, [NOTHING] * 3]
    assert rows[4][0].startswith("| Time arrow")
    assert rows[5][2:4] == [NOTHING, NOTHING]
    assert re.fullmatch(r"\*\*\d+\.\d ± \d+\.\d\*\*", rows[5][1])
    assert f"<td>{NOTHING}</td>" in (tmp_path / "table.html").read_text()


def test_finished_work_is_known_wherever_it_lies_and_however_it_is_spelled(
    data: Path, tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_table(data, tmp_path / "table", tasks=(OURS,), labels="4", heads=("bins",), seeds=1)
    results = make_table(config).results
    assert len(results) == 4
    quick.clear()
    config.out.rename(tmp_path / "moved")
    monkeypatch.chdir(data.parent)
    moved = dataclasses.replace(config, data=Path(data.name), out=tmp_path / "moved")
    other_machine = dataclasses.replace(moved, device="auto", threads=2, workers=2)
    pages = make_table(dataclasses.replace(other_machine, only_finished=True))
    assert [entry.text for entry, _ in pages.costs] == [OURS]
    assert make_table(dataclasses.replace(other_machine, only_finished=True, steps=1)).costs == {}
    assert make_table(moved).results == results
    assert quick == []


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_damaged_shard_is_refused_before_anything_is_pretrained(
    split: str, data: Path, tmp_path: Path, quick: list[str]
) -> None:
    damaged = tmp_path / "packed"
    shutil.copytree(data, damaged)
    path = damaged / "shards" / f"{split}-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{split}-00000\.safetensors is damaged"):
        make_table(tiny_table(damaged, tmp_path / "table"))
    assert not (tmp_path / "table").exists()


def test_pages_of_what_is_finished_need_no_checksums(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, records: object) -> None:
        pytest.fail(f"checksums of {folder}")

    monkeypatch.setattr(dataset, "verify_shards", refuse)
    assert make_table(tiny_table(data, tmp_path / "table", only_finished=True)).results == []


def test_settings_of_an_entry_reach_its_runs_alone(data: Path, tmp_path: Path) -> None:
    config = tiny_table(data, tmp_path, tasks=("av-permutative", "av-permutative:objective.weighting=equal;seed=0"))
    plain, equal = (entry.pretraining(config, 1) for entry in entries_of(config))
    assert plain.objective.weighting == "modality"
    assert equal.objective.weighting == "equal"
    assert plain.steps == equal.steps == 2
    assert plain.out != equal.out
    for text, message in (
        ("objective.weight=1", "unknown fields"),
        ("nothing.at=1", "no setting"),
        ("x", "NAME=VALUE"),
    ):
        with pytest.raises(ValueError, match=message):
            Entry(f"av-permutative:{text}").pretraining(config, 0)
    # refused before anything is pretrained
    with pytest.raises(ValueError, match="subtasks and exclude are settings of the permutative"):
        make_table(tiny_table(data, tmp_path / "none", tasks=(f"time-arrow:{TINY};subtasks=1to1",)))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["baselines", "rivals"])
def test_settings_of_an_entry_are_read_under_former_names(name: str) -> None:
    entry = Entry(f"synchronization:{name}.sync_mode=multiway")
    assert entry.pretraining(TableConfig(Path("d"), Path("o")), 0).baselines.sync_mode == "multiway"


def test_the_batch_of_all_pretrainings_has_one_setting() -> None:
    table = TableConfig(Path("d"), Path("o"), batch_size=16)
    assert Entry("time-arrow").pretraining(table, 0).batch_size == 16
    assert Entry("time-arrow:batch_size=8").pretraining(table, 0).batch_size == 8
    assert Entry("time-arrow").pretraining(TableConfig(Path("d"), Path("o")), 0).batch_size == 128


def test_many_labels_take_fewer_epochs() -> None:
    config = TableConfig(Path("data"), Path("out"))
    few, all_ = config.protocol(Path("run"), 10, 200), config.protocol(Path("run"), 0, 2000)
    assert (few.training_epochs, few.selection_epochs) == (40, 20)
    assert (all_.training_epochs, all_.selection_epochs) == (10, 5)
    assert config.protocol(Path("run"), 0, 488_766).training_epochs == 8
    assert (few.head_hidden, TableConfig(Path("d"), Path("o"), preset="gpu").protocol(Path("r"), 0, 9).head_hidden) == (
        64,
        512,
    )


def result_of(wcr: float, val: float, interval: float = 0.03) -> RowResult:
    draws = [{"seed": 0, "val_wcr": val, "test_wcr": wcr}]
    settings = {"task": "time-arrow", "encoder_sha256": "0" * 64}
    return RowResult("frozen", 10, wcr, interval, 0.05, {"head": "gru"}, [], draws, ["A"], 400, [[9]], 1.0, settings)


def test_seeds_are_those_that_cells_have() -> None:
    config = TableConfig(Path("d"), Path("o"), tasks=("time-arrow",), seeds=3, heads=("gru", "bins"))
    entry = Entry("time-arrow")
    places: list[tuple[Entry | None, int, HeadName]] = [(None, 0, "gru"), *((entry, seed, "gru") for seed in range(3))]
    results = [CellResult(Cell("frozen", *place, 10), result_of(0.5, 0.5)) for place in places]
    assert seeds_text(table_module.Table(config, [entry], {}, [])) == "3 pretraining seeds"
    assert seeds_text(table_module.Table(config, [entry], {}, results)) == "3 pretraining seeds"
    assert seeds_text(table_module.Table(config, [entry], {}, results[:2])) == "1 pretraining seed"
    results += [CellResult(Cell("frozen", entry, 2, "bins", 10), result_of(0.5, 0.5))]
    assert seeds_text(table_module.Table(config, [entry], {}, results)) == "1 to 3 pretraining seeds"


def test_seeds_are_averaged_and_the_best_head_is_chosen_by_validation() -> None:
    config = TableConfig(Path("d"), Path("o"), tasks=("time-arrow",), seeds=2, heads=("gru", "bins"))
    entry = Entry("time-arrow")
    # seed 0: bins are better in test, but gru in validation; seed 1: bins in both
    rates = {("gru", 0): (0.2, 0.5), ("bins", 0): (0.4, 0.3), ("gru", 1): (0.1, 0.1), ("bins", 1): (0.3, 0.4)}
    results = [
        CellResult(Cell("frozen", entry, seed, head, 10), result_of(*pair)) for (head, seed), pair in rates.items()
    ]
    table = table_module.Table(config, [entry], {}, results)
    best = table.rate("frozen", entry, "best", 10)
    assert best is not None
    assert (best.mean, best.heads) == (pytest.approx(0.25), ("gru", "bins"))
    assert best.interval95 == pytest.approx(math.hypot(0.03, 12.706 * 0.05), rel=1e-3)
    assert table.rate("frozen", entry, "gru", 1) is None
    assert combine(results[:1]).interval95 == 0.03


def answered(*draws: list[int], val: float = 0.5, first: int = 0) -> RowResult:
    """A result with these right (1) and wrong answers to the test clips in each draw."""
    entries = [
        {"seed": first + seed, "val_wcr": val, "test_wcr": sum(right) / len(right), "right": pack_answers(right)}
        for seed, right in enumerate(draws)
    ]
    rate = sum(draw["test_wcr"] for draw in entries) / len(entries)
    return dataclasses.replace(result_of(rate, val), draws=entries, tested=len(draws[0]))


def test_paired_difference_is_of_the_same_clips_and_draws() -> None:
    """Two draws of four clips; by hand: differences per clip 1, 0.5, 0, 0; per draw 0.25, 0.5."""
    ours, rival = answered([1, 1, 0, 1], [1, 1, 1, 1]), answered([0, 1, 0, 1], [0, 0, 1, 1])
    found = paired_difference([ours], [rival])
    assert found is not None
    assert found.mean == pytest.approx(0.375)
    clips = 1.96 * np.std([1, 0.5, 0, 0], ddof=1) / 2
    draws = 12.706 * np.std([0.25, 0.5], ddof=1) / math.sqrt(2)
    assert found.interval95 == pytest.approx(min(1.0, math.hypot(clips, draws)), rel=1e-3)
    assert found.text() == "+37.5 ± 100.0"
    same = paired_difference([ours], [ours])
    assert (same.mean, same.interval95) == (0.0, 0.0)  # what is hard for both cancels
    more = paired_difference([ours, ours, ours], [rival, rival, rival])  # a third part, over seeds, which is 0 here
    assert (more.mean, more.interval95) == (found.mean, pytest.approx(found.interval95))
    assert paired_difference([ours], [rival, rival]).mean == found.mean  # random weights have no pretraining seed
    later = answered([0, 1, 0, 1], first=1)  # of draw 1 alone: one in common, the second of ours
    assert paired_difference([ours], [later]).mean == pytest.approx(0.5)
    assert paired_difference([ours], [answered([1, 1, 0, 1], first=7)]) is None
    assert paired_difference([ours], [result_of(0.5, 0.5)]) is None  # answers were not kept


def test_answers_are_packed_eight_to_a_byte() -> None:
    answers = [True, False, True, True, False, False, False, True, True]
    assert pack_answers(answers) == "b180"
    assert unpack_answers("b180", 9).tolist() == answers
    with pytest.raises(ValueError, match="right must hold 9 answers"):
        dataclasses.replace(answered([1, 0, 1]), tested=9)


def test_rows_are_compared_with_the_best_rival_of_the_validation_clips() -> None:
    tasks = ("time-arrow", "correspondence", "av-permutative")
    config = TableConfig(Path("d"), Path("o"), tasks=tasks, heads=("bins",))
    entries = entries_of(config)
    answers = {
        "time-arrow": answered([1, 1, 1, 0], val=0.4),
        "correspondence": answered([1, 0, 0, 0], val=0.6),
        "av-permutative": answered([1, 1, 0, 0], val=0.3),
    }
    results = [CellResult(Cell("frozen", entry, 0, "bins", 10), answers[entry.task]) for entry in entries]
    results.append(CellResult(Cell("random", None, 0, "bins", 10), answered([0, 0, 0, 0])))
    table = table_module.Table(config, entries, {}, results)
    assert table.best_rival(10).task == "correspondence"
    ahead = [table.ahead(entry, title, 10).split(" ±")[0] for title, entry, _ in table.lines(10)]
    assert ahead == ["-25.0", NOTHING, "+50.0", "best rival", "+25.0"]
    assert [table.is_best(entry, "bins", 10) for entry in (None, *entries)] == [False, True, False, False]
    assert "**75.0 ±" in to_markdown(table)
    assert to_markdown(table).count("**") == 2


def test_published_figures_and_order() -> None:
    assert set(PUBLISHED) <= set(TASK_NAMES)
    frozen = [PUBLISHED[task]["gru"][0] for task in TASK_NAMES if task in PUBLISHED]
    assert frozen == sorted(frozen)
    cells = cells_of(TableConfig(Path("d"), Path("o"), labels="all,10"))
    assert len(cells) == len(set(cells)) == 2 * 3 * 2 * 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("sync",)}, "tasks must be one of .* got 'sync'"),
        ({"tasks": ("time-arrow", "time-arrow")}, "none twice"),
        ({"labels": "10,ten"}, r'labels must be different counts or "all"'),
        ({"labels": "10,10"}, "labels must be different"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"heads": ("tcn",)}, "heads must be one of"),
        ({"part": "3/3"}, "part must be \"i/n\" with i from 0 to n - 1, got '3/3'"),
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableConfig(Path("data"), Path("out"), **changes)


def test_command_line_makes_the_table(data: Path, tmp_path: Path, quick: list[str], capsys) -> None:
    flags = ["--tasks", RIVAL, "--labels", "1", "--heads", "bins", "--no-finetune", "--steps", "1", "--draws", "1"]
    where = ["--data", str(data), "--out", str(tmp_path), "--device", "cpu", "--threads", "1", "--workers", "1"]
    assert main(["table", *where, *flags]) == 0
    assert "| Time arrow (batch_size=8" in capsys.readouterr().out
    assert quick == ["random bins 1", "frozen bins 1"]
