from __future__ import annotations

import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from make_videos import (
    FLASH_LUMA,
    click_seconds,
    copy_cut,
    flash_frame,
    join_tracks,
    lose_packet,
    moving_pattern,
    write_video,
)

from avppc import crop_video, load_encoder
from avppc.clip import CLIP_FRAMES, CLIP_SAMPLES, VIDEO_FPS
from avppc.data.features import read_sound
from avppc.data.video.crop import Crop
from avppc.data.video.decode import decode_clip, decode_clips, load_clip
from avppc.data.video.inspect import inspect_video
from avppc.data.video.reader import ClipError, missing_sound
from avppc.data.video.source import DecodeError

EVENT = 0.6  # seconds from the video's start: a flash and a click together
TOGETHER = {"flashes": (EVENT,), "clicks": (EVENT,)}
WMV = {"video_codec": "wmv2", "audio_codec": "wmav2", "rate": 44_100, "bit_rate": 64_000, "options": {"b": "4M"}}


def check_together(clip, seconds: float = EVENT) -> None:
    assert clip.video.shape == (CLIP_FRAMES, 96, 96)
    assert clip.audio.shape == (CLIP_SAMPLES,)
    assert clip.video.dtype == torch.uint8
    assert clip.audio.dtype == torch.int16
    assert click_seconds(clip.audio.numpy()) == pytest.approx(seconds, abs=0.003)
    assert abs(flash_frame(clip.video.numpy()) / VIDEO_FPS - seconds) <= 0.5 / VIDEO_FPS + 1e-6


class TestClock:
    @pytest.mark.parametrize(
        ("name", "options", "notes"),
        [
            ("plain.mp4", {}, []),
            ("stereo-44100.mp4", {"rate": 44_100, "layout": "stereo"}, []),
            ("48000.mp4", {"rate": 48_000}, []),
            ("late-audio.mp4", {"audio_start": 0.25}, []),
            ("early-audio.mp4", {"audio_start": -0.25}, []),
            ("fps-30.mp4", {"fps": 30, "frames": 36}, ["frame rate 30"]),
            ("fps-2997.mp4", {"fps": Fraction(30_000, 1001), "frames": 35}, ["frame rate 29.97"]),
            ("fps-24.mp4", {"fps": 24, "frames": 28}, ["frame rate 24"]),
            ("fps-50.mp4", {"fps": 50, "frames": 58}, ["frame rate 50"]),
            ("b-frames.mp4", {"options": {"bf": "3", "g": "10"}}, []),
            ("vp9-opus.webm", {"video_codec": "libvpx-vp9", "audio_codec": "libopus", "rate": 48_000}, []),
            ("mpeg4-pcm.avi", {"video_codec": "mpeg4", "audio_codec": "pcm_s16le", "options": {"b": "4M"}}, []),
            ("h264-aac.mkv", {}, []),
            ("mpeg2-mp2.mpg", {"video_codec": "mpeg2video", "audio_codec": "mp2", "options": {"b": "4M"}}, []),
            ("h264-aac.ts", {}, []),
            ("wmv2-wma.asf", WMV, ["longer than the clip"]),
            ("fragmented.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}, []),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_click_and_flash_come_out_together(self, tmp_path, name, options, notes):
        clip = decode_clip(write_video(tmp_path / name, **TOGETHER, **options))
        check_together(clip)
        kinds = [note.split(":")[0] for note in clip.notes]
        # Sound that begins a little after the first picture is usual; the test below looks at its padding.
        assert [kind for kind in kinds if kind != "sound padded with zeros"] == notes

    @pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
    @pytest.mark.parametrize("default", [0, 1])
    def test_the_default_sound_track_is_taken(self, tmp_path, name, default):
        times = (0.3, 0.7)
        sources = [write_video(tmp_path / f"{t}.mp4", clicks=(t,)) for t in times]
        path = join_tracks(tmp_path / name, sources, default)
        clip = decode_clip(path)
        assert click_seconds(clip.audio.numpy()) == pytest.approx(times[default], abs=0.003)
        note = f"several sound tracks: number {default + 1} of 2, the file's default, is used"
        assert note in clip.notes
        assert note in inspect_video(path).notes
        assert click_seconds(read_sound(path)) == pytest.approx(times[default], abs=0.07)  # priming first

    @pytest.mark.parametrize("name", ["v.webm", "v.mkv"])
    def test_a_lost_packet_of_20_ms_moves_nothing(self, tmp_path, name):
        vp9 = {"video_codec": "libvpx-vp9", "audio_codec": "libopus", "rate": 48_000, "options": {}, "size": (64, 64)}
        whole = write_video(tmp_path / f"whole-{name}", clicks=(EVENT,), **vp9)
        clip = decode_clip(lose_packet(whole, tmp_path / name, 0.3))
        assert click_seconds(clip.audio.numpy()) == pytest.approx(EVENT, abs=0.001)
        assert [note for note in clip.notes if not note.startswith("sound padded with zeros: 3")] == []

    def test_without_a_default_the_first_sound_track_is_taken(self, tmp_path):
        sources = [write_video(tmp_path / f"{t}.mp4", clicks=(t,)) for t in (0.3, 0.7)]
        clip = decode_clip(join_tracks(tmp_path / "v.mkv", sources, default=-1))
        assert click_seconds(clip.audio.numpy()) == pytest.approx(0.3, abs=0.003)
        assert "several sound tracks: number 1 of 2 is used" in clip.notes

    def test_late_sound_is_padded_with_zeros_and_noted(self, tmp_path):
        clip = decode_clip(write_video(tmp_path / "late.mp4", audio_start=0.5, clicks=(0.8,)))
        # AAC begins with up to two packets of priming, 64 ms each.
        silent = round((0.5 - 2 * 1024 / 16_000) * 16_000)
        assert not clip.audio[:silent].any()
        assert clip.audio[8_000:].any()
        assert click_seconds(clip.audio.numpy()) == pytest.approx(0.8, abs=0.003)
        assert clip.notes == (f"sound padded with zeros: 0 to {1000 * (8_000 - 1024) // 16_000} ms of the clip",)

    @pytest.mark.parametrize("start", [1.0, 1.32, 1.7])
    def test_stream_copied_cut_stays_together(self, tmp_path, start):
        source = write_video(
            tmp_path / "long.mp4", frames=100, flashes=(2.0,), clicks=(2.0,), options={"g": "25", "bf": "2"}
        )
        cut = copy_cut(source, tmp_path / "cut.mp4", start)
        with av.open(str(cut)) as container:
            shown_first = next(container.decode(video=0)).time
        check_together(decode_clip(cut), 2.0 - start - shown_first)

    @pytest.mark.parametrize("fps", [30, Fraction(30_000, 1001)], ids=["30", "29.97"])
    def test_everything_at_once(self, tmp_path, fps):
        """A phone's video, as people cut it: another frame rate, 44.1 kHz stereo that starts late, B-frames, then a cut
        without decoding, which starts at a key frame and hides what lies before."""
        event = 2.0  # the nearest frame at 29.97 a second is 1 ms away
        source = write_video(
            tmp_path / "phone.mp4",
            frames=120,
            fps=fps,
            flashes=(event,),
            clicks=(event,),
            rate=44_100,
            layout="stereo",
            audio_start=0.18,
            options={"g": "30", "bf": "2"},
        )
        check_together(decode_clip(source, start_frame=40), event - 40 / VIDEO_FPS)
        cut = copy_cut(source, tmp_path / "cut.mp4", 1.4)
        with av.open(str(cut)) as container:
            shown_first = next(container.decode(video=0)).time
        check_together(decode_clip(cut), event - 1.4 - shown_first)

    def test_a_clip_for_an_encoder_is_one_call(self, tmp_path):
        path = write_video(tmp_path / "long.mp4", frames=100, flashes=(1.8,), clicks=(1.8,))
        clip = load_clip(str(path), start_seconds=29 / VIDEO_FPS)
        expected = decode_clip(path, start_frame=29)
        assert torch.equal(clip.video, expected.video)
        assert torch.equal(clip.audio, expected.audio)
        side = load_encoder("talking-mouths").config
        luma = crop_video(clip.video[None], side.crop_pixels, side.input_pixels)
        assert load_encoder("talking-mouths")(luma).shape == (1, CLIP_FRAMES, 64)
        assert load_clip(path, num_frames=50).video.shape[0] == 50
        with pytest.raises(ValueError, match="start_seconds must be at least 0, got -1"):
            load_clip(path, start_seconds=-1.0)
        with pytest.raises(DecodeError, match=r"long.mp4: too short"):
            load_clip(path, start_seconds=60.0)

    def test_clips_of_a_long_video_keep_the_clock(self, tmp_path):
        times = (0.4, 1.8, 3.0)
        path = write_video(tmp_path / "long.mp4", frames=100, flashes=times, clicks=times)
        clips = list(decode_clips(path))
        assert [clip.start_frame for clip in clips] == [0, 29, 58]
        for clip, seconds in zip(clips, times, strict=True):
            check_together(clip, seconds - clip.start_frame / VIDEO_FPS)


class TestPicture:
    def test_window_is_the_luma_of_the_frame(self, tmp_path):
        path = write_video(tmp_path / "exact.mp4", options={"qp": "0", "preset": "ultrafast"})
        clip = decode_clip(path)
        for number in range(CLIP_FRAMES):
            expected = moving_pattern(number, 256, 256)[115:211, 79:175]
            assert np.array_equal(clip.video[number].numpy(), expected)

    def test_nearest_frame_is_taken_from_30_fps(self, tmp_path):
        path = write_video(tmp_path / "30.mp4", fps=30, frames=36, options={"qp": "0", "preset": "ultrafast"})
        clip = decode_clip(path)
        for number in range(CLIP_FRAMES):
            nearest = min(range(36), key=lambda frame: abs(Fraction(frame, 30) - Fraction(number, 25)))
            assert np.array_equal(clip.video[number].numpy(), moving_pattern(nearest, 256, 256)[115:211, 79:175])

    @pytest.mark.parametrize("fps", [5, 10, 12, Fraction(25, 2), 24], ids=str)
    def test_low_frame_rates_are_converted(self, tmp_path, fps):
        path = write_video(
            tmp_path / "slow.mp4",
            fps=fps,
            frames=int(1.4 * fps),
            size=(64, 64),
            pattern=lambda number, height, width, seed: np.full((height, width), 20 + 5 * number, np.uint8),
        )
        clip = decode_clip(path)
        times = [Fraction(frame) / fps for frame in range(int(1.4 * fps))]
        nearest = [
            min(range(len(times)), key=lambda frame: abs(times[frame] - Fraction(number, 25))) for number in range(29)
        ]
        shown = (clip.video.double().mean((1, 2)) - 20) / 5
        assert np.abs(shown.numpy() - nearest).max() < 0.5
        kinds = [note.split(":")[0] for note in clip.notes[1:]]
        assert kinds == [f"frame rate {float(fps):.4g}", "frames held"][: 1 if fps == 24 else 2]
        assert inspect_video(path).problems == []

    def test_a_first_frame_that_is_held_is_no_hole(self, tmp_path):
        """As Android's cameras write it: the second frame comes 185 ms after the first."""
        skipped = [number for number in range(1, 260) if number < 37 or (number - 37) % 7]
        path = write_video(tmp_path / "v.mp4", fps=200, frames=260, skipped=skipped, size=(64, 64))
        assert "frames held: until the next one came, up to 185 ms" in decode_clip(path).notes
        assert inspect_video(path).problems == []

    @pytest.mark.parametrize("size", [(96, 96), (120, 160), (240, 96)])
    def test_centre_square_is_scaled(self, tmp_path, size):
        path = write_video(tmp_path / "centre.mp4", size=size, options={"qp": "0", "preset": "ultrafast"})
        clip = decode_clip(path)
        side = min(size)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        expected = moving_pattern(0, *size)[top : top + side, left : left + side]
        if side == 96:
            assert np.array_equal(clip.video[0].numpy(), expected)
        else:
            assert clip.video.shape == (29, 96, 96)
            assert abs(clip.video[0].double().mean().item() - expected.mean()) < 1

    def test_window_outside_the_frame_is_refused(self, tmp_path):
        path = write_video(tmp_path / "small.mp4", size=(128, 128))
        with pytest.raises(DecodeError, match=r"rows 115:211, columns 79:175 does not fit into a frame of 128 x 128"):
            decode_clip(path, crop=Crop(mode="window"))

    @pytest.mark.parametrize(
        ("pixel_format", "codec", "note"),
        [
            ("yuv422p", "libx264", None),
            ("yuv444p", "libx264", None),
            ("gray", "libx264", None),
            ("yuv420p10le", "libx264", "10-bit luma"),
            ("yuvj420p", "libx264", "full-range luma"),
            ("bgr0", "libx264rgb", "pixel format gbrp"),
        ],
    )
    def test_pixel_formats_agree(self, tmp_path, pixel_format, codec, note):
        options = {"qp": "0", "preset": "ultrafast"}
        path = write_video(tmp_path / "v.mkv", pixel_format=pixel_format, video_codec=codec, options=options)
        clip = decode_clip(path)
        expected = moving_pattern(5, 256, 256)[115:211, 79:175].astype(int)
        assert np.abs(clip.video[5].numpy() - expected).max() <= 2
        assert [found.startswith(note) for found in clip.notes if note] == ([True] if note else [])
        assert len(clip.notes) == (note is not None)


class TestSeeking:
    def test_a_clip_further_on_is_the_same_as_when_read_through(self, tmp_path):
        path = write_video(tmp_path / "long.mp4", frames=400, clicks=(1.0, 9.0), options={"g": "50", "bf": "2"})
        for clip in decode_clips(path):
            jumped = decode_clip(path, start_frame=clip.start_frame)
            assert torch.equal(jumped.video, clip.video)
            assert (jumped.audio.int() - clip.audio.int()).abs().max() <= 1

    def test_a_container_without_index_is_read_through(self, tmp_path):
        path = write_video(tmp_path / "long.ts", frames=250, flashes=(8.4,), clicks=(8.4,))
        check_together(decode_clip(path, start_frame=200), 0.4)

    def test_bytes_and_file_agree(self, tmp_path):
        path = write_video(tmp_path / "v.mp4", **TOGETHER)
        one, other = decode_clip(path), decode_clip(path.read_bytes())
        assert torch.equal(one.video, other.video)
        assert torch.equal(one.audio, other.audio)

    def test_overlapping_clips(self, tmp_path):
        path = write_video(tmp_path / "v.mp4", frames=60, options={"qp": "0", "preset": "ultrafast"})
        clips = list(decode_clips(path, num_frames=20, stride=10))
        assert [clip.start_frame for clip in clips] == [0, 10, 20, 30, 40]
        assert torch.equal(clips[0].video[10:], clips[1].video[:10])
        assert torch.equal(clips[0].audio[6400:], clips[1].audio[:6400])


def truncated(path: Path) -> bytes:
    return write_video(path, container_options={"movflags": "faststart"}).read_bytes()[:-5_000]


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (lambda path: b"", "the file is empty"),
            (lambda path: b"WORD\nDuration: 0.4 seconds\n" * 50, "damaged or not a video"),
            (lambda path: write_video(path).read_bytes()[:3_000], "damaged or not a video"),
            (truncated, "damaged|too short|truncated"),
            (lambda path: write_video(path, audio_codec=None).read_bytes(), "no audio stream"),
            (lambda path: write_video(path, video_codec=None).read_bytes(), "no video stream"),
            (lambda path: write_video(path, frames=28).read_bytes(), "too short: 28 frames of 1/25 s, 29 are needed"),
            (lambda path: write_video(path, fps=4, frames=8).read_bytes(), "frames missing: 5 of 29"),
            (lambda path: write_video(path, skipped=range(12, 17)).read_bytes(), "frames missing: 1 of 29"),
            (lambda path: write_video(path, audio_seconds=0.3).read_bytes(), "sound missing: only .* of 1160 ms"),
            (lambda path: write_video(path, audio_start=0.9).read_bytes(), "sound missing: only .* of 1160 ms"),
            (lambda path: b"ffconcat version 1.0\nfile '/etc/passwd'\n", "of none of the known formats"),
            (lambda path: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "damaged or not a video"),
        ],
        ids=[
            "empty", "text", "truncated", "truncated-faststart", "no-audio", "no-video", "short", "4-fps",
            "missing-frame", "short-sound", "late-sound", "concat-list", "play-list",
        ],
    )  # fmt: skip
    def test_reason_is_told(self, tmp_path, make, reason):
        data = make(tmp_path / "source.mp4")
        path = tmp_path / "clip.mp4"
        path.write_bytes(data)
        with pytest.raises(DecodeError, match=reason) as caught:
            decode_clip(path)
        assert caught.value.path == str(path)
        assert str(path) in str(caught.value)

    def test_holes_in_the_sound_are_counted_together(self):
        assert missing_sound([(0, 2000), (5000, 5600), (18_000, 18_560)], 18_560)[1] == (
            "sound padded with zeros: 312 to 350 ms of the clip"
        )
        with pytest.raises(ClipError, match="sound missing: 562 to 582 ms of the clip"):
            missing_sound([(5000, 5320), (7000, 7160), (9000, 9320)], 18_560)

    def test_a_damaged_frame_is_never_painted_over(self, tmp_path):
        data = bytearray(write_video(tmp_path / "v.mp4", options={"qp": "10"}).read_bytes())
        middle = (data.index(b"mdat") + data.index(b"moov")) // 2
        data[middle : middle + 200] = bytes(200)
        with pytest.raises(DecodeError):
            decode_clip(bytes(data))

    def test_a_hole_in_a_long_video_costs_its_clips_only(self, tmp_path):
        path = write_video(tmp_path / "long.mp4", frames=120, skipped=range(40, 46))
        refused: list[tuple[int, str]] = []
        clips = list(decode_clips(path, on_refused=lambda start, reason: refused.append((start, reason))))
        assert [clip.start_frame for clip in clips] == [0, 58, 87]
        assert [start for start, _ in refused] == [29]
        with pytest.raises(DecodeError, match=r"frames missing: 2 of 29, the first at 1\.68 s"):
            list(decode_clips(path))

    def test_a_truncated_long_video_is_told(self, tmp_path):
        path = write_video(tmp_path / "long.mp4", frames=150, container_options={"movflags": "faststart"})
        data = path.read_bytes()
        clips = decode_clips(data[: len(data) // 2])
        assert next(clips).start_frame == 0
        with pytest.raises(DecodeError):
            list(clips)

    def test_pipe_and_folder_are_refused_without_waiting(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.mp4")
        for path in (tmp_path / "pipe.mp4", tmp_path):
            with pytest.raises(DecodeError, match="not a regular file"):
                decode_clip(path)

    def test_missing_file(self, tmp_path):
        with pytest.raises(DecodeError, match="cannot be read: No such file"):
            decode_clip(tmp_path / "none.mp4")

    def test_huge_frames_are_refused(self, tmp_path):
        path = write_video(tmp_path / "v.avi", size=(16, 9_000), frames=3, video_codec="ffv1", options={})
        with pytest.raises(DecodeError, match="frames of 9000 x 16, at most 8192"):
            decode_clip(path)

    def test_bad_arguments(self, tmp_path):
        path = write_video(tmp_path / "v.mp4")
        with pytest.raises(ValueError, match="start_frame must be at least 0, got -1"):
            decode_clip(path, start_frame=-1)
        for backend in ("pyav", "torchcodec"):
            with pytest.raises(ValueError, match="num_frames must be from 1 to 100000, got 0"):
                decode_clip(path, num_frames=0, backend=backend)
        with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
            decode_clips(path, stride=0)
        with pytest.raises(ValueError, match="crop mode must be one of"):
            Crop(mode="mouth")


def test_white_is_white(tmp_path):
    """A flash of luma 235 keeps its value through the window."""
    clip = decode_clip(write_video(tmp_path / "v.mp4", **TOGETHER))
    assert abs(int(clip.video[15].float().mean()) - FLASH_LUMA) <= 1


def test_memory_source_is_not_kept(tmp_path):
    """Bytes are read from memory, not from a file of that name."""
    data = write_video(tmp_path / "v.mp4").read_bytes()
    with io.BytesIO(data) as stream:
        assert decode_clip(stream.getvalue()).start_frame == 0
