"""Time stamps of pictures, in containers that have none of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from blob_faces import BlobFinder, write_face_video
from make_videos import click_seconds, flash_frame, write_video

from avppc.data.video.crop import Crop
from avppc.data.video.decode import decode_clip, decode_clips
from avppc.data.video.inspect import inspect_video
from avppc.data.video.picked import read_sound_and_frames
from avppc.data.video.pictures import PictureDecoder
from avppc.data.video.track import track_mouth

TOGETHER = {"flashes": (0.6,), "clicks": (0.6,)}
PCM = {"audio_codec": "pcm_s16le", "size": (64, 64)}
CODECS = {
    "h264": {"options": {"preset": "ultrafast", "tune": "zerolatency"}},
    "h264-b-frames": {"options": {"bf": "2", "preset": "medium"}},
    "mpeg4": {"video_codec": "mpeg4", "options": {"b": "4M"}},
    "mpeg4-b-frames": {"video_codec": "mpeg4", "options": {"b": "4M", "bf": "2"}},
}


def numbered(number: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture that shows its number."""
    return np.full((height, width), 20 + 4 * number, np.uint8)


class TestAvi:
    @pytest.mark.parametrize("codec", CODECS)
    def test_picture_and_sound_stay_together(self, tmp_path, codec):
        path = write_video(tmp_path / "v.avi", **TOGETHER, **PCM, **CODECS[codec])
        clip = decode_clip(path)
        assert flash_frame(clip.video.numpy()) == 15
        assert click_seconds(clip.audio.numpy()) == pytest.approx(0.6, abs=0.001)
        assert clip.notes == ()
        facts = inspect_video(path)
        assert (facts.video_start_seconds, facts.frames, facts.notes, facts.problems) == (0.0, 29, [], [])

    @pytest.mark.parametrize("codec", CODECS)
    def test_no_picture_is_lost_or_moved(self, tmp_path, codec):
        path = write_video(tmp_path / "v.avi", frames=50, pattern=numbered, **PCM, **CODECS[codec])
        (clip,) = decode_clips(path, num_frames=50)
        shown = (clip.video.double().mean((1, 2)) - 20) / 4
        assert np.abs(shown.numpy() - np.arange(50)).max() < 0.5

    def test_a_clip_further_on(self, tmp_path):
        path = write_video(tmp_path / "v.avi", frames=140, flashes=(4.6,), clicks=(4.6,), **PCM, **CODECS["h264"])
        clip = decode_clip(path, start_frame=105)
        assert flash_frame(clip.video.numpy()) == 10
        assert click_seconds(clip.audio.numpy()) == pytest.approx(0.4, abs=0.001)

    def test_a_mouth_is_followed_by_the_same_stamps(self, tmp_path):
        path = write_face_video(tmp_path / "v.avi", [(60.0, 50.0, 0.0, 1.0)] * 29, audio_codec="pcm_s16le")
        clip = decode_clip(path, crop=Crop("track", track=track_mouth(path, BlobFinder())))
        assert clip.video[:, 8:40, 8:-8].min() > 150

    @pytest.mark.parametrize("skipped", [(1, 2), (7,), range(10, 22)], ids=["2", "1", "12"])
    def test_an_empty_chunk_shows_the_last_picture_again(self, tmp_path, skipped):
        path = write_video(
            tmp_path / "v.avi", pattern=numbered, skipped=skipped, clicks=(0.6,), **PCM, **CODECS["mpeg4"]
        )
        clip = decode_clip(path)
        expected = [number if number not in skipped else min(skipped) - 1 for number in range(29)]
        shown = (clip.video.double().mean((1, 2)) - 20) / 4
        assert np.abs(shown.numpy() - expected).max() < 0.5
        assert click_seconds(clip.audio.numpy()) == pytest.approx(0.6, abs=0.001)
        assert clip.notes == (f"frames held: until the next one came, up to {40 * len(skipped) + 40} ms",)
        assert inspect_video(path).problems == []
        assert np.array_equal(read_sound_and_frames(path, 0, 29).audio, clip.audio.numpy())


class TestOtherContainers:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("b-frames.asf", {"audio_codec": "wmav2", "rate": 44_100, "bit_rate": 64_000, "options": {"bf": "2"}}),
            ("b-frames.mpg", {"audio_codec": "mp2", "options": {"bf": "2"}}),
            ("mpeg2.mpg", {"video_codec": "mpeg2video", "audio_codec": "mp2", "options": {"b": "4M", "bf": "2"}}),
        ],
    )
    def test_pictures_with_few_time_stamps(self, tmp_path, name, options):
        """All of the first have none of presentation; the others' have some."""
        path = write_video(tmp_path / name, frames=50, pattern=numbered, clicks=(1.0,), size=(64, 64), **options)
        clip = next(decode_clips(path, num_frames=45))
        shown = (clip.video.double().mean((1, 2)) - 20) / 4
        assert np.abs(shown.numpy() - np.arange(45)).max() < 0.5
        assert click_seconds(clip.audio.numpy()) == pytest.approx(1.0, abs=0.002)
        facts = inspect_video(path)
        assert (facts.frames, facts.problems) == (50, [])
        assert facts.fps == pytest.approx(25)
        assert not any(note.startswith("uneven frames") for note in facts.notes)


@dataclass
class FakePacket:
    """What a decoder takes; `shows` are the pictures it then gives."""

    pts: int | None
    dts: int | None
    shows: Sequence[av.VideoFrame] = field(default_factory=list)
    size: int = 100
    buffer_ptr: int = 0

    def decode(self) -> Sequence[av.VideoFrame]:
        return self.shows


def picture(pts: int | None = None, duration: int = 0) -> av.VideoFrame:
    frame = av.VideoFrame(16, 16, "gray")
    frame.pts, frame.duration = pts, duration
    return frame


def stamps_of(packets: Sequence[FakePacket], depth: int) -> list[int | None]:
    container: Any = SimpleNamespace(format=SimpleNamespace(name="avi"))
    stream: Any = SimpleNamespace(codec_context=SimpleNamespace(reorder_depth=depth))
    decoder = PictureDecoder(container, stream)
    return [frame.pts for packet in packets for frame in decoder.decode(packet)]  # type: ignore[arg-type]  # a stand-in


class TestStamps:
    def test_a_packet_that_changes_nothing_keeps_its_time(self):
        """The third packet of a decoder that holds one picture back gives none at all: its time is nobody's."""
        packets = [
            FakePacket(None, 0),
            FakePacket(None, 1, [picture()]),
            FakePacket(None, 2),
            FakePacket(None, 3, [picture()]),
            FakePacket(None, None, [picture()], size=0),
        ]
        assert stamps_of(packets, depth=1) == [0, 1, 3]

    def test_a_picture_without_a_stamp_follows_the_one_before(self):
        packets = [FakePacket(10, 10, [picture(10, 5)]), FakePacket(None, None, [picture(None, 5)])]
        assert stamps_of(packets, depth=0) == [10, 15]

    @pytest.mark.parametrize(
        "packets",
        [
            [FakePacket(None, None, [picture()])],
            [FakePacket(3, 3, [picture(3)]), FakePacket(None, None, [picture()])],
            [FakePacket(None, 3, [picture(), picture()])],
        ],
        ids=["none", "no-duration", "more-pictures-than-times"],
    )
    def test_stamps_are_not_made_up(self, packets):
        with pytest.raises(ValueError, match="the video has frames without time stamps"):
            stamps_of(packets, depth=0)
