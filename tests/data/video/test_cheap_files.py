"""Small files that claim much cost little."""

from __future__ import annotations

import resource

import cheap_files
import pytest
from make_videos import write_video

from avppc.data.features import read_sound
from avppc.data.video import inspect, source
from avppc.data.video.decode import decode_clip
from avppc.data.video.source import DecodeError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            cheap_files.many_samples(),
            r"a table of contents \(moov\) claims 20,000,000 samples, in a file of ",
        ),
        (
            cheap_files.many_fragment_samples(),
            r"a fragment \(moof\) claims 20,000,000 samples, in a file of ",
        ),
        (cheap_files.many_tracks(), "it has 900 tracks, at most 100 are read"),
    ],
    ids=["samples", "fragment", "tracks"],
)
def test_claims_are_refused_before_room_is_made_for_them(content, message, tmp_path, monkeypatch):
    """FFmpeg allocated 700 MiB for a file of 539 bytes."""
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    monkeypatch.setattr(source.av, "open", lambda *_, **__: pytest.fail("the decoder has opened it"))
    for read in (inspect.inspect_video, decode_clip, read_sound):
        with pytest.raises(DecodeError, match=message):
            read(path)
    with pytest.raises(DecodeError, match=message):
        decode_clip(content)


def test_a_table_that_lacks_its_entries_is_a_claim(tmp_path):
    content = bytearray(cheap_files.many_samples())
    place = content.index(b"stsz") + 8
    content[place : place + 4] = bytes(4)  # no size for all: each sample has its own
    with pytest.raises(DecodeError, match="claims 20,000,000 samples"):
        decode_clip(bytes(content))


def test_what_a_file_can_hold_is_left_to_the_decoder():
    for content in (cheap_files.many_samples(100), cheap_files.many_fragment_samples(100), cheap_files.many_tracks(90)):
        with pytest.raises(DecodeError, match="no audio stream"):
            decode_clip(content)


def test_streams_of_other_containers_are_counted_too(tmp_path):
    path = cheap_files.write_many_streams(tmp_path / "a.mkv", 90)
    with pytest.raises(DecodeError, match="no video stream"):
        decode_clip(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError):
        decode_clip(cheap_files.write_many_streams(tmp_path / "b.mkv", 900))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_more_packets_than_bytes_are_not_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect, "_FEW_PACKETS", 10)
    monkeypatch.setattr(inspect, "_size", lambda source: 20)
    path = write_video(tmp_path / "a.mp4", size=(48, 64))
    with pytest.raises(DecodeError, match="damaged: it has more packets than bytes, 20"):
        inspect.inspect_video(path)
