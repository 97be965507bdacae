"""Which streams of a file are used, and packets that hold nothing."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from make_videos import click_seconds, write_video
from ogg_pages import add_empty_packets

from avppc.data.features import read_sound
from avppc.data.video.decode import decode_clip
from avppc.data.video.inspect import inspect_video
from avppc.data.video.picked import read_sound_and_frames
from avppc.data.video.reader import INTERLACED
from avppc.data.video.source import DecodeError

SMALL = {"size": (48, 64), "options": {"preset": "ultrafast"}}


def add_thumbnail(source: Path, target: Path) -> Path:
    """Copies a video behind another video stream of one frame, which is not marked as a cover picture."""
    with av.open(str(source)) as before, av.open(str(target), "w") as after:
        thumbnail = after.add_stream("mjpeg", rate=25)
        thumbnail.width = thumbnail.height = 16
        thumbnail.pix_fmt = "yuvj420p"
        streams = {stream: after.add_stream_from_template(stream) for stream in before.streams}
        picture = av.VideoFrame.from_ndarray(np.full((24, 16), 128, np.uint8), "yuv420p").reformat(format="yuvj420p")
        after.mux([*thumbnail.encode(picture), *thumbnail.encode(None)])
        for packet in before.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream]
                after.mux(packet)
    return target


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_thumbnail_is_not_the_film(tmp_path, suffix):
    film = write_video(tmp_path / f"film.{suffix}", **SMALL)
    both = add_thumbnail(film, tmp_path / f"both.{suffix}")
    assert torch.equal(decode_clip(both).video, decode_clip(film).video)
    facts = inspect_video(both)
    assert (facts.video_codec, facts.width, facts.frames) == ("h264", 64, 29)
    assert [note.split(",")[0].removesuffix(" is used") for note in facts.notes] == [
        "several video streams: number 2 of 2"
    ]
    assert read_sound_and_frames(both, 0, 29).width == 64


def test_ogg_with_packets_without_content(tmp_path):
    """Vorbis packets have no time stamps but at the ends of pages, and none of them ends the sound."""
    path = write_video(
        tmp_path / "a.ogg", frames=75, size=(48, 64), clicks=(2.0,), flashes=(2.0,), layout="stereo",
        video_codec="libvpx", audio_codec="vorbis", audio_options={"strict": "experimental"}, options={},
    )  # fmt: skip
    whole = decode_clip(path, start_frame=40)
    assert add_empty_packets(path, header_pages=2) > 1
    clip = decode_clip(path, start_frame=40)
    assert torch.equal(clip.video, whole.video)
    assert torch.equal(clip.audio, whole.audio)
    assert click_seconds(clip.audio.numpy()) == pytest.approx(0.4, abs=0.003)
    assert np.array_equal(read_sound_and_frames(path, 40, 29).audio, whole.audio.numpy())


@pytest.mark.parametrize(
    ("name", "options", "notes"),
    [
        ("a.mp4", {"options": {"preset": "ultrafast", "x264-params": "interlaced=1"}}, [INTERLACED]),
        (
            "a.mpg",
            {"options": {"flags": "+ildct+ilme"}, "video_codec": "mpeg2video", "audio_codec": "mp2"},
            [INTERLACED],
        ),
        ("a.mp4", {"options": {"preset": "ultrafast"}}, []),
    ],
    ids=["h264", "mpeg2", "progressive"],
)
def test_interlaced_video_is_noted(tmp_path, name, options, notes):
    video = write_video(tmp_path / name, size=(96, 128), **options)
    assert [note for note in decode_clip(video).notes if note.startswith("interlaced")] == notes
    assert [note for note in inspect_video(video).notes if note.startswith("interlaced")] == notes
    if name == "a.mp4":  # other decoders cannot count the pictures of an MPEG program stream
        assert [note for note in read_sound_and_frames(video, 0, 29).notes if note.startswith("interlaced")] == notes


def test_a_format_that_is_not_known_is_not_called_damage_alone(tmp_path):
    other = write_video(tmp_path / "a.nut", size=(48, 64), video_codec="mpeg4", audio_codec="mp2", options={})
    for source in (other, other.read_bytes()):
        with pytest.raises(DecodeError, match=r"damaged, or of none of the known formats \(mov,mp4,"):
            decode_clip(source)
    with pytest.raises(DecodeError, match=r"damaged, or of none of the known formats \(wav,"):
        read_sound(other)


@pytest.mark.parametrize("bad_read", [1, 2, 3])
def test_what_a_disk_cannot_read_is_no_damage(bad_read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg by itself takes the read that failed for the end of the file, and says that the file is damaged."""
    path = write_video(tmp_path / "a.mp4", frames=200, options={"crf": "5"})  # 32 KiB are read at once
    reads = itertools.count(1)

    def read(descriptor: int, size: int, of_the_system: Callable[[int, int], bytes] = os.read) -> bytes:
        if next(reads) == bad_read:
            raise OSError(errno.EIO, "Input/output error")
        return of_the_system(descriptor, size)

    with monkeypatch.context() as patch:
        patch.setattr("avppc.data.video.source.os.read", read)
        with pytest.raises(DecodeError, match=r"a\.mp4: cannot be read: Input/output error"):
            decode_clip(path)
    assert next(reads) > bad_read
    assert decode_clip(path).video.shape[0] == 29
