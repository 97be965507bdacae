"""Variation of pictures: what the draws do, by hand, eagerly and in one compiled pass."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from avppc.data import augment
from avppc.data.augment import augment_video, crop_video, draw_variations, vary
from avppc.data.config import AugmentConfig

ALL = AugmentConfig(
    gamma_range=0.3, contrast_range=0.3, brightness_range=0.2, pixel_noise=0.05, time_mask_frames=4, shift_pixels=3
)
NONE = AugmentConfig(shift_pixels=0, flip_probability=0.0)
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def make_video(count: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 6, 24, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_hand(video: np.ndarray, draws: augment.Variations, crop: int, out: int) -> np.ndarray:
    """Clip by clip, frame by frame, in float64; without noise."""
    result = np.empty((*video.shape[:2], out, out))
    for n in range(len(video)):
        top, left = int(draws.rows[n]), int(draws.columns[n])
        for t in range(video.shape[1]):
            picture = video[n, t, top : top + crop, left : left + crop] / 255
            if draws.flips[n]:
                picture = picture[:, ::-1]
            small = picture.reshape(out, crop // out, out, crop // out).mean((1, 3))
            small = np.maximum(small, 1e-3) ** float(draws.gamma[n])
            result[n, t] = (small - 0.5) * float(draws.contrast[n]) + 0.5 + float(draws.brightness[n])
        mean = result[n].mean(0)
        result[n, draws.masked[n].numpy()] = mean
    return result


@pytest.mark.parametrize("out", [20, 10])
def test_the_definition_is_what_it_says(out):
    video = make_video()
    config = replace(ALL, pixel_noise=0.0)
    draws = draw_variations(video.shape, 20, config, generator(), CPU)
    assert draws.flips.any()
    assert not draws.flips.all()
    assert draws.masked.any()
    expected = by_hand(video.numpy(), draws, 20, out)
    assert vary(video, draws, 20, out).numpy() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(augment_video(video, 20, out, config, generator()), vary(video, draws, 20, out))


def test_turned_off_it_is_the_middle_of_the_picture():
    video = make_video()
    assert torch.equal(augment_video(video, 20, 10, NONE, generator()), crop_video(video, 20, 10))


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch itself
@pytest.mark.parametrize("config", [ALL, AugmentConfig(shift_pixels=2)], ids=["all", "mild"])
def test_one_pass_equals_the_definition(config):
    for count, out in ((5, 20), (3, 10)):
        video = make_video(count)
        expected = augment_video(video, 20, out, config, generator(), backend="eager")
        found = augment_video(video, 20, out, config, generator(), backend="fused")
        assert found.shape == (count, 6, out, out)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("AVPPC_REQUIRE_GPU") != "1", reason="needs a CUDA device"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch itself
def test_devices_agree():
    video = make_video()
    expected = augment_video(video, 20, 10, ALL, generator())
    for backend in ("eager", "fused"):
        found = augment_video(video.cuda(), 20, 10, ALL, generator(), backend=backend)
        torch.testing.assert_close(found.cpu(), expected, atol=2e-5, rtol=1e-5)


class TestDraws:
    def test_same_seed_same_draws_other_seed_others(self):
        video = make_video(40)
        one, same, other = (augment_video(video, 20, 10, ALL, generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_each_clip_has_its_own(self):
        video = make_video(1).expand(50, -1, -1, -1)
        found = augment_video(video, 20, 10, ALL, generator())
        assert len({tuple(clip.flatten()[:20].tolist()) for clip in found}) == 50

    def test_frames_of_a_clip_share_the_light(self):
        video = make_video(8)[:, :1].expand(-1, 6, -1, -1)
        found = augment_video(video, 20, 10, replace(ALL, pixel_noise=0.0), generator())
        assert torch.allclose(found, found[:, :1].expand_as(found), atol=1e-6)

    def test_shifts_stay_within_the_picture(self):
        draws = draw_variations(torch.Size((500, 2, 24, 28)), 22, AugmentConfig(shift_pixels=9), generator(), CPU)
        assert (int(draws.rows.min()), int(draws.rows.max())) == (0, 2)
        assert (int(draws.columns.min()), int(draws.columns.max())) == (0, 6)
        with pytest.raises(ValueError, match="crop_pixels must be at most 24 for 24 x 28 video, got 26"):
            augment_video(make_video(), 26, 13, ALL, generator())
        with pytest.raises(ValueError, match="backend must be one of 'auto', 'eager', 'fused'; got 'cuda'"):
            augment_video(make_video(), 20, 10, ALL, generator(), backend="cuda")
