"""Stored pixels are in video's range; grey pixels from elsewhere are brought into it."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from make_videos import write_video

from avppc.data.augment import grey_to_luma
from avppc.data.video.decode import decode_clip

GREY = torch.arange(256, dtype=torch.uint8)


def test_black_and_white():
    luma = grey_to_luma(GREY)
    assert luma.dtype == torch.uint8
    assert (luma[0], luma[-1]) == (16, 235)
    full = (luma.double() - 16) * 255 / 219  # the formula of the pages
    assert (full - GREY).abs().max() <= 0.5 * 255 / 219
    for dtype in (torch.float32, torch.float64, torch.float16):
        found = grey_to_luma(GREY.to(dtype) / 255)
        assert found.dtype == dtype
        assert (255 * found.double() - luma).abs().max() <= 0.51 + (0.1 if dtype is torch.float16 else 0)


def test_it_is_what_decoding_gives(tmp_path):
    """A grey picture as any program makes a video of it: RGB, converted by swscale."""

    def picture(number, height, width, seed):
        rgb = np.tile(np.arange(width, dtype=np.uint8)[None, :, None], (height, 1, 3))
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p")
        return frame.to_ndarray()[:height, :width]

    options = {"preset": "ultrafast", "qp": "0"}
    video = decode_clip(write_video(tmp_path / "a.mp4", size=(96, 256), pattern=picture, options=options)).video
    expected = grey_to_luma(torch.arange(80, 176, dtype=torch.uint8)).expand_as(video)
    assert (video.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("grey", [torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool), [0, 1]], ids=str)
def test_other_kinds_are_refused(grey):
    with pytest.raises(TypeError, match="grey must be"):
        grey_to_luma(grey)
