"""Decodes the sound of a file with PyAV: 16 kHz, mono, int16, whatever the file holds."""

from __future__ import annotations

import os

import av
import numpy as np
from numpy.typing import NDArray

from avppc.data.sound_file import SOUND_FORMATS, missing_of_wave
from avppc.data.video.clock import AudioTimeline
from avppc.data.video.decode import DecodeError, damage_as_decode_error, open_media
from avppc.data.video.pictures_packets import decode_packet
from avppc.data.video.reader import choose_audio


def read_sound(path: str | os.PathLike[str]) -> NDArray[np.int16]:  # [S]
    """The samples of the file's default audio stream from its first one on, at 16 kHz; channels are mixed.

    Samples stand where their time stamps say; a hole between them is silence.

    Raises:
        DecodeError: not a sound or video file, damaged, or without sound.
    """
    with damage_as_decode_error(
        path, f"damaged, or neither sound nor video of a known format ({SOUND_FORMATS})"
    ) as name:
        with open(path, "rb") as file:  # the system's own word on what is missing or not allowed
            missing = missing_of_wave(file)
        samples = _decode(name)
        if missing > 0:
            raise DecodeError(name, f"truncated: {missing} bytes are missing")
        return samples


def _decode(name: str) -> NDArray[np.int16]:
    timeline = None
    with open_media(name, SOUND_FORMATS) as container:
        stream = choose_audio(container)
        if stream is None:
            raise DecodeError(name, "has no sound")
        for packet in container.demux(stream):
            for frame in decode_packet(packet):
                assert isinstance(frame, av.AudioFrame)
                if timeline is None:
                    if frame.pts is None or frame.time_base is None:
                        raise DecodeError(name, "the audio has frames without time stamps")
                    timeline = AudioTimeline(frame.pts * frame.time_base)
                timeline.push(frame)
    if timeline is None:
        raise DecodeError(name, "its audio stream is empty")
    timeline.finish()
    return timeline.take(0, timeline.end)[0]
