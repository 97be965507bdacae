"""A loader of clips that are still in their videos.

Decoders are imported when it is called, because `import avppc` must need torch alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from avppc.clip import CLIP_FRAMES

if TYPE_CHECKING:
    from avppc.data.on_the_fly.dali import DaliLoader
    from avppc.data.on_the_fly.videos import VideoClip
    from avppc.data.packed.loader import ClipLoader, EpochSampler
    from avppc.data.video.crop import Crop

_log = logging.getLogger(__name__)


def make_video_loader(
    clips: Sequence[VideoClip],
    sampler: EpochSampler,
    device: torch.device | str,
    *,
    num_frames: int = CLIP_FRAMES,
    crop: Crop | None = None,
) -> ClipLoader | DaliLoader:
    """An endless stream of batches of clips, decoded from their videos when they are asked for.

    The decoder is the best one for the first clip's video on the device: DALI where it can decode it there, else PyAV.
    The choice is logged.

    Args:
        clips: at least one; their videos should all be coded alike.
        sampler: the order of the clips; its num_clips is their number.
        device: where the batches are wanted; DALI decodes there.
        num_frames: length of each clip in frames of 1/25 s.
        crop: which part of each frame is kept, and its size; None: LRW's window of the mouth, or the middle square.

    Returns:
        An iterator over ClipBatch, and a context manager that ends its threads or processes.

    Raises:
        ValueError: there are no clips, or the sampler orders another number of them.
        DecodeError: the first clip's video cannot be read.
        ImportError: PyAV (`av`) is not installed.
    """
    from avppc.data.on_the_fly.dali import DaliLoader, choose_backend
    from avppc.data.on_the_fly.videos import VideoDataset
    from avppc.data.packed.loader import ClipLoader
    from avppc.data.video.inspect import inspect_video

    if not clips:
        raise ValueError("clips must hold at least one clip, got none")
    device = torch.device(device)
    choice = choose_backend(inspect_video(clips[0].path), device)
    _log.info("decoding with %s%s", choice.backend, f" ({choice.reason})" if choice.reason else "")
    if choice.backend == "dali":
        device_id = (device.index or 0) if device.type == "cuda" else None
        return DaliLoader(clips, sampler, device_id=device_id, num_frames=num_frames, crop=crop)
    dataset = VideoDataset(clips, num_frames=num_frames, crop=crop)
    return ClipLoader(dataset, sampler, device=device)  # type: ignore[arg-type]  # the same batch() and len
