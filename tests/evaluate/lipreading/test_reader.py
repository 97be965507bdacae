"""The reader that an evaluation leaves: it reads as its row says; and from likeliest words to those that are said."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import WORDS, tiny_config, write_tiny_set

import avppc.evaluate.lipreading.evaluate as lipreading
from avppc.config import EncoderConfig, EvaluateConfig
from avppc.data.config import CropSettings
from avppc.data.packed.dataset import PackedDataset
from avppc.evaluate.lipreading import fits
from avppc.evaluate.lipreading.reader import (
    LipReader,
    ReaderInfo,
    SpokenWord,
    compare,
    find_words,
    load_reader,
    reader_path,
    save_reader,
)
from avppc.evaluate.lipreading.results import read_rows
from avppc.models.encoder_file import load_encoder, save_encoder
from avppc.models.video import VideoEncoder
from avppc.settings import write_checked_json
from avppc.train.loop import pretrain


def quick_config(run: Path, **changes: object) -> EvaluateConfig:
    few = {"labels_per_word": 4, "draws": 2, "training_draws": 2, "heads": ("bins", "gru"), "head_hidden": 8}
    rates = {"head_learning_rates": (1e-2,), "finetune_learning_rates": (3e-3,)}
    short = {"epochs": 8, "training_epochs": 4, "selection_epochs": 2, "batch_size": 6}
    return EvaluateConfig(run, **{**few, **rates, **short, "threads": 1, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with readers of its frozen and its fine-tuned encoder, the first trained by two processes."""
    folder = tmp_path_factory.mktemp("read")
    data = write_tiny_set(folder / "packed")
    write_checked_json(data / "prepare.json", {"crop": "window", "crop_rows": [8, 104], "crop_columns": [16, 112]})
    pretrain(tiny_config(data, folder / "run", steps=4))
    lipreading.evaluate(quick_config(folder / "run", rows=("random", "frozen"), workers=2), show=False)
    lipreading.evaluate(quick_config(folder / "run", rows=("finetuned",), workers=1), show=False)
    return folder / "run"


def share_right(reader: LipReader, data: Path, split: str) -> float:
    with PackedDataset(data, split) as dataset:
        batch = dataset.batch(torch.arange(len(dataset)))
        return float((reader.read(batch.video).argmax(1) == batch.labels).float().mean())


@pytest.mark.parametrize("row", ["frozen", "finetuned"])
def test_a_reader_reads_as_the_best_draw_of_its_row(measured: Path, row: str) -> None:
    reader = load_reader(reader_path(measured, row, 4))
    (result,) = [found for found in read_rows(measured) if found.row == row]
    best = max(result.draws, key=lambda draw: draw["val_wcr"])
    info = reader.info
    assert (info.row, info.words, info.frames, info.labels_per_word) == (row, WORDS, 29, 4)
    assert (info.seed, info.val_wcr, info.test_wcr) == (best["seed"], best["val_wcr"], best["test_wcr"])
    assert (info.head, info.settings) == (result.chosen["head"], result.settings)
    assert info.crop == CropSettings(crop="window", crop_rows=(8, 104), crop_columns=(16, 112))
    for split, rate in (("val", info.val_wcr), ("test", info.test_wcr)):
        assert share_right(reader, measured.parent / "packed", split) == pytest.approx(rate)
    own = load_encoder(measured).state_dict()
    same = all(torch.equal(value, own[name]) for name, value in reader.encoder.state_dict().items())
    assert same == (row == "frozen")


def test_the_best_reader_of_a_run_is_taken(measured: Path, tmp_path: Path) -> None:
    rates = {row: load_reader(reader_path(measured, row, 4)).info.val_wcr for row in ("frozen", "finetuned")}
    assert load_reader(measured).info.val_wcr == max(rates.values())
    shutil.copytree(measured, tmp_path / "run")
    reader = load_reader(reader_path(measured, "frozen", 4))
    better = replace(reader.info, labels_per_word=0, val_wcr=1.0)
    save_reader(better, reader.state_dict(), reader_path(tmp_path / "run", "frozen", 0))
    assert load_reader(tmp_path / "run").info.labels_per_word == 0
    # one of another encoder is left out, however well it reads
    other = replace(better, settings={**better.settings, "encoder_sha256": "0" * 64})
    save_reader(other, reader.state_dict(), reader_path(tmp_path / "run", "frozen", 0))
    assert load_reader(tmp_path / "run").info.labels_per_word == 4
    save_encoder(VideoEncoder(reader.info.encoder), tmp_path / "run" / "encoder.safetensors")
    with pytest.raises(ValueError, match="has no reader of its encoder, only of one from before"):
        load_reader(tmp_path / "run")


@pytest.mark.parametrize("row", ["frozen", "finetuned"])
def test_a_reader_that_is_missing_takes_one_fit(measured: Path, tmp_path: Path, monkeypatch, row: str) -> None:
    """As after an evaluation by an earlier version; the row stays as it was measured."""
    shutil.copytree(measured, tmp_path / "run")
    path = reader_path(tmp_path / "run", row, 4)
    before, measured_row = path.read_bytes(), (tmp_path / "run" / "evaluation" / f"{row}-4.json").read_bytes()
    path.write_bytes(before[: len(before) // 2])
    done = []
    train_fit = fits.train_fit
    monkeypatch.setattr(lipreading, "train_fit", lambda *given: done.append(given[1]) or train_fit(*given))
    for fitted in (1, 1):  # and then nothing is missing
        lipreading.evaluate(quick_config(tmp_path / "run", rows=(row,), workers=1), show=False)
        assert len(done) == fitted
    assert path.read_bytes() == before
    assert (tmp_path / "run" / "evaluation" / f"{row}-4.json").read_bytes() == measured_row
    path.unlink()
    lipreading.evaluate(quick_config(tmp_path / "run", rows=(row,), workers=1), show=False, keep_readers=False)
    assert not path.exists()


def test_rows_of_other_encoders_leave_none(measured: Path) -> None:
    assert {path.name for path in (measured / "evaluation").glob("reader-*")} == {
        "reader-frozen-4.safetensors",
        "reader-finetuned-4.safetensors",
    }


def test_what_is_no_reader_is_refused_by_its_name(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no reader at .*none\.safetensors"):
        load_reader(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no reader: avppc evaluate --run .* --labels-per-word 0"):
        load_reader(tmp_path)
    with pytest.raises(ValueError, match=r"encoder\.safetensors is not an avppc reader of version 1"):
        load_reader(measured / "encoder.safetensors")
    content = bytearray(reader_path(measured, "frozen", 4).read_bytes())
    content[-5] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.safetensors is damaged: the checksum"):
        load_reader(tmp_path / "flipped.safetensors")
    info = load_reader(reader_path(measured, "frozen", 4)).info
    with pytest.raises(ValueError, match="words must hold texts, two at least"):
        replace(info, words=("one",))
    with pytest.raises(ValueError, match="row must be one of 'frozen', 'finetuned'; got 'random'"):
        replace(info, row="random")


def test_features_are_standardised_before_the_head() -> None:
    encoder = EncoderConfig(width=4, features=8, crop_pixels=16, input_pixels=16)
    settings = {"task": "av-permutative", "encoder_sha256": "0" * 64}
    info = ReaderInfo(encoder, ("A", "B"), 5, "bins", 8, 1, "frozen", 1, 0, 0.5, 0.5, CropSettings(), settings)
    reader = LipReader(info).eval()
    reader.mean.copy_(torch.linspace(-1, 1, 8))
    reader.deviation.copy_(torch.linspace(0.5, 2, 8))
    video = torch.rand(3, 5, 16, 16)
    expected = reader.head((reader.encoder(video) - reader.mean) / reader.deviation)
    torch.testing.assert_close(reader(video), expected)


def moments(rows: list[dict[int, float]], words: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds, numbers and probabilities of moments that give some words."""
    table = np.full((len(rows), words), 0.01, np.float32)
    for line, row in zip(table, rows, strict=True):
        for word, share in row.items():
            line[word] = share
    order = np.argsort(-table, 1)[:, :3].astype(np.int32)
    return (np.arange(len(rows)) + 14.5) / 25, order, np.take_along_axis(table, order, 1)


NAMES = ("bin", "blue", "at", "now")


def test_words_are_found_where_they_are_likeliest() -> None:
    rows = [{0: 0.9}] * 6 + [{0: 0.5, 1: 0.4}] + [{1: 0.8}] * 4 + [{2: 0.9}] + [{1: 0.8}] * 4 + [{3: 0.7}] * 5
    found = find_words(*moments(rows), NAMES)
    assert [item.word for item in found] == ["bin", "blue", "now"]  # one moment of "at" is not worth two changes
    assert found[0].start_seconds == pytest.approx(14 / 25)
    assert found[1].start_seconds == pytest.approx(found[0].end_seconds)
    assert found[2].probability == pytest.approx(0.7)
    assert found[1].start_seconds <= found[1].seconds <= found[1].end_seconds


def test_a_word_that_is_never_probable_is_left_out() -> None:
    rows = [{0: 0.9}] * 6 + [{3: 0.2}] * 9 + [{1: 0.9}] * 6
    assert [item.word for item in find_words(*moments(rows), NAMES)] == ["bin", "blue"]
    assert find_words(*(array[:0] for array in moments(rows)), NAMES) == []


def test_nothing_is_said_across_a_gap() -> None:
    seconds, numbers, probabilities = moments([{0: 0.9}] * 12)
    seconds[6:] += 3.0
    first, second = find_words(seconds, numbers, probabilities, NAMES)
    assert (first.word, second.word) == ("bin", "bin")
    assert first.end_seconds < second.start_seconds - 2.9


def test_the_path_is_the_best_of_all() -> None:
    """Against all rows of words that there are."""
    generator = np.random.default_rng(0)
    for _ in range(5):
        table = generator.dirichlet([0.4] * 3, 6).astype(np.float32)
        order = np.argsort(-table, 1).astype(np.int32)
        found = find_words(np.arange(6) / 25, order, np.take_along_axis(table, order, 1), NAMES[:3])
        paths = np.stack(np.meshgrid(*[np.arange(3)] * 6, indexing="ij"), -1).reshape(-1, 6)
        gains = np.log(table + 1e-3)[np.arange(6), paths].sum(1) - 5.0 * (np.diff(paths) != 0).sum(1)
        best = paths[gains.argmax()]
        changes = [best[0], *(word for before, word in itertools.pairwise(best) if word != before)]
        likely = [NAMES[word] for word in changes]
        assert [item.word for item in found] == [word for word in likely if word in {item.word for item in found}]


def test_words_that_are_said_are_compared_with_those_that_were_read() -> None:
    seconds, likeliest = np.arange(10) / 10, np.array([0, 0, 0, 1, 1, 1, 3, 3, 3, 3], np.int32)
    found = [SpokenWord("bin", 0.0, 0.3, 0.1, 0.9), SpokenWord("now", 0.6, 1.0, 0.8, 0.9)]
    truth = [("BIN", 0.0, 0.2), ("bin", 0.2, 0.3), ("blue", 0.3, 0.5), ("now", 0.45, 0.55), ("ship", 3.0, 4.0)]
    compared = compare(truth, found, seconds, likeliest, NAMES)
    assert [item.found for item in compared] == [True, False, False, False, False]  # each word is read once
    assert [item.at_middle for item in compared] == ["bin", "bin", "blue", "blue", ""]
    assert [item.right_at_middle for item in compared] == [True, True, True, False, False]
    assert [item.known for item in compared] == [True, True, True, True, False]
