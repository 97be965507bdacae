"""DALI's graph on the CPU, with VP9; skipped, with its reason, where DALI is not installed."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from make_videos import click_seconds, copy_cut, flash_frame, join_tracks, set_matrix, write_video

from avppc import make_video_loader
from avppc.data.on_the_fly import dali
from avppc.data.on_the_fly.videos import VideoClip, VideoDataset, first_clips
from avppc.data.packed.loader import ClipLoader, EpochSampler
from avppc.data.scan import scan
from avppc.data.video.crop import Crop, luma_of
from avppc.data.video.decode import decode_clip
from avppc.data.video.inspect import VideoFacts, inspect_video
from avppc.data.video.picked import read_sound_and_frames
from avppc.data.video.source import DecodeError

VP9 = {"video_codec": "libvpx-vp9", "audio_codec": "libopus", "rate": 48_000, "options": {"crf": "10", "b": "2M"}}
EVENT = 0.6
TOGETHER = {"flashes": (EVENT,), "clicks": (EVENT,)}


def _missing() -> str | None:
    try:
        dali.load_dali()
    except ImportError as error:
        return str(error)
    return None


MISSING = _missing()
needs_dali = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of DALI's own
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[VideoClip]:
    folder = tmp_path_factory.mktemp("vp9")
    for number in range(7):
        write_video(folder / f"{number}.webm", seed=number, size=(128, 160), frames=31, **TOGETHER, **VP9)
    return first_clips(folder, scan(folder).videos)


class TestSoundAndFrames:
    """What is read beside the pictures, checked against the decoder."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"fps": 30, "frames": 40},
            {"fps": Fraction(30_000, 1001), "frames": 40},
            {"fps": 50, "frames": 70},
            {"audio_start": 0.3},
            {"rate": 44_100, "layout": "stereo"},
            {"options": {"bf": "3", "g": "10"}, "frames": 40},
        ],
        ids=lambda options: "-".join(map(str, options)) or "plain",
    )
    @pytest.mark.parametrize("start", [0, 2])
    def test_agrees_with_the_decoder(self, tmp_path, options, start):
        """Each frame of the video shows its number."""
        path = write_video(
            tmp_path / "v.mp4",
            size=(64, 64),
            pattern=lambda number, height, width, seed: np.full((height, width), 16 + 3 * number, np.uint8),
            **{"frames": 33, "clicks": (0.5,), **options},
        )
        clip = decode_clip(path, start_frame=start)
        found = read_sound_and_frames(path, start, 29)
        assert (found.height, found.width) == (64, 64)
        shown = (clip.video.double().mean((1, 2)) - 16) / 3
        assert np.abs(shown.numpy() - found.frames).max() < 0.5
        assert np.array_equal(found.audio, clip.audio.numpy())

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"frames": 20}, "too short: 20 frames of 1/25 s, 29 are needed"),
            ({"skipped": range(12, 17)}, r"frames missing: 1 of 29, the first at 0\.56 s"),
            ({"audio_seconds": 0.3}, "sound missing"),
            ({"audio_codec": None}, "no audio stream"),
        ],
        ids=["short", "hole", "late", "mute"],
    )
    def test_what_cannot_be_used_is_refused(self, tmp_path, options, reason):
        path = write_video(tmp_path / "v.mp4", size=(64, 64), **options)
        with pytest.raises(DecodeError, match=reason):
            read_sound_and_frames(path, 0, 29)

    @pytest.mark.parametrize("start", [0, 120])
    def test_a_long_video_is_decoded_around_the_clip_only(self, tmp_path, start):
        path = write_video(tmp_path / "v.mp4", frames=160, clicks=(start / 25 + 0.5,), size=(64, 64))
        found = read_sound_and_frames(path, start, 29)
        assert np.array_equal(found.frames, np.arange(start, start + 29))
        assert np.abs(found.audio.astype(int) - decode_clip(path, start_frame=start).audio.numpy()).max() <= 1

    def test_hidden_frames_are_refused(self, tmp_path):
        source = write_video(tmp_path / "long.mp4", frames=100, size=(64, 64), options={"g": "25"})
        with pytest.raises(DecodeError, match="hidden frames"):
            read_sound_and_frames(copy_cut(source, tmp_path / "cut.mp4", 1.32), 0, 29)


class TestShownAsStored:
    """DALI shows pictures as they are stored, of the video stream that it chooses itself."""

    @staticmethod
    def write(folder: Path, case: str) -> Path:
        if case == "plain":
            return write_video(folder / "v.mp4", size=(64, 64))
        if case == "pixels":
            return write_video(folder / "v.mp4", size=(64, 64), aspect=Fraction(4, 3))
        if case == "two-videos":
            sources = [write_video(folder / f"{name}.mp4", size=(64, 64)) for name in "ab"]
            return join_tracks(folder / "v.mp4", sources, 0, kind="video")
        matrix = {"rotated": (0, 1, -1, 0), "mirrored": (-1, 0, 0, 1)}[case]
        return set_matrix(write_video(folder / "v.mp4", size=(64, 64)), *matrix)

    @pytest.mark.parametrize(
        ("case", "note"),
        [
            ("rotated", "rotation: turned by -90 degrees"),
            ("mirrored", "mirror image"),
            ("pixels", "pixel shape: 4:3"),
            ("two-videos", "several video streams"),
        ],
    )
    def test_others_are_left_to_pyav(self, tmp_path, monkeypatch, case, note):
        monkeypatch.setattr(dali, "load_dali", lambda: None)
        monkeypatch.setattr(dali, "nvdec_problem", lambda *facts: None)
        path = self.write(tmp_path, case)
        for device in ("cpu", "cuda"):
            choice = dali.choose_backend(inspect_video(path), device)
            assert choice.backend == "pyav"
            assert note in choice.reason
        source = dali.ClipSource([VideoClip(path)], EpochSampler(1, 1, seed=0), 29, Crop())
        with pytest.raises(DecodeError, match=f"as they are stored, decode it with PyAV \\({note}"):
            source(SimpleNamespace(iteration=0, idx_in_batch=0))

    def test_plain_ones_are_not(self, tmp_path, monkeypatch):
        monkeypatch.setattr(dali, "load_dali", lambda: None)
        monkeypatch.setattr(dali, "nvdec_problem", lambda *facts: None)
        path = self.write(tmp_path, "plain")
        assert dali.choose_backend(inspect_video(path), "cuda").backend == "dali"
        source = dali.ClipSource([VideoClip(path)], EpochSampler(1, 1, seed=0), 29, Crop())
        assert source(SimpleNamespace(iteration=0, idx_in_batch=0))[4].tolist() == [64, 64]


class TestDecodingDataset:
    """The way without DALI: the same loader, clips decoded on threads."""

    def test_batches(self, clips):
        dataset = VideoDataset(clips, crop=Crop("centre"), threads=2)
        with ClipLoader(dataset, EpochSampler(7, 3, seed=4)) as loader:
            expected = EpochSampler(7, 3, seed=4)
            for _ in range(3):
                rows = next(expected).tolist()
                batch = next(loader)
                assert batch.clip_ids.tolist() == [clips[row].clip_id for row in rows]
                for row, video in zip(rows, batch.video, strict=True):
                    assert torch.equal(video, decode_clip(clips[row].path, crop=Crop("centre")).video)
        dataset.close()


class TestChoice:
    FACTS = VideoFacts(video_codec="h264", pixel_format="yuv420p", width=256, height=256)

    def test_reason_is_told(self, monkeypatch):
        monkeypatch.setattr(dali, "load_dali", lambda: None)
        assert "on a CPU it decodes vp8, vp9, mjpeg only, this is h264" in str(
            dali.dali_problem(self.FACTS, torch.device("cpu"))
        )
        vp9 = VideoFacts(video_codec="libvpx-vp9", pixel_format="yuv420p", width=256, height=256)
        assert dali.choose_backend(vp9, "cpu") == dali.Choice("dali", "")

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({}, None),
            ({"width": 40}, "the driver says no to h264 of 40 x 256"),
            ({"pixel_format": "yuv444p"}, "8-bit 4:2:0 video, this is yuv444p"),
        ],
        ids=str,
    )
    def test_the_driver_is_asked(self, monkeypatch, changes, problem):
        monkeypatch.setattr(dali, "load_dali", lambda: None)
        monkeypatch.setattr(
            dali,
            "nvdec_problem",
            lambda codec, width, height, device: (
                f"the driver says no to {codec} of {width} x {height}" if width < 48 else None
            ),
        )
        facts = VideoFacts(**{**{k: getattr(self.FACTS, k) for k in self.FACTS.__dataclass_fields__}, **changes})
        found = dali.dali_problem(facts, torch.device("cuda", 0))
        assert (found is None) if problem is None else (problem in str(found))

    def test_without_anything_pyav_takes_over_and_says_why(self, clips, monkeypatch, caplog):
        def gone():
            raise ImportError("it is not there")

        monkeypatch.setattr(dali, "load_dali", gone)
        with caplog.at_level(logging.INFO, "avppc"):
            loader = make_video_loader(clips, EpochSampler(7, 3, seed=0), "cpu", crop=Crop("centre"))
        assert "decoding with pyav (not DALI: it is not there)" in caplog.text
        with loader:
            assert next(loader).video.shape == (3, 29, 96, 96)

    def test_no_clips(self):
        with pytest.raises(ValueError, match="clips must hold at least one clip, got none"):
            make_video_loader([], EpochSampler(1, 1, seed=0), "cpu")


class TestLoader:
    pytestmark = needs_dali

    @pytest.fixture
    def loader(self, clips, request):
        made = []

        def make(**options):
            made.append(
                dali.DaliLoader(
                    clips,
                    EpochSampler(7, 3, seed=4),
                    device_id=None,
                    crop=Crop("centre", size=96),
                    workers=0,
                    **options,
                )
            )
            return made[-1]

        yield make
        for loader in made:
            loader.close()

    def test_clips_are_what_pyav_gives(self, clips, loader):
        expected = EpochSampler(7, 3, seed=4)
        batches = loader()
        for _ in range(3):
            batch = next(batches)
            rows = next(expected).tolist()
            assert batch.clip_ids.tolist() == [clips[row].clip_id for row in rows]
            for row, video, audio in zip(rows, batch.video, batch.audio, strict=True):
                clip = decode_clip(clips[row].path, crop=Crop("centre"))
                assert torch.equal(audio, clip.audio)
                difference = np.abs(video.numpy().astype(int) - clip.video.numpy())
                assert difference.mean() < 2
                assert flash_frame(video.numpy()) == 15
                assert click_seconds(audio.numpy()) == pytest.approx(EVENT, abs=0.003)

    @pytest.mark.parametrize("prefetch", [1, 3])
    @pytest.mark.parametrize("stop", [1, 2, 5])
    def test_resume_drops_and_repeats_nothing(self, loader, stop, prefetch):
        whole = EpochSampler(7, 3, seed=4)
        rows = [next(whole).tolist() for _ in range(8)]
        first = loader(prefetch=prefetch)
        expected = [[first.clips[row].clip_id for row in batch] for batch in rows]
        before = [next(first).clip_ids.tolist() for _ in range(stop)]
        state = first.state()
        first.close()
        second = loader(prefetch=prefetch)
        second.load_state(state)
        assert before + [next(second).clip_ids.tolist() for _ in range(8 - stop)] == expected
        assert (second.state()["epoch"], second.state()["batches_consumed"]) == (4, 0)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # DALI leaves a socket open
    def test_processes_of_its_own_give_the_same(self, clips, loader):
        with dali.DaliLoader(
            clips, EpochSampler(7, 3, seed=4), device_id=None, crop=Crop("centre"), workers=1
        ) as parallel:
            one, other = next(parallel), next(loader())
        assert torch.equal(one.clip_ids, other.clip_ids)
        assert torch.equal(one.video, other.video)
        assert torch.equal(one.audio, other.audio)

    def test_frame_rates_are_converted(self, tmp_path):
        write_video(tmp_path / "30.webm", fps=30, frames=40, size=(128, 128), **TOGETHER, **VP9)
        clips = first_clips(tmp_path, scan(tmp_path).videos)
        sampler = EpochSampler(1, 1, seed=0)
        with dali.DaliLoader(clips, sampler, device_id=None, crop=Crop("centre"), workers=0) as loader:
            batch = next(loader)
        assert flash_frame(batch.video[0].numpy()) == 15
        theirs = decode_clip(clips[0].path, crop=Crop("centre")).video.numpy()
        assert np.abs(batch.video[0].numpy().astype(int) - theirs).mean() < 2

    @pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("AVPPC_REQUIRE_GPU") != "1",
        reason="decoding on the GPU needs a CUDA device",
    )
    def test_on_the_gpu(self, tmp_path):
        for number in range(4):
            write_video(tmp_path / f"{number}.mp4", seed=number, **TOGETHER)
        clips = first_clips(tmp_path, scan(tmp_path).videos)
        if (problem := dali.dali_problem(dali.inspect_video(clips[0].path), torch.device("cuda", 0))) is not None:
            assert os.environ.get("AVPPC_REQUIRE_GPU") != "1" or "libnvcuvid" in problem, problem
            pytest.skip(problem)
        with dali.DaliLoader(clips, EpochSampler(4, 2, seed=0), device_id=0) as loader:
            batch = next(loader)
        assert batch.device.type == "cuda"
        assert flash_frame(batch.video[0].cpu().numpy()) == 15


class FakeTensorCPU:
    """What DALI's TensorCPU is to a reader: an array in this process's memory."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    @property
    def __array_interface__(self):
        return self._values.__array_interface__

    def as_tensor(self):
        return self


class FakeTensorGPU:
    """What DALI's TensorGPU is to a reader, with memory that only `feed_ndarray` reaches: no __array_interface__."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.dtype = SimpleNamespace(name=values.dtype.name.upper())

    @property
    def __cuda_array_interface__(self):
        raise AssertionError("a test without a GPU has no address there")

    def shape(self):
        return list(self.values.shape)

    def as_tensor(self):
        return self


class TestBothKindsOfTensor:
    """A pipeline with a GPU gives pictures there, and what came from files in the CPU's memory, as it was."""

    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch):
        """nvidia.dali, of which only `feed_ndarray` is there; a TensorCPU it would copy to an address of the GPU."""
        plugin = ModuleType("nvidia.dali.plugin.pytorch")
        self.fed = []

        def feed_ndarray(tensor, target, cuda_stream=None):
            assert isinstance(tensor, FakeTensorGPU), "the process would end with SIGSEGV"
            self.fed.append(cuda_stream)
            target.copy_(torch.from_numpy(tensor.values))

        plugin.feed_ndarray = feed_ndarray
        for name in ("nvidia", "nvidia.dali", "nvidia.dali.plugin"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
        monkeypatch.setattr(dali, "load_dali", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")

    def test_a_batch(self, clips, monkeypatch):
        sampler = EpochSampler(7, 3, seed=4)
        rows = sampler.batch(0, 0).numpy()
        colours = np.arange(3 * 29 * 8 * 8 * 3, dtype=np.uint64).reshape(3, 29, 8, 8, 3).astype(np.uint8)
        sound = np.arange(3 * 18560, dtype=np.uint64).reshape(3, 18560).astype(np.int16)
        outputs = (FakeTensorGPU(colours), FakeTensorCPU(sound), FakeTensorCPU(rows[:, None]))
        monkeypatch.setattr(dali.DaliLoader, "_build", lambda loader: SimpleNamespace(run=lambda: outputs))
        loader = dali.DaliLoader(clips, sampler, device_id=0)
        assert loader.device == torch.device("cuda", 0)
        loader.device = torch.device("cpu")  # stands for the GPU
        batch = next(loader)
        assert self.fed == ["the stream of cpu"]
        assert torch.equal(batch.video, luma_of(torch.from_numpy(colours)))
        assert torch.equal(batch.audio, torch.from_numpy(sound))
        assert batch.clip_ids.tolist() == [clips[row].clip_id for row in rows]
        sound[:] = 0  # DALI uses its memory again
        assert batch.audio.any()


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_the_stand_ins_are_like_dalis_own():
    tensors = importlib.import_module("nvidia.dali.tensors")
    for fake in (FakeTensorCPU, FakeTensorGPU):
        real = getattr(tensors, fake.__name__.removeprefix("Fake"))
        for name in ("__array_interface__", "__cuda_array_interface__"):
            assert hasattr(real, name) == hasattr(fake, name)


@pytest.mark.skipif(MISSING is None, reason="DALI is there")
def test_what_is_missing_is_told(clips):
    with pytest.raises(ImportError, match=r"needs nvidia-dali-cuda130: pip install 'avppc\[dali\]'"):
        dali.DaliLoader(clips, EpochSampler(7, 3, seed=0))
