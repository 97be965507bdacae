"""Clips at given places of a video, which is decoded once for all of them."""

from __future__ import annotations

import re

import pytest
import torch
from make_videos import write_video

from avppc.data.video import decode
from avppc.data.video.decode import decode_clip, decode_clips_at
from avppc.data.video.reader import StreamReader
from avppc.data.video.source import DecodeError

SMALL = {"size": (16, 16), "options": {"preset": "ultrafast"}}
FRAMES = 10


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", frames=100, **SMALL)


def places(video, starts, **options):
    """Number and start of each clip; each is what decode_clip gives there."""
    found = []
    for number, clip in decode_clips_at(video, starts, num_frames=FRAMES, **options):
        alone = decode_clip(video, start_frame=clip.start_frame, num_frames=FRAMES)
        assert torch.equal(clip.video, alone.video)
        assert torch.equal(clip.audio, alone.audio)
        found.append((number, clip.start_frame))
    return found


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([0], [0]),
        ([3, 3, 4, 60], [3, 3, 4, 60]),
        ([90], [90]),
        ([85, 91, 99, 4000], [85, 90, 90, 90]),  # the video ends at 100
        ([], []),
    ],
)
def test_each_start_gives_a_clip(video, starts, expected):
    assert places(video, starts) == [*enumerate(expected)]


@pytest.mark.parametrize(
    ("others", "stride", "starts", "expected"),
    [
        ("all", 40, [5, 40, 70], [(None, 0), (0, 5), (None, 40), (1, 40), (2, 70), (None, 80)]),
        ("rest", 10, [25, 30, 62], [(None, 0), (None, 10), (0, 25), (1, 30), (None, 40), (None, 50), (2, 62),
                                    (None, 72), (None, 82)]),
        ("rest", 10, [95], [*((None, start) for start in range(0, 90, 10)), (0, 90)]),
        ("all", 0, [20], [(None, 0), (0, 20)]),
        ("rest", 0, [5], [(0, 5), (None, 15)]),
        ("rest", 50, [], [(None, 0), (None, 50)]),
        ("none", 10, [50], [(0, 50)]),
    ],
)  # fmt: skip
def test_other_clips(video, others, stride, starts, expected):
    assert places(video, starts, others=others, stride=stride) == expected


def test_what_lies_between_is_forgotten(tmp_path, monkeypatch):
    video = write_video(tmp_path / "long.mp4", frames=1200, **SMALL)
    kept, alive = [], []
    fill = StreamReader.fill

    def counting(self, end_frame):
        there = fill(self, end_frame)
        kept.append(len(self._images))
        return there

    monkeypatch.setattr(StreamReader, "fill", counting)
    found = [*decode_clips_at(video, [1100, 5000], num_frames=FRAMES, alive=lambda: alive.append(1))]
    assert [clip.start_frame for _, clip in found] == [1100, 1190]
    assert max(kept) <= decode._FRAMES_AT_ONCE + FRAMES + 30  # frames come by the packet
    assert len(alive) >= 4


def test_a_clip_that_is_refused_does_not_stop_the_others(tmp_path):
    video = write_video(tmp_path / "hole.mp4", frames=80, skipped=range(30, 40), **SMALL)
    refused = []
    found = [*decode_clips_at(video, [5, 28, 60], num_frames=FRAMES, on_refused=lambda *why: refused.append(why))]
    assert [(number, clip.start_frame) for number, clip in found] == [(0, 5), (2, 60)]
    assert [start for start, _ in refused] == [28]
    with pytest.raises(DecodeError, match="frames missing"):
        [*decode_clips_at(video, [5, 28, 60], num_frames=FRAMES)]


def test_a_truncated_video_gives_no_clip_at_its_new_end(tmp_path):
    """A clip there would begin too early: its word is not in it."""
    video = write_video(tmp_path / "a.mp4", frames=100, container_options={"movflags": "faststart"}, **SMALL)
    content = video.read_bytes()
    video.write_bytes(content[: len(content) * 2 // 3])
    clips = decode_clips_at(video, [3, 88], num_frames=FRAMES)
    assert next(clips)[1].start_frame == 3
    with pytest.raises(DecodeError):
        next(clips)


def test_too_short_for_one_clip(tmp_path):
    video = write_video(tmp_path / "short.mp4", frames=9, **SMALL)
    with pytest.raises(DecodeError, match=r"short.mp4: too short: 9 frames of 1/25 s, 10 are needed"):
        [*decode_clips_at(video, [0], num_frames=FRAMES)]
    assert [*decode_clips_at(video, [], num_frames=FRAMES, others="all")] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": [5, 4]}, "starts must be at least 5, got 4"),
        ({"starts": [-1]}, "starts must be at least 0, got -1"),
        ({"starts": [1.5]}, "starts must be an int, got float"),
        ({"num_frames": 0}, "num_frames must be from 1 to 100000, got 0"),
        ({"others": "some"}, "others must be one of 'none', 'rest', 'all'; got 'some'"),
        ({"stride": -1}, "stride must be at least 0, got -1"),
    ],
)
def test_arguments_are_refused_before_anything_is_read(change, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        [*decode_clips_at("none.mp4", **{"starts": [0]} | change)]
