"""Any arguments for clips, their variation, their order and their loading: a right result or a refusal by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import REFUSED, anything, call, examples, laid_out, near
from hypothesis import given
from hypothesis import strategies as st
from packed_sets import write_packed

from avppc.clip import Clip, ClipBatch
from avppc.data.augment import augment_log_mel, augment_video, crop_video
from avppc.data.config import AugmentConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.data.packed.loader import ClipLoader, EpochSampler, iterate_once
from avppc.files import write_atomically
from avppc.tasks.base import cut_elements
from avppc.tasks.config import CutConfig

VIDEO = torch.randint(0, 256, (2, 5, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
AUDIO = torch.zeros(2, 5 * 640, dtype=torch.int16)
NUMBERS = torch.arange(2)
BATCH = ClipBatch(VIDEO, AUDIO, NUMBERS, NUMBERS, NUMBERS)
CUT = CutConfig(past_frames=2, gap_frames=1, future_frames=2)
STRONG = AugmentConfig(gamma_range=0.5, contrast_range=0.5, brightness_range=0.2, pixel_noise=0.1, time_mask_frames=9)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def valid() -> dict[Callable[..., Any], dict[str, Any]]:
    """Arguments that each function takes, the optional ones too."""
    pictures = {"video": VIDEO, "crop_pixels": 12, "out_pixels": 4}
    places = {"rows": torch.tensor([0, 4]), "columns": torch.tensor([8, 0]), "flips": torch.tensor([True, False])}
    numbers = {"labels": NUMBERS, "clip_ids": NUMBERS, "speakers": NUMBERS}
    order = {"seed": 0, "rank": 0, "world_size": 1, "speakers": NUMBERS, "speakers_per_batch": 1}
    return {
        Clip: {"video": VIDEO[0], "audio": AUDIO[0], "label": 1, "clip_id": 2, "speaker": 3},
        ClipBatch: {"video": VIDEO, "audio": AUDIO, **numbers},
        ClipBatch.stack: {"clips": [Clip(VIDEO[0], AUDIO[0])] * 2},
        BATCH.__getitem__: {"rows": torch.tensor([1, 0])},
        BATCH.to: {"device": "cpu"},
        crop_video: {**pictures, **places},
        augment_video: {**pictures, "config": STRONG, "generator": generator(), "backend": "auto"},
        augment_log_mel: {"log_mel": torch.zeros(2, 8, 5), "config": STRONG, "generator": generator()},
        cut_elements: {"batch": BATCH, "cut": CUT, "jitter_frames": 0, "generator": generator()},
        EpochSampler: {"num_clips": 2, "batch_size": 1, **order},
        EpochSampler(3, 1, seed=0).batch: {"epoch": 0, "number": 1},
        EpochSampler(3, 1, seed=0).load_state: {"state": {"epoch": 0, "batches_consumed": 1}},
    }


@pytest.mark.parametrize("number", range(len(valid())), ids=lambda n: [*valid()][n].__qualname__)
@examples(80)
@given(data=st.data())
def test_one_strange_argument_is_refused_by_name(number: int, data: st.DataObject) -> None:
    function, arguments = [*valid().items()][number]
    assert call(function, arguments) is not REFUSED
    name = data.draw(st.sampled_from(sorted(arguments)))
    several = st.lists(anything(), max_size=2) | st.dictionaries(
        st.sampled_from(["epoch", "batches_consumed"]), anything()
    )
    call(function, {**arguments, name: data.draw(near(arguments[name]) | several)})


@examples(60)
@given(st.data())
def test_crops_are_those_of_the_definition(data: st.DataObject) -> None:
    count, frames, height, width = (data.draw(st.integers(1, top)) for top in (3, 3, 12, 12))
    video = torch.randint(0, 256, (count, frames, height, width), dtype=torch.uint8, generator=generator())
    video = data.draw(laid_out(video))
    crop = data.draw(st.integers(1, min(height, width)))
    out = data.draw(st.sampled_from([side for side in range(1, crop + 1) if crop % side == 0]))
    top = data.draw(st.lists(st.integers(0, height - crop), min_size=count, max_size=count))
    left = data.draw(st.lists(st.integers(0, width - crop), min_size=count, max_size=count))
    flips = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    places = {"rows": torch.tensor(top), "columns": torch.tensor(left), "flips": torch.tensor(flips)}
    result = call(crop_video, {"video": video, "crop_pixels": crop, "out_pixels": out, **places})
    assert result.shape == (count, frames, out, out)
    for n in range(count):
        square = video[n, :, top[n] : top[n] + crop, left[n] : left[n] + crop].double() / 255
        square = square.flip(2) if flips[n] else square
        blocks = square.unflatten(2, (out, -1)).unflatten(1, (out, -1)).mean((2, 4))
        torch.testing.assert_close(result[n].double(), blocks, atol=1e-6, rtol=0)


@examples(60)
@given(st.data())
def test_variations_keep_shape_and_range(data: st.DataObject) -> None:
    crop = data.draw(st.integers(1, 16))
    sizes = {"shift_pixels": st.integers(0, 99), "time_mask_frames": st.integers(0, 9)}
    ranges = {"flip_probability": 1, "contrast_range": 1, "brightness_range": 1, "pixel_noise": 1, "gamma_range": 1e3}
    draws = {name: data.draw(st.floats(0, top) | st.sampled_from([0, top])) for name, top in ranges.items()}
    config = AugmentConfig(**draws, **{name: data.draw(sizes[name]) for name in sizes})
    arguments = {"video": VIDEO, "crop_pixels": crop, "out_pixels": crop, "config": config, "generator": generator()}
    luma = call(augment_video, arguments)
    assert luma.shape == (2, 5, crop, crop)
    assert luma.isfinite().all()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedDataset:
    return PackedDataset(write_packed(tmp_path_factory.mktemp("packed"), clips=7))


@examples(80)
@given(data=st.data())
def test_data_sets_refuse_strange_arguments_by_name(packed: PackedDataset, data: st.DataObject) -> None:
    arguments: dict[str, Any] = {"directory": packed.directory, "split": "train", "verify": True}
    name = data.draw(st.sampled_from(sorted(arguments)))
    result = call(PackedDataset, {**arguments, name: data.draw(anything())}, names=["data set"])
    if result is not REFUSED:
        assert len(result) == 7
    indices = data.draw(anything() | st.lists(st.integers(-1, 8)).map(torch.tensor))
    batch = call(packed.batch, {"indices": indices})
    if batch is not REFUSED:
        assert batch.clip_ids.tolist() == [1000 + index for index in indices.tolist()]


@examples(80)
@given(data=st.data())
def test_loaders_refuse_strange_arguments_by_name(packed: PackedDataset, data: st.DataObject) -> None:
    sampler = EpochSampler(7, 2, seed=0)
    arguments: dict[str, Any] = {"dataset": packed, "sampler": sampler, "device": "cpu", "prefetch": 1}
    name = data.draw(st.sampled_from(sorted(arguments)))
    value = data.draw(anything())
    loader = call(ClipLoader, {**arguments, name: value})
    if loader is not REFUSED:
        loader.close()
    arguments = {"dataset": packed, "batch_size": 2}
    name = data.draw(st.sampled_from(sorted(arguments)))
    call(lambda **given: list(iterate_once(**given)), {**arguments, name: value})


def test_a_path_that_is_none_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    for path in ("\ud800", "\0", b"x", os.fspath):
        assert call(PackedDataset, {"directory": path}) is REFUSED
    write_atomically(tmp_path / "file", b"")
    assert call(PackedDataset, {"directory": tmp_path / "file"}, names=["data set"]) is REFUSED
