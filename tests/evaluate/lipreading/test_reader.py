"""The reader that an evaluation leaves: it reads as its row says."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import WORDS, tiny_config, write_tiny_set

import avppc.evaluate.lipreading.evaluate as lipreading
from avppc.config import EncoderConfig, EvaluateConfig
from avppc.data.config import CropSettings
from avppc.data.packed.dataset import PackedDataset
from avppc.evaluate.lipreading import fits
from avppc.evaluate.lipreading.heads import LipReader, ReaderInfo, load_reader, reader_path, save_reader
from avppc.evaluate.lipreading.results import read_rows
from avppc.models.encoder_file import load_encoder, save_encoder
from avppc.models.encoders import VideoEncoder
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
    with pytest.raises(
        FileNotFoundError, match=r"there is no reader in .*: avppc evaluate --run .* --labels-per-word 0"
    ):
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
