"""Data that lip reading cannot be tested on, and rates of few draws."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import tiny_config

from avppc.cli import main
from avppc.data.packed.index import SHARD_FOLDER, PackedIndex
from avppc.data.packed.shard import ClipShape, ShardWriter
from avppc.evaluate.lipreading.fits import check_words, draw_labelled_clips
from avppc.evaluate.lipreading.results import limited, mean_and_interval
from avppc.models.encoder_file import save_encoder
from avppc.models.encoders import VideoEncoder
from avppc.settings import config_to_dict, write_checked_json

SHAPE = ClipShape(29, 96, 96)


def write_set(directory: Path, words: tuple[str, ...], splits: tuple[str, ...]) -> Path:
    (directory / SHARD_FOLDER).mkdir(parents=True)
    records = {}
    for split in splits:
        writer = ShardWriter(SHAPE, 8)
        for number in range(4):
            video, audio = np.zeros((29, 96, 96), np.uint8), np.zeros(SHAPE.samples, np.int16)
            label = number % len(words) if words else -1
            source = f"{split}/{number}.mp4"
            writer.add(source, video=video, audio=audio, label=label, clip_id=number, speaker=-1)
        records[split] = (writer.write(directory / SHARD_FOLDER / f"{split}-00000-00.safetensors"),)
    PackedIndex(SHAPE, words, records).write(directory)
    return directory


@pytest.mark.parametrize(
    ("words", "splits", "message"),
    [
        ((), ("train",), "has no labels: .*folders VIDEOS/WORD/{train,val,test}.*`avppc diagnose`"),
        (("ABOUT",), ("train", "val", "test"), "has one word only, ABOUT: there is nothing to tell apart"),
        (("ABOUT", "HOUSE"), ("train",), "split 'val' of .* has no clips; available: 'train'; .*VIDEOS/WORD/val"),
    ],
    ids=["unlabelled", "one-word", "no-val"],
)
def test_what_lacks_is_told_with_what_to_do(tmp_path, capsys, words, splits, message):
    config = tiny_config(write_set(tmp_path / "set", words, splits), tmp_path / "run", steps=1)
    config.out.mkdir()
    write_checked_json(config.out / "config.json", config_to_dict(config))
    save_encoder(VideoEncoder(config.encoder), config.out / "encoder.safetensors")
    assert main(["evaluate", "--run", str(config.out), "--rows", "frozen", "--labels-per-word", "2"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error


def test_words_without_training_clips():
    check_words("set", ("A", "B"))
    with pytest.raises(ValueError, match="clips of one word only, B: 2 are needed"):
        draw_labelled_clips(torch.tensor([1, 1, -1]), 1, 0, ("A", "B"))


def test_no_interval_is_longer_than_the_scale():
    """Two draws far apart: Student's factor of one degree of freedom is 12.7."""
    mean, half = mean_and_interval([0.2, 0.58], 100)
    assert mean == pytest.approx(0.39)
    assert half == pytest.approx(0.61)
    assert limited(0.9, 0.05) == 0.05
