"""Draws tied to clips: the same for a clip however the batch is cut, and distributed as they should be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from avppc.config import AugmentConfig
from avppc.data.augment import augment_log_mel, augment_video
from avppc.draws import ClipGenerator, integers, noise, uniform

CPU = torch.device("cpu")
CLIPS, ELEMENTS = 12, 2
EVERYTHING = AugmentConfig(
    gamma_range=0.5, contrast_range=0.3, brightness_range=0.2, pixel_noise=0.05, time_mask_frames=3
)


def by_clip(rows: Tensor, clips: int) -> Tensor:
    """[clips, ELEMENTS, ...] from one block of all clips after the other."""
    return rows.unflatten(0, (ELEMENTS, clips)).transpose(0, 1)


def augmented(first: int, count: int) -> tuple[Tensor, Tensor]:
    """What becomes of clips `first` to `first + count - 1` of the same batch."""
    g = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (ELEMENTS, CLIPS, 5, 24, 24), generator=g, dtype=torch.uint8)
    sounds = torch.randn(ELEMENTS, CLIPS, 20, 16, generator=g)
    own = slice(first, first + count)
    generator = ClipGenerator(7, first, count)
    video = augment_video(pictures[:, own].flatten(0, 1), 16, 8, EVERYTHING, generator)
    mel = augment_log_mel(sounds[:, own].flatten(0, 1), EVERYTHING, generator)
    return by_clip(video, count), by_clip(mel, count)


@pytest.mark.parametrize("parts", [2, 3, 4, 12])
def test_augmentation_is_the_same_however_the_batch_is_dealt_out(parts: int) -> None:
    whole = augmented(0, CLIPS)
    pieces = [augmented(first, CLIPS // parts) for first in range(0, CLIPS, CLIPS // parts)]
    for expected, got in zip(whole, zip(*pieces, strict=True), strict=True):
        assert torch.equal(torch.cat(got), expected)


def test_clips_elements_draws_and_seeds_have_numbers_of_their_own() -> None:
    generator = ClipGenerator(3, 0, 100)
    words = torch.cat(
        [
            uniform(200, 0.0, 1.0, generator, CPU),
            uniform(200, 0.0, 1.0, generator, CPU),
            uniform(200, 0.0, 1.0, ClipGenerator(4, 0, 100), CPU),
        ]
    )
    assert len(words.unique()) >= 599  # of 2^24: one pair may be alike by chance


def test_numbers_are_fixed_for_ever() -> None:
    """A change here would change every run that is resumed with a newer version."""
    generator = ClipGenerator(5, 10, 3)
    assert integers(6, 0, 999, generator, CPU).tolist() == [687, 97, 876, 877, 525, 84]
    assert integers(3, 0, 999, generator, CPU).tolist() == [409, 369, 428]


def test_uniform_and_integers_fill_their_range_evenly() -> None:
    count = 200_000
    generator = ClipGenerator(1, 0, count)
    values = uniform(count, -1.0, 3.0, generator, CPU)
    assert values.min() >= -1.0
    assert values.max() <= 3.0
    shares = torch.histc(values, 10, -1, 3) / count
    assert (shares - 0.1).abs().max() < 5 * (0.09 / count) ** 0.5  # five standard deviations
    counts = torch.bincount(integers(count, 2, 6, generator, CPU))
    assert counts[:2].tolist() == [0, 0]
    assert len(counts) == 7
    assert (counts[2:] / count - 0.2).abs().max() < 5 * (0.16 / count) ** 0.5


def test_noise_is_white() -> None:
    rows, size = 40, 5001  # odd: half a word is left over
    values = noise((rows, size), ClipGenerator(1, 0, rows), CPU)
    count = values.numel()
    assert values.mean().abs() < 5 / count**0.5
    assert abs(values.var() - 1) < 5 * (2 / count) ** 0.5
    for lag in (1, 2, 3, 4):
        assert (values[:, lag:] * values[:, :-lag]).mean().abs() < 5 / count**0.5
    correlation = torch.corrcoef(values).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / size**0.5


def test_plain_generator_gives_other_draws_each_time_and_repeats() -> None:
    first, second = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    draws = [uniform(5, 0.0, 1.0, first, CPU) for _ in range(2)]
    assert not torch.equal(*draws)
    assert torch.equal(uniform(5, 0.0, 1.0, second, CPU), draws[0])


def test_rows_that_are_no_blocks_of_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be a multiple of the generator's 4 clips, got 6"):
        uniform(6, 0.0, 1.0, ClipGenerator(0, 0, 4), CPU)
