"""A small data set, made once, and a decoder that knows nothing of how it was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from avppc.synth.config import SynthConfig
from avppc.synth.dataset import execute


class Decoded(NamedTuple):
    """What a player shows and sounds between 0 s and the end of the last frame."""

    frames: NDArray[np.uint8]  # [T, 256, 256, 3]
    frame_seconds: list[float]
    audio: NDArray[np.float32]  # [S]
    rate_hz: int
    codecs: tuple[str, str]


def decode(path: Path) -> Decoded:
    with av.open(path) as container:
        video = container.streams.video[0]
        codecs = (video.codec_context.name, container.streams.audio[0].codec_context.name)
        pictures = list(container.decode(video=0))
        frames = np.stack([picture.to_ndarray(format="bgr24") for picture in pictures])
        seconds = [float(picture.pts * picture.time_base) for picture in pictures]
        end = seconds[-1] + 1 / float(video.average_rate)
    with av.open(path) as container:
        rate = container.streams.audio[0].rate
        samples = np.zeros(0, np.float32)
        times = np.zeros(0)
        for frame in container.decode(audio=0):
            block = frame.to_ndarray()[0]
            times = np.concatenate([times, float(frame.pts * frame.time_base) + np.arange(len(block)) / rate])
            samples = np.concatenate([samples, block])
    inside = (times > -0.5 / rate) & (times < end - 0.5 / rate)
    return Decoded(frames, seconds, samples[inside], rate, codecs)


@pytest.fixture(scope="session")
def decode_clip() -> Callable[[Path], Decoded]:
    return decode


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> SynthConfig:
    """Ten words, 42 clips."""
    return SynthConfig(
        tmp_path_factory.mktemp("talking_mouths") / "set",
        words=10,
        clips_per_word=2,
        val_clips_per_word=1,
        test_clips_per_word=1,
        extra_clips=2,
        workers=2,
        train_speakers=8,
        val_speakers=4,
        test_speakers=5,
    )


@pytest.fixture(scope="session")
def small_set(small_config: SynthConfig) -> Path:
    assert execute(small_config) == 0
    return small_config.out
