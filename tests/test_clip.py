from __future__ import annotations

import pytest
import torch

from avppc.clip import Clip, ClipBatch


def make_clip(**changes) -> Clip:
    values = {"video": torch.zeros(2, 4, 4, dtype=torch.uint8), "audio": torch.zeros(1280, dtype=torch.int16)}
    return Clip(**values | changes)


@pytest.mark.parametrize("name", ["label", "clip_id", "speaker"])
@pytest.mark.parametrize("value", [1.0, True, "3", None, torch.tensor(3)], ids=lambda value: type(value).__name__)
def test_numbers_of_a_clip_are_integers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an int, got {type(value).__name__}"):
        make_clip(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": -2}, "label must be at least 0, or -1 where it is not known; got -2"),
        ({"speaker": -5}, "speaker must be at least 0"),
        ({"clip_id": 1 << 63}, "clip_id must be from -9223372036854775808 to 9223372036854775807"),
        ({"audio": torch.zeros(1279, dtype=torch.int16)}, "2 frames need 1280 samples, got 1279"),
        ({"video": torch.zeros(0, 4, 4, dtype=torch.uint8)}, "at least 1 frame"),
    ],
)
def test_impossible_clips(changes, message):
    with pytest.raises(ValueError, match=message):
        make_clip(**changes)


def test_numbers_reach_the_batch():
    batch = ClipBatch.stack([make_clip(label=3, clip_id=(1 << 63) - 1), make_clip(speaker=7)])
    assert batch.labels.tolist() == [3, -1]
    assert batch.clip_ids.tolist() == [(1 << 63) - 1, 0]
    assert batch.speakers.tolist() == [-1, 7]
    assert batch.labels.dtype == torch.int64
