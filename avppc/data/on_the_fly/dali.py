"""Decodes video on the GPU with NVIDIA DALI, straight into batches there; and tells when that is not possible.

Pictures only: sound is decoded on the CPU, and frames are picked by time stamps, by the processes that read the files.
Which clips come is the sampler's word alone, so that a resumed run gets exactly those that were to come next, however
many DALI had prefetched. Flips, photometric changes and normalisation follow in avppc.data.augment, on the same device.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avppc.checks import check_integer
from avppc.clip import CLIP_FRAMES, ClipBatch
from avppc.data.config import TRACKED_CROPS
from avppc.data.on_the_fly.listing import ClipList
from avppc.data.on_the_fly.nvdec import nvdec_problem
from avppc.data.on_the_fly.videos import VideoClip, as_batch
from avppc.data.packed.loader import EpochSampler, SampledBatches
from avppc.data.prepare.worker import kind_of
from avppc.data.sound_file import SOUND_FILE
from avppc.data.video.crop import SHOWN_OTHERWISE, Crop, luma_of
from avppc.data.video.inspect import VideoFacts
from avppc.data.video.picked import SoundAndFrames, read_sound_and_frames
from avppc.data.video.pictures import HIDDEN_FRAMES
from avppc.data.video.reader import SEVERAL_VIDEOS
from avppc.data.video.source import DecodeError
from avppc.files import read_bytes

_CPU_CODECS = ("vp8", "vp9", "mjpeg")  # those that DALI decodes without a GPU
# Kinds of notes on what PyAV's way does to pictures and DALI's does not. DALI chooses the video stream itself.
_PYAV_ONLY = (*SHOWN_OTHERWISE, HIDDEN_FRAMES, SEVERAL_VIDEOS)


@dataclass(frozen=True)
class Choice:
    """Which decoder is used, and why no better one."""

    backend: str
    """"dali" or "pyav"."""
    reason: str


def choose_backend(facts: VideoFacts, device: torch.device | str) -> Choice:
    """DALI where it can decode such video on the device, else PyAV; the reason names what stood against DALI.

    torchcodec is there for whoever asks for it: on a CPU it is slower than PyAV, since it computes colours.
    """
    against = dali_problem(facts, torch.device(device))
    return Choice("dali", "") if against is None else Choice("pyav", f"not DALI: {against}")


def dali_problem(facts: VideoFacts, device: torch.device) -> str | None:
    """Why DALI does not decode such video on a device; None where it does."""
    try:
        load_dali()
    except ImportError as error:
        return str(error)
    if any(note.startswith(SOUND_FILE) for note in facts.notes):
        return "its sound lies in a file of its own"
    if (note := next((note for note in facts.notes if kind_of(note) in _PYAV_ONLY), None)) is not None:
        return f"it shows pictures as they are stored, this has {note}"
    if device.type != "cuda":
        if facts.video_codec.removeprefix("lib") in _CPU_CODECS or facts.video_codec.startswith("libvpx"):
            return None
        return f"on a CPU it decodes {', '.join(_CPU_CODECS)} only, this is {facts.video_codec}"
    if facts.pixel_format not in ("yuv420p", "yuvj420p", "nv12"):
        return f"the GPU's decoder is used for 8-bit 4:2:0 video, this is {facts.pixel_format}"
    return nvdec_problem(facts.video_codec, facts.width, facts.height, device)


def listed_problem(clips: ClipList, device: torch.device) -> str | None:
    """Why DALI does not decode all of these clips on a device; None where it does."""
    if clips.config.crop in TRACKED_CROPS:
        return "it follows no mouths"
    if clips.config.word_context is not None:
        return "it hides no neighbouring words"
    asked: set[str] = set()
    for number, video in enumerate(clips.videos):
        facts = clips.facts(number)
        if repr(facts) in asked:  # most videos of a set are alike
            continue
        asked.add(repr(facts))
        if (problem := dali_problem(facts, device)) is not None:
            return f"{problem} ({video.path})"
    return None


def load_dali() -> Any:
    """nvidia.dali; ImportError that says what to install where it is not there."""
    try:
        dali = importlib.import_module("nvidia.dali")
        for part in ("fn", "types"):
            importlib.import_module(f"nvidia.dali.{part}")
    except (ImportError, OSError) as error:
        needed = "decoding with DALI needs nvidia-dali-cuda130: pip install 'avppc[dali]'"
        raise ImportError(f"{needed} ({error})") from error
    return dali


class ClipSource:
    """What DALI calls in its worker processes for each sample; the sample's number alone decides what it returns."""

    def __init__(self, clips: Sequence[VideoClip], sampler: EpochSampler, num_frames: int, crop: Crop) -> None:
        self._clips = tuple(clips)
        self._sampler = sampler.copy()
        self._num_frames = num_frames
        self._crop = crop

    def rows(self, iteration: int) -> list[int]:
        """Numbers of the clips of the batch that comes `iteration` batches after the sampler's state."""
        state, each = self._sampler.state(), self._sampler.batches_per_epoch
        epoch, number = divmod(state["epoch"] * each + state["batches_consumed"] + iteration, each)
        return [int(row) for row in self._sampler.batch(epoch, number)]

    def __call__(self, sample: Any) -> tuple[np.ndarray[Any, Any], ...]:
        """File, sound, numbers of the frames, the crop's corner (row, column) and shape, number of the clip."""
        row = self.rows(sample.iteration)[sample.idx_in_batch]
        clip = self._clips[row]
        content = read_bytes(clip.path)
        parts = read_sound_and_frames(content, clip.start_frame, self._num_frames)
        _check_shown_as_stored(clip.path, parts)
        rows, columns = (clip.crop or self._crop).box(parts.height, parts.width)
        corner = np.array([rows.start, columns.start], np.int32)
        shape = np.array([rows.stop - rows.start, columns.stop - columns.start], np.int32)
        return np.frombuffer(content, np.uint8), parts.audio, parts.frames, corner, shape, np.array([row])


def _check_shown_as_stored(path: Path, parts: SoundAndFrames) -> None:
    """DecodeError where DALI would hand out other pictures than PyAV."""
    for note in parts.notes:
        if kind_of(note) in _PYAV_ONLY:
            raise DecodeError(str(path), f"DALI shows pictures as they are stored, decode it with PyAV ({note})")


class DaliLoader(SampledBatches):
    """An endless stream of batches in the sampler's order, decoded by DALI; used like a ClipLoader.

    Args:
        device_id: number of the GPU; None: the CPU, for VP8, VP9 and MJPEG.
        prefetch: batches DALI works ahead.
        workers: processes that read files and decode sound; 0: this one does.
    """

    def __init__(
        self,
        clips: Sequence[VideoClip],
        sampler: EpochSampler,
        *,
        device_id: int | None = 0,
        num_frames: int = CLIP_FRAMES,
        crop: Crop | None = None,
        prefetch: int = 2,
        workers: int = 2,
        threads: int = 4,
    ) -> None:
        load_dali()
        check_integer("prefetch", prefetch, 1, 64)
        check_integer("workers", workers, 0, 256)
        check_integer("threads", threads, 1, 256)
        if sampler.num_clips != len(clips):
            raise ValueError(f"the sampler orders {sampler.num_clips} clips, there are {len(clips)}")
        if crop is not None and crop.track is not None:
            raise ValueError("crop must not follow a track: DALI decodes windows, boxes and middle squares")
        super().__init__(sampler)
        self.clips = tuple(clips)
        self.device_id = device_id
        self.device = torch.device("cpu") if device_id is None else torch.device("cuda", device_id)
        self.num_frames = num_frames
        self.crop = crop or Crop()
        self.prefetch = prefetch
        self.workers = workers
        self.threads = threads
        self._pipeline: Any = None

    def __next__(self) -> ClipBatch:
        """The next batch; RuntimeError of DALI's where a video cannot be decoded."""
        start = time.perf_counter()
        if self._pipeline is None:
            self._pipeline = self._build()
        pictures, audio, rows = (_to_torch(output, self.device) for output in self._pipeline.run())
        state = self.sampler.state()
        expected = self.sampler.batch(state["epoch"], state["batches_consumed"])
        if not torch.equal(rows[:, 0], expected):
            raise RuntimeError(f"DALI hands out the clips {rows[:, 0].tolist()}, {expected.tolist()} come next")
        batch = as_batch([self.clips[row] for row in expected.tolist()], luma_of(pictures), audio)
        self.sampler.advance()
        self.wait_seconds += time.perf_counter() - start
        return batch

    def close(self) -> None:
        """Ends DALI's threads and processes; the next batch asked for starts them anew."""
        if self._pipeline is not None:
            self._pipeline = None
            gc.collect()  # a pipeline ends its processes when it is destroyed, and is part of a cycle

    def _build(self) -> Any:
        dali = load_dali()
        fn, types = dali.fn, dali.types
        pipeline = dali.Pipeline(
            batch_size=self.sampler.batch_size,
            num_threads=self.threads,
            device_id=self.device_id,
            prefetch_queue_depth=self.prefetch,
            py_num_workers=max(self.workers, 1),
            py_start_method="spawn",
        )
        size = self.crop.size
        with pipeline:
            content, audio, frames, corner, shape, row = fn.external_source(
                source=ClipSource(self.clips, self.sampler, self.num_frames, self.crop),
                num_outputs=6,
                batch=False,
                parallel=self.workers > 0,
                dtype=[types.UINT8, types.INT16, types.INT32, types.INT32, types.INT32, types.INT64],
            )
            video = fn.decoders.video(content, device="cpu" if self.device_id is None else "mixed", frames=frames)
            video = fn.resize(fn.slice(video, corner, shape, axes=[1, 2]), size=[size, size])
            pipeline.set_outputs(video, audio, row)
        pipeline.build()
        return pipeline


def _to_torch(output: Any, device: torch.device) -> Tensor:
    """A copy [N, ...] of an output: DALI uses its memory again.

    What comes from the processes that read files stays in the CPU's memory: a TensorCPU, also of a pipeline with a GPU.
    Fed into a tensor on the GPU it would be copied, as by memcpy, to an address that this process does not have.
    """
    dense = output.as_tensor()
    if hasattr(type(dense), "__array_interface__"):  # TensorGPU has __cuda_array_interface__ in its place
        return torch.from_numpy(np.array(dense))
    from nvidia.dali.plugin.pytorch import feed_ndarray  # only on the GPU

    dtypes = {"UINT8": torch.uint8, "INT16": torch.int16, "INT64": torch.int64}
    target = torch.empty(dense.shape(), dtype=dtypes[dense.dtype.name], device=device)
    feed_ndarray(dense, target, cuda_stream=torch.cuda.current_stream(device))
    return target
