"""Spans and crops of clips: the compiled operators give the definitions' bits, on every instruction set."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from avppc.ops import _library
from avppc.ops.clips import (
    crop_luma,
    crop_luma_reference,
    cut_spans,
    cut_spans_reference,
    local_motion_frames,
    local_motion_frames_reference,
    motion_frames,
    motion_frames_reference,
)

needs_cpp = pytest.mark.skipif(
    not _library.has_cpp_ops(), reason=f"compiled operators: {_library.missing_reason('cpp')}"
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@dataclass(frozen=True)
class Crops:
    """Arguments of crop_luma."""

    video: Tensor
    crop: int
    out: int
    rows: Tensor
    columns: Tensor
    flips: Tensor

    @classmethod
    def make(cls, crop: int, out: int, *, clips: int = 3, frames: int = 4, height: int = 70, width: int = 75) -> Crops:
        numbers = torch.Generator().manual_seed(crop * 1000 + out)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(0, high, shape, generator=numbers)

        video = draw(256, clips, frames, height, width).to(torch.uint8)
        places = draw(height - crop + 1, clips), draw(width - crop + 1, clips)
        return cls(video, crop, out, *places, torch.arange(clips) % 2 == 0)

    def arguments(self, video: Tensor | None = None) -> tuple[Tensor, int, int, Tensor, Tensor, Tensor]:
        return self.video if video is None else video, self.crop, self.out, self.rows, self.columns, self.flips


@needs_cpp
@pytest.mark.parametrize(("crop", "out"), [(1, 1), (7, 7), (70, 70), (64, 32), (34, 17), (66, 22), (64, 4), (70, 1)])
def test_crops_have_the_bits_of_the_definition(level: str, crop: int, out: int) -> None:
    crops = Crops.make(crop, out)
    assert torch.equal(crop_luma(*crops.arguments()), crop_luma_reference(*crops.arguments()))


def test_the_definition_of_crops_is_what_it_says() -> None:
    crops = Crops.make(66, 22)
    pixels = crops.video.numpy().astype(np.float64) / 255
    found = crop_luma_reference(*crops.arguments())
    for n, (row, column, flip) in enumerate(zip(crops.rows, crops.columns, crops.flips, strict=True)):
        square = pixels[n, :, row : row + 66, column : column + 66]
        square = square[:, :, ::-1] if flip else square
        expected = square.reshape(-1, 22, 3, 22, 3).mean((2, 4))
        assert found[n].numpy() == pytest.approx(expected, abs=1e-7)
    white = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    zero = torch.zeros(1, dtype=torch.int64)
    for function in (crop_luma, crop_luma_reference):
        assert function(white, 8, 2, zero, zero, zero.bool()).eq(1.0).all()


@needs_cpp
def test_pictures_may_lie_anyhow() -> None:
    crops = Crops.make(16, 8, frames=6)
    every_other = crops.video[:, ::2]
    turned = crops.video.transpose(2, 3).contiguous().transpose(2, 3)  # rows with gaps
    shared = crops.video[:1].expand(3, -1, -1, -1)
    for video in (every_other, turned, shared, crops.video[:, :, 3:67, 5:70]):
        here = Crops(video, 16, 8, crops.rows.clamp(max=40), crops.columns.clamp(max=40), crops.flips)
        expected = crop_luma_reference(*here.arguments(video.contiguous()))
        assert torch.equal(crop_luma(*here.arguments()), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.bool], ids=str)
def test_spans_are_those_of_a_loop(dtype: torch.dtype) -> None:
    clips = (torch.arange(3 * 9 * 5 * 2).reshape(3, 9, 5, 2) % 251).to(dtype)
    starts = torch.tensor([0, 5, 2, 1, 0, 5])
    expected = torch.stack([clips[n % 3, start : start + 4] for n, start in enumerate(starts.tolist())])
    assert torch.equal(cut_spans(clips, starts, 4), expected)
    assert torch.equal(cut_spans_reference(clips, starts, 4), expected)
    assert torch.equal(cut_spans(clips, starts.repeat_interleave(2)[::2], 4), expected)
    gaps = clips[:, ::2]
    expected = torch.stack([gaps[n, start : start + 4] for n, start in enumerate((1, 0, 1))])
    assert torch.equal(cut_spans(gaps, torch.tensor([1, 0, 1]), 4), expected)


@needs_cpp
@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.randoms())
def test_spans_of_any_shape(clips: int, steps: int, rounds: int, width: int, random) -> None:
    values = torch.arange(clips * steps * width).reshape(clips, steps, width)
    length = random.randint(1, steps)
    starts = torch.tensor([random.randint(0, steps - length) for _ in range(rounds * clips)])
    assert torch.equal(cut_spans(values, starts, length), cut_spans_reference(values, starts, length))


MOTIONS = {
    "clip": (motion_frames, motion_frames_reference),
    "local": (partial(local_motion_frames, reach=3), partial(local_motion_frames_reference, reach=3)),
    "whole clip": (partial(local_motion_frames, reach=99), partial(local_motion_frames_reference, reach=99)),
}
"""Operators and their definitions."""


@needs_cpp
@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize(("stride", "phase"), [(1, 0), (2, 0), (2, 1), (5, 4), (9, 2)])
@pytest.mark.parametrize("shape", [(3, 7, 8, 8), (2, 1, 5, 7), (1, 12, 32, 32), (4, 5, 1, 1), (2, 6, 3, 11)], ids=str)
def test_motion_is_as_good_as_torchs(level: str, motion: str, shape: tuple[int, ...], stride: int, phase: int) -> None:
    function, reference = MOTIONS[motion]
    video = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    phase = min(phase, shape[1] - 1)
    truth = reference(video.double(), stride=stride, phase=phase)
    plain, found = (way(video, stride=stride, phase=phase) for way in (reference, function))
    assert found.shape == plain.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    error, allowed = ((x - truth).abs().max().item() for x in (found, plain))
    assert error <= 2 * allowed + 1e-6


@needs_cpp
def test_local_motion_by_hand() -> None:
    """Pixels 0 and 1 of four frames; around the second frame there are three of them, around the first two."""
    video = torch.tensor([[0.0, 4.0], [1.0, 3.0], [5.0, 5.0], [9.0, 1.0]]).view(1, 4, 1, 2)
    found = local_motion_frames(video, reach=1)[:, :, 0]
    first, second = torch.tensor([0.5, 3.5]), torch.tensor([2.0, 4.0])  # mean frames
    expected = torch.stack([torch.tensor([0.0, 4.0]) - first, torch.tensor([0.0, 4.0]) - first]) * 4 / (2 + 0.02)
    torch.testing.assert_close(found[0, :2], expected)
    torch.testing.assert_close(found[0, 3], torch.tensor([-2.0, 2.0]) / (2 + 1e-3))
    expected = (video[0, :3, 0] - second) * 4 / (1 + 0.02)
    torch.testing.assert_close(found[1, :3], expected)
    torch.testing.assert_close(found[1, 3], torch.tensor([-1.0, 1.0]) / (1 + 1e-3))


@needs_cpp
def test_local_motion_sees_no_further_than_its_reach() -> None:
    video = torch.rand(1, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    changed = video.clone()
    changed[:, 6:] = 0
    same = [
        torch.equal(*pair) for pair in zip(local_motion_frames(video, 3), local_motion_frames(changed, 3), strict=True)
    ]
    assert same == [True] * 3 + [False] * 9


@needs_cpp
def test_motion_of_what_stands_still_and_of_nan() -> None:
    still = torch.full((2, 4, 6, 6), 0.25)
    assert motion_frames(still).eq(0).all()
    assert local_motion_frames(still, 2).eq(0).all()
    still[1, 2, 3, 3] = torch.nan
    found = motion_frames(still).unflatten(0, (2, 4))
    assert found[0].eq(0).all()
    assert found[1, :, :3].isnan().all()
    assert found[1, :, 3].isnan().flatten(1).all(1).tolist() == [False, False, True, False]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch.func, about torch itself
@pytest.mark.parametrize("motion", MOTIONS)
def test_motion_has_a_gradient_and_can_be_traced(motion: str) -> None:
    motion_frames, _ = MOTIONS[motion]
    video = torch.rand(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(motion_frames, video)
    plain = video.detach().float()
    _, tangent = torch.func.jvp(motion_frames, (plain,), (torch.ones_like(plain),))
    assert tangent[:, :3].abs().max() < 1e-5
    wanted = plain.clone().requires_grad_()
    motion_frames(wanted).square().sum().backward()
    assert wanted.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(motion_frames(wanted), motion_frames(plain), rtol=0, atol=0)


@needs_cpp
@pytest.mark.parametrize(
    ("shape", "stride", "phase", "text"),
    [
        ((2, 3, 4), 1, 0, "video must have 4 dimensions"),
        ((2, 0, 4, 4), 1, 0, "video must not be empty"),
        ((2, 3, 4, 4), 0, 0, "stride must be at least 1, got 0"),
        ((2, 3, 4, 4), 1, 3, "phase must be from 0 to 2, got 3"),
        ((2, 3, 4, 4), 1, -1, "phase must be from 0 to 2, got -1"),
    ],
)
def test_the_motion_operator_looks_before_it_reads(shape: tuple[int, ...], stride: int, phase: int, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        torch.ops.avppc.motion_frames(torch.zeros(shape), stride, phase)
    with pytest.raises(RuntimeError, match=text):
        torch.ops.avppc.local_motion_frames(torch.zeros(shape), 3, stride, phase)
    with pytest.raises(RuntimeError, match="reach must be at least 1, got 0"):
        torch.ops.avppc.local_motion_frames(torch.zeros(shape), 0, stride, phase)


@needs_cpp
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rows": torch.tensor([0, 7, 0])}, "rows must be from 0 to 6, got 7"),
        ({"columns": torch.tensor([0, -1, 0])}, "columns must be from 0 to 11, got -1"),
        ({"rows": torch.tensor([0, 0])}, r"rows must have shape \[3\]"),
        ({"flips": torch.zeros(2, dtype=torch.bool)}, r"flips must have shape \[3\]"),
        ({"flips": torch.zeros(3)}, "flips must be Bool"),
        ({"crop": 65}, "side must divide crop = 65, got 32"),
        ({"crop": 71}, "crop must be from 1 to 70, got 71"),
        ({"out": 0}, "side must divide crop = 64, got 0"),
        ({"video": torch.zeros(3, 4, 70, 75)}, "video must be Byte"),
        ({"video": torch.zeros(3, 70, 75, dtype=torch.uint8)}, "video must have 4 dimensions"),
    ],
)
def test_the_crop_operator_looks_before_it_reads(change: dict[str, object], text: str) -> None:
    crops = Crops.make(64, 32)
    a = {"video": crops.video, "rows": crops.rows, "columns": crops.columns, "flips": crops.flips} | change
    with pytest.raises(RuntimeError, match=text):
        torch.ops.avppc.crop_luma(a["video"], a["rows"], a["columns"], a["flips"], a.get("crop", 64), a.get("out", 32))


@needs_cpp
@pytest.mark.parametrize(
    ("starts", "length", "text"),
    [
        ([0, 6], 4, "starts must be from 0 to 5, got 6"),
        ([0, -1], 4, "starts must be from 0 to 5, got -1"),
        ([0, 0, 0], 4, "starts must be 2 or a multiple, got 3"),
        ([0, 0], 10, "length must be from 1 to 9, got 10"),
        ([0, 0], 0, "length must be from 1 to 9, got 0"),
    ],
)
def test_the_span_operator_looks_before_it_reads(starts: list[int], length: int, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        cut_spans(torch.zeros(2, 9, 3), torch.tensor(starts), length)


@needs_cpp
def test_opcheck() -> None:
    crops = Crops.make(16, 8)
    places = crops.rows, crops.columns, crops.flips
    torch.library.opcheck(torch.ops.avppc.crop_luma, (crops.video, *places, 16, 8))
    torch.library.opcheck(torch.ops.avppc.motion_frames, (torch.rand(2, 5, 4, 4), 2, 1))
    torch.library.opcheck(torch.ops.avppc.local_motion_frames, (torch.rand(2, 5, 4, 4), 3, 2, 1))
    torch.library.opcheck(torch.ops.avppc.cut_spans, (crops.video, torch.tensor([0, 2, 1, 1, 1, 0]), 2))


@needs_cuda
def test_a_gpu_gives_the_same_bits() -> None:
    crops = Crops.make(64, 32)
    arguments = [value.cuda() if isinstance(value, Tensor) else value for value in crops.arguments()]
    assert torch.equal(crop_luma(*arguments).cpu(), crop_luma(*crops.arguments()))
    starts = torch.tensor([0, 2, 1, 1, 1, 0])
    assert torch.equal(cut_spans(crops.video.cuda(), starts, 2).cpu(), cut_spans(crops.video, starts, 2))
