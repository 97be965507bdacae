from __future__ import annotations

import io

import pytest
from make_videos import copy_cut, write_video

from avppc.data.video.decode import decode_clip
from avppc.data.video.inspect import inspect_video
from avppc.data.video.mp4_boxes import check_mp4
from avppc.data.video.source import DecodeError

SMALL = {"size": (64, 64), "options": {"preset": "ultrafast"}}


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    return write_video(tmp_path_factory.mktemp("boxes") / "v.mp4", frames=31, **SMALL).read_bytes()


def check(content: bytes) -> list[str]:
    return check_mp4(io.BytesIO(content))


def changed(content: bytes, name: bytes, place: int, value: bytes) -> bytes:
    """The content with other bytes in the first box of that name, `place` bytes behind its name."""
    start = content.index(name, content.index(b"moov")) + 4 + place
    return content[:start] + value + content[start + len(value) :]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", {}),
        ("faststart.mp4", {"container_options": {"movflags": "faststart"}}),
        ("fragmented.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("b-frames.mp4", {"options": {"bf": "3", "g": "10"}, "frames": 60}),
        ("late.mp4", {"audio_start": 0.3}),
        ("quicktime.mov", {"audio_codec": "pcm_s16le"}),
        ("stereo.m4v", {"rate": 44_100, "layout": "stereo"}),
        ("mute.mp4", {"audio_codec": None}),
        ("other.mkv", {}),
        ("other.avi", {"video_codec": "mpeg4", "audio_codec": "pcm_s16le", "options": {}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_is_wrong_with_whole_files(tmp_path, name, options):
    assert check(write_video(tmp_path / name, **{**SMALL, **options}).read_bytes()) == []


def test_nothing_is_wrong_with_a_cut(tmp_path):
    source = write_video(tmp_path / "long.mp4", frames=100, size=(64, 64), options={"g": "25"})
    assert check(copy_cut(source, tmp_path / "cut.mp4", 1.32).read_bytes()) == []


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        (b"tkhd", -4, b"edts", "0 boxes tkhd in 'trak'"),
        (b"edts", -4, b"tkhd", "box 'tkhd' has 36 bytes, it must have 92 or 104"),
        (b"tkhd", -8, (90).to_bytes(4, "big"), "box 'tkhd' has 90 bytes"),
        (b"trak", -8, (1 << 20).to_bytes(4, "big"), "box 'trak' in 'moov' claims 1048576 of"),
        (b"elst", 4, (2).to_bytes(4, "big"), "the edit list has 20 bytes, 2 edits need 32"),
        (b"stts", 8, (30).to_bytes(4, "big"), "box 'stts' tells the times of 30 of 31 samples"),
        (b"stts", 4, (9999).to_bytes(4, "big"), "box 'stts' has no room for its 9999 entries"),
        (b"stsz", 8, (33).to_bytes(4, "big"), "box 'stsz' has no room for its 33 entries"),
        (b"stsc", 8, (2).to_bytes(4, "big"), r"the table of chunks \(stsc\) is not in order"),
        (b"stsc", 12, (77).to_bytes(4, "big"), r"the chunks hold \d+ samples, the sizes of 31 are told"),
        (b"stss", 8, (32).to_bytes(4, "big"), "the list of key frames"),
        (b"moov", -8, (1 << 24).to_bytes(4, "big"), r"its table of contents \(moov\) lacks \d+ bytes"),
    ],
)
def test_boxes_that_contradict_each_other(content, name, place, value, message):
    damaged = changed(content, name, place, value)
    assert damaged != content
    with pytest.raises(ValueError, match=f"damaged: {message}"):
        check(damaged)


def test_a_lost_edit_list_is_told(content):
    """Its damaged name makes the decoder skip it, and the sound come by the encoder's priming too late."""
    damaged = changed(content, b"edts", -4, b"edtr")
    note = "unknown box: 'edtr' in 'trak' is ignored"
    assert note in decode_clip(damaged).notes
    assert note in inspect_video(damaged).notes


def test_swapped_names_are_refused(content):
    """FFmpeg takes such a file, without the edit list that shifts its sound."""
    swapped = changed(changed(content, b"edts", -4, b"????"), b"tkhd", -4, b"edts")
    swapped = changed(swapped, b"????", -4, b"tkhd")
    for read in (decode_clip, inspect_video):
        with pytest.raises(DecodeError, match="box"):
            read(swapped)


def test_any_bytes_give_a_value_error_or_pass(content):
    """Each byte of the table of contents, set to values that break sizes and counts."""
    start = content.index(b"moov")
    refused = 0
    for place in range(start - 4, len(content), 3):
        for value in (0, 1, 0x7F, 0xFF):
            damaged = bytearray(content)
            damaged[place] = value
            try:
                check(bytes(damaged))
            except ValueError:
                refused += 1
    assert refused > 100
    for end in range(0, len(content), 97):
        if end < 12 or end < start:
            check(content[:end])
