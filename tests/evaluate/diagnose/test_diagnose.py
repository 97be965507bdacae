"""The diagnosis of a run: its arithmetic against plain loops, and what it finds in runs of every task."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import WORDS, tiny_config, write_tiny_set

from avppc.cli import main
from avppc.config import DiagnoseConfig
from avppc.evaluate.diagnose.diagnose import confusions_by_visemes, diagnose, edit_distance, viseme_strings
from avppc.evaluate.diagnose.task import accuracy_among, load_task, ranks_of_positives, recall_at, vote_of_neighbours
from avppc.evaluate.lipreading.results import RowResult, write_row
from avppc.tasks.config import TASK_NAMES
from avppc.train.loop import pretrain

pytest.importorskip("espeakng_loader", reason="visemes need the extra synth")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny run of every task."""
    folder = tmp_path_factory.mktemp("diagnosed")
    data = write_tiny_set(folder / "packed")
    found = {}
    for task in TASK_NAMES:
        found[task] = folder / task
        pretrain(tiny_config(data, found[task], task=task, steps=2))
    return found


def test_ranks_and_recall_are_counted_by_hand() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [5.0, 4.0, 4.0], [0.0, 0.0, 0.0]])
    assert ranks_of_positives(scores).tolist() == [0, 2, 2]  # ties count against the positive
    assert recall_at(scores, (1, 3)) == {"r@1": pytest.approx(1 / 3), "r@3": 1.0, "median_rank": 3.0}


def test_accuracy_among_candidates_equals_the_count_over_all_draws() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 6, 6)
    scores[0, 3, 1] = scores[0, 3, 3]  # a tie
    allowed = torch.tensor([[i // 2 == j // 2 or (i, j) == (0, 5) for j in range(6)] for i in range(6)])
    allowed[4] = False  # this row has no candidate: it does not count
    won, chance = accuracy_among(scores, allowed)
    for k in range(2):
        hits, drawn = [], []
        for i in range(6):
            candidates = [j for j in range(6) if allowed[i, j] and j != i]
            if not candidates:
                continue
            others = [j for j in range(6) if j != i]
            beats = [bool(scores[k, i, i] > scores[k, i, j]) for j in range(6)]
            hits.append(all(beats[j] for j in candidates))
            draws = list(itertools.combinations(others, len(candidates)))
            drawn.append(np.mean([all(beats[j] for j in draw) for draw in draws]))
        assert won[k].item() == pytest.approx(np.mean(hits))
        assert chance[k].item() == pytest.approx(np.mean(drawn))


def test_neighbours_vote() -> None:
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.2, 1.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    test = torch.tensor([[2.0, 0.1], [0.0, 3.0], [0.6, 0.4]])
    assert vote_of_neighbours(train, labels, test, 3).tolist() == [0, 1, 0]
    assert vote_of_neighbours(train, labels, test, 99).tolist() == [0, 1, 0]


@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_task_is_diagnosed_for_what_it_has(runs: dict[str, Path], task: str) -> None:
    findings = diagnose(DiagnoseConfig(runs[task], device="cpu", threads=1, conflict_batches=1, neighbours=3))
    has_sound_score = task in ("av-permutative", "synchronization", "correspondence")
    assert (findings["retrieval"] is not None) == (findings["offset"] is not None) == has_sound_score
    by_span = task == "av-permutative"  # pictures alone are scored by moments, which have no other clips as candidates
    assert (findings["shortcut"] is not None) == (findings["conflict"] is not None) == by_span
    assert findings["visemes"] is None  # nothing was evaluated
    assert 0 <= findings["knn"]["accuracy"] <= 1
    assert findings == json.loads((runs[task] / "evaluation" / "probe.json").read_text())
    if has_sound_score:
        assert findings["retrieval"]["clips"] == 9
        assert findings["offset"]["offsets"] == 17
        assert findings["offset"]["chance"] == pytest.approx(3 / 17)
    if task == "av-permutative":
        assert findings["conflict"]["groups"] == ["V>V", "V>A", "A>V", "V>M", "A>M", "M>V", "M>A", "M>M"]
        matrix = np.array(findings["conflict"]["cosines"])
        np.testing.assert_allclose(np.diag(matrix), 1, rtol=1e-5)
        np.testing.assert_allclose(matrix, matrix.T, rtol=1e-6)
        assert len(findings["shortcut"]["accuracy"]["own_clip"]) == 42


def test_shortcut_report_sees_who_speaks(runs: dict[str, Path], monkeypatch) -> None:
    """Embeddings that tell the speaker and nothing else: sure among strangers, at a loss among the same speaker."""
    trained = load_task(runs["av-permutative"], torch.device("cpu"), bf16=False)
    data = trained.config.data
    from avppc.data.packed.dataset import PackedDataset
    from avppc.evaluate.diagnose.task import shortcut_report

    dataset = PackedDataset(data, "test")
    dataset.speakers = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    noise = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    codes = 10 * torch.eye(16)[dataset.speakers] + 1e-5 * noise  # told apart within a speaker by rounding alone
    monkeypatch.setattr(type(trained.task), "represent", lambda self, batch, _: [codes] * 4)
    with torch.no_grad():
        trained.task.loss.score.weight.copy_(torch.eye(16).expand(42, -1, -1))
    report = shortcut_report(trained, dataset)
    assert report is not None
    names = report["subtasks"]
    ours = names.index("Vp->Af")
    assert report["mean_false_candidates_of_speaker"] == 2
    assert report["accuracy"]["same_speaker"][ours] <= 0.8
    # two of the eight others share the speaker: C(6, 2) / C(8, 2) of the draws have none of them
    assert report["accuracy"]["as_many_of_all"][ours] >= 15 / 28
    assert report["accuracy"]["own_clip"][ours] == 0.0  # past and future are the same here: a tie is a miss


def test_probing_leaves_the_run_as_it_was(runs: dict[str, Path]) -> None:
    run = runs["av-permutative"]
    files = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    trained = load_task(run, torch.device("cpu"), bf16=False)
    before = {name: value.clone() for name, value in trained.task.state_dict().items()}
    from avppc.data.packed.dataset import PackedDataset
    from avppc.evaluate.diagnose.task import gradient_conflict

    first, again = (gradient_conflict(trained, PackedDataset(trained.config.data, "train"), 2, 0) for _ in range(2))
    assert first == again
    assert all(torch.equal(value, before[name]) for name, value in trained.task.state_dict().items())
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == files


def test_words_that_look_alike_are_grouped() -> None:
    million, billion, spend = viseme_strings(["MILLION", "BILLION", "SPEND"])
    assert million == billion
    assert million[0] == "p"
    assert edit_distance(million, spend) >= 3
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3


def test_confusions_are_counted_by_distance() -> None:
    strings = [("p", "i:"), ("p", "i:"), ("t", "i:"), ("k", "oU", "s", "t")]
    counts = [[6, 3, 1, 0], [2, 8, 0, 0], [0, 0, 9, 1], [0, 0, 0, 10]]
    found = confusions_by_visemes(counts, strings)
    assert found["groups"] == [[0, 1]]
    by = found["by_distance"]
    assert by["0"]["share_of_errors"] == pytest.approx(5 / 7)
    assert by["0"]["share_of_pairs"] == pytest.approx(2 / 12)
    assert by["0"]["ratio"] == pytest.approx((5 / 7) / (2 / 12))
    assert by["1"]["share_of_errors"] == pytest.approx(1 / 7)
    assert by["4"]["share_of_errors"] == pytest.approx(1 / 7)
    assert by["2"]["ratio"] is None  # no pair lies so far apart
    assert sum(entry["share_of_pairs"] for entry in by.values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="must be a table of 3 words"):
        confusions_by_visemes(counts, strings[:3])


def test_command_line_prints_the_findings(runs: dict[str, Path], capsys) -> None:
    run = runs["av-permutative"]
    confusion = [[3, 0, 0], [1, 2, 0], [0, 0, 3]]
    settings = {"task": "av-permutative", "encoder_sha256": "0" * 64}
    draws = [{"seed": 0, "val_wcr": 0.9, "test_wcr": 0.9}]
    row = RowResult("frozen", 4, 0.9, 0.1, 1 / 3, {"head": "bins"}, [], draws, list(WORDS), 9, confusion, 1.0, settings)
    write_row(run, row)
    assert main(["diagnose", "--run", str(run), "--device", "cpu", "--threads", "1", "--conflict-batches", "1"]) == 0
    printed = capsys.readouterr().out
    for text in ("sound by picture, R@1", "own clip", "Cosines of the gradients", "Confusions, frozen-4"):
        assert text in printed
    for name in ("diagnose", "probe"):  # the latter is its former name
        assert main([name, "--run", str(run / "nothing")]) == 2
        assert capsys.readouterr().err.startswith(f"avppc: {run / 'nothing'} holds no run")


def test_run_without_checkpoint_and_bad_settings_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((runs["time-arrow"] / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint"):
        load_task(tmp_path, torch.device("cpu"), bf16=False)
    with pytest.raises(ValueError, match="measures must be one of"):
        DiagnoseConfig(tmp_path, measures=("speed",))
    with pytest.raises(ValueError, match="neighbours must be at least 1"):
        dataclasses.replace(DiagnoseConfig(tmp_path), neighbours=0)
