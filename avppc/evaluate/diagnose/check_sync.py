"""`avppc check-sync`: the offset between sound and picture of a data set, as histograms, curves, numbers and a verdict.

It is found by a pretrained model's own score of how well the two fit, or by how loud the sound is. For that no model of
a mouth is needed: a linear read-out of the small picture is fitted to how loud the sound is, at each shift of one
against the other, on one half of the videos; the shift at which it predicts the other half best is the offset. In
effect it learns to read the mouth's opening, wherever the crop shows it, dark or bright.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from avppc.clip import SAMPLES_PER_FRAME, VIDEO_FPS, Clip, ClipBatch
from avppc.data.packed.dataset import PackedDataset
from avppc.data.video.reader import DecodedClip
from avppc.evaluate.config import CheckSyncConfig
from avppc.evaluate.diagnose.task import TrainedTask, load_task
from avppc.files import write_atomically, write_json
from avppc.train.hardware import autocast, resolve_device

_NAMES = {"envelope": "by loudness", "model": "by the run"}
_CURVES = {"envelope": "correlation, held out", "model": "mean score, deviations"}

_BATCH = 64
_NEAR_SECONDS = 2.0  # to each side of a moment of a video, over which scores are averaged

_POOLED = 12  # pixels a side of the picture that is read
_RIDGE = 0.01  # of the mean variance of the pixels
_FLOOR = 10.0  # int16 steps: below this it is silence
_MIN_PEAK = {"envelope": 0.15, "model": 0.25}  # below, it is chance
_START = re.compile(r"#\d+\Z")  # where in its video a clip starts; names of videos may have a "#" of their own

Array = NDArray[np.float64]
Method = Literal["envelope", "model"]


def execute(config: CheckSyncConfig) -> int:
    """Writes OUT/histogram.png and OUT/sync.json; returns 0: in sync, 3: shifted, 1: cannot be told.

    With a run there are two estimates: "shifted" by either gives 3, else "in sync" by either gives 0.

    Raises:
        ValueError: no packed data set, clips too short for the shifts to look for, or a run that cannot tell offsets.
    """
    numbers_file, picture = config.out / "sync.json", config.out / "histogram.png"
    if picture.exists() and not numbers_file.exists():
        raise ValueError(f"{picture} is there already, and not of this command: give another --out")
    with PackedDataset(config.data, config.split, verify=False) as dataset:
        estimates = [estimate_offset(dataset, config.clips, config.max_offset_frames)]
        if config.run is not None:
            trained = load_task(config.run, resolve_device(config.device), bf16=False)
            estimates.append(estimate_offset_by_model(trained, dataset, config.clips, config.max_offset_frames))
    verdicts = [_verdict(config, found) for found in estimates]
    numbers: dict[str, object] = {"data": str(config.data), "split": config.split}
    numbers |= _numbers(estimates[0], verdicts[0])
    for found, verdict in zip(estimates[1:], verdicts[1:], strict=True):
        numbers["by_run"] = {"run": str(config.run), **_numbers(found, verdict)}
    write_json(numbers_file, numbers)
    _plot(picture, estimates)
    for found, verdict in zip(estimates, verdicts, strict=True):
        _print(f"{config.data}, {config.split}, {_NAMES[found.method]}: {verdict}", found)
    print(f"  {picture} shows each video's own offset")
    if "shifted" in verdicts:
        return 3
    return 0 if "in sync" in verdicts else 1


def _verdict(config: CheckSyncConfig, found: SyncEstimate) -> str:
    if not found.is_clear:
        return "cannot be told"
    return "shifted" if abs(found.offset_frames) > config.tolerance_frames else "in sync"


def _print(title: str, found: SyncEstimate) -> None:
    print(title)
    if found.is_clear:
        side = "late" if found.offset_frames > 0 else "early"
        print(f"  the sound comes {abs(found.offset_ms):.0f} ms ({abs(found.offset_frames):.1f} frames) {side}")
    else:
        print("  sound and picture have too little to do with each other: no mouths, no speech, or a larger shift")
    figure = "correlation of loudness and picture" if found.method == "envelope" else "mean score, in deviations,"
    reach = f"shifts of up to {int(found.lags[-1])} frames"
    print(f"  {figure} there: {found.peak:.2f} on {len(found.video_offsets):,} videos, {reach}")


def _numbers(found: SyncEstimate, verdict: str) -> dict[str, object]:
    name = "correlation" if found.method == "envelope" else "mean_score"
    return {
        "verdict": verdict,
        "offset_frames": round(found.offset_frames, 3),
        "offset_ms": round(found.offset_ms, 1),
        name: {int(lag): round(float(r), 4) for lag, r in zip(found.lags, found.curve, strict=True)},
        "videos_with_offset": {int(lag): int((found.video_offsets == lag).sum()) for lag in found.lags},
    }


def _plot(path: Path, estimates: Sequence[SyncEstimate]) -> None:
    """One column for each estimate: the histogram of the videos' offsets above the curve."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(7 * len(estimates), 5), layout="constrained")
    axes = figure.subplots(2, len(estimates), sharex=True, squeeze=False)
    for (upper, lower), found in zip(axes.T, estimates, strict=True):
        edges = np.append(found.lags, found.lags[-1] + 1) - 0.5
        upper.hist(found.video_offsets, bins=edges.tolist(), color="tab:blue", rwidth=0.9)
        upper.set_ylabel("videos")
        upper.set_title(f"{_NAMES[found.method]}: offset {found.offset_frames:+.1f} frames ({found.offset_ms:+.0f} ms)")
        lower.plot(found.lags, found.curve, color="tab:orange", marker="o")
        lower.axvline(found.offset_frames, color="tab:grey", linestyle="--")
        lower.set_ylabel(_CURVES[found.method])
        lower.set_xlabel("sound later than picture by, frames of 40 ms")
    content = io.BytesIO()
    figure.savefig(content, dpi=100, format="png")
    write_atomically(path, content.getvalue())


@torch.inference_mode()
def estimate_offset_by_model(
    trained: TrainedTask, dataset: PackedDataset, clips: int, max_offset_frames: int
) -> SyncEstimate:
    """The offset of a data set by a pretrained model: the shift of the sound at which it fits the picture best.

    The model finds the shift that it was trained with, so it must come from data that are in sync.

    Args:
        clips: the most clips to look at.
        max_offset_frames: largest shift to either side, as far as the clips have room beside the model's spans.

    Raises:
        ValueError: the run's task does not compare sound and picture, or the clips are too short for its spans.
    """
    chosen = spread_clips(dataset, clips)
    parts = []
    for indices in torch.from_numpy(chosen).split(_BATCH):
        with autocast(trained.device, trained.bf16):
            parts.append(offset_scores(trained, dataset.batch(indices).to(trained.device)).float().cpu())
    lags, scores = standardise(trained, torch.cat(parts), max_offset_frames)
    return make_estimate(lags, scores, video_numbers(dataset, chosen), "model")


def standardise(
    trained: TrainedTask,
    scores: Tensor,  # [n, L] of offset_scores
    max_offset_frames: int | None = None,
) -> tuple[NDArray[np.int64], Array]:
    """The shifts, in frames, and the scores of each clip with mean 0 and deviation 1 over them.

    Args:
        max_offset_frames: largest shift to keep; None: all.
    """
    step = 1 if trained.task.has_pair_scores else trained.task.offset_frames
    middle = scores.shape[1] // 2
    reach = middle if max_offset_frames is None else min(max_offset_frames // step, middle)
    kept: Array = scores.double().numpy()[:, middle - reach : middle + reach + 1]
    kept = kept - kept.mean(1, keepdims=True)
    return step * np.arange(-reach, reach + 1), kept / np.maximum(kept.std(1, keepdims=True), 1e-12)


def offset_scores(trained: TrainedTask, batch: ClipBatch) -> Tensor:
    """[N, L] how well each sound fits its picture, less how well it fits the batch's pictures on average.

    The latter is subtracted because some sounds, silence among them, score higher than others whatever is seen. A clip
    by itself has nothing to compare with.

    Raises:
        ValueError: the run's task does not compare sound and picture, or the clips are too short for its spans.
    """
    task, generator = trained.task, trained.generator()
    if not task.has_pair_scores:
        scores = task.offset_scores(batch, generator)
        if scores is None:
            raise ValueError(f"run: its task, {trained.config.task}, does not compare sound and picture")
        return scores
    frames = task.span_frames
    if batch.video.shape[1] < frames + 2:
        raise ValueError(f"run: it looks at {frames} frames, clips of {batch.video.shape[1]} leave no room for shifts")
    others = float(len(batch) > 1)
    all_pairs = task.offset_pair_scores(batch, generator)
    return torch.stack([pairs.diagonal() - others * pairs.mean(0) for pairs in all_pairs], 1)


@dataclass(frozen=True, eq=False)
class Offset:
    """How late the sound of one video is, by a pretrained model."""

    overall: SyncEstimate
    """Of the whole video."""
    seconds: Array
    """[n] moments."""
    late_ms: Array
    """[n] how late the sound is there, milliseconds; negative: early; NaN where that cannot be told."""


class OffsetMeter:
    """Compares sound and picture of one video, clip by clip."""

    def __init__(self, trained: TrainedTask) -> None:
        self._trained = trained
        self._waiting: list[DecodedClip] = []
        self._seconds: list[float] = []
        self._scores: list[Tensor] = []
        self._problem: ValueError | None = None

    def add(self, clip: DecodedClip) -> None:
        """Takes the next clip of the video, all of one length; one in silence tells nothing."""
        if self._problem is not None or not bool(clip.audio.any()):
            return
        self._waiting.append(clip)
        self._seconds.append((clip.start_frame + len(clip.video) / 2) / VIDEO_FPS)
        if len(self._waiting) == _BATCH:
            self._compare()

    @torch.inference_mode()
    def _compare(self) -> None:
        clips, self._waiting = self._waiting, []
        batch = ClipBatch.stack([Clip(clip.video, clip.audio) for clip in clips]).to(self._trained.device)
        try:
            with autocast(self._trained.device, self._trained.bf16):
                self._scores.append(offset_scores(self._trained, batch).float().cpu())
        except ValueError as error:
            self._problem = error

    def finish(self) -> Offset:
        """The offset over the video: at each clip's middle from the scores of all within two seconds.

        Raises:
            ValueError: there is no sound, or the run's task does not compare it with the picture.
        """
        if self._waiting:
            self._compare()
        if self._problem is not None:
            raise self._problem
        if not self._scores:
            raise ValueError("the video has no sound")
        lags, scores = standardise(self._trained, torch.cat(self._scores))
        seconds = np.array(self._seconds)
        overall = make_estimate(lags, scores, np.zeros(len(scores), np.int64), "model")
        first, last = (np.searchsorted(seconds, seconds + reach) for reach in (-_NEAR_SECONDS, _NEAR_SECONDS))
        late_ms = np.full(len(seconds), np.nan)
        for place, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            near = make_estimate(lags, scores[begin:end], np.zeros(end - begin, np.int64), "model")
            if near.is_clear:
                late_ms[place] = near.offset_ms
        return Offset(overall, seconds, late_ms)


@dataclass(frozen=True, eq=False)
class SyncEstimate:
    """By how much the sound of a data set is late (positive) or early (negative), in frames of 1/25 s."""

    method: Method
    """How it was found: "envelope", by how loud the sound is, or "model", by a pretrained model."""
    lags: NDArray[np.int64]
    """[L] the shifts tried."""
    curve: Array
    """[L] how well sound and picture fit at each: the correlation between loudness and what the held-out pictures
    predict of it; or the mean of the model's scores, each clip's with mean 0 and deviation 1 over the shifts."""
    video_offsets: NDArray[np.int64]
    """[videos] the best shift of each video alone: scattered where videos are short."""
    offset_frames: float
    """The offset of the whole set: where a parabola through the best shift and its neighbours has its peak."""

    @property
    def peak(self) -> float:
        """The curve at the best shift."""
        return float(self.curve.max())

    @property
    def is_clear(self) -> bool:
        """Whether sound and picture have anything to do with each other, and the peak lies inside the range."""
        best = int(self.curve.argmax())
        others = np.delete(self.curve, range(max(best - 1, 0), min(best + 2, len(self.curve))))
        noise = float(np.std(others)) if len(others) > 2 else 0.0
        inside = 0 < best < len(self.lags) - 1
        return inside and self.peak >= _MIN_PEAK[self.method] and self.peak - float(np.median(others)) > 2 * noise

    @property
    def offset_ms(self) -> float:
        """The offset of the whole set in milliseconds."""
        return 1000 * self.offset_frames / VIDEO_FPS


def estimate_offset(dataset: PackedDataset, clips: int, max_offset_frames: int) -> SyncEstimate:
    """The offset of a data set by how loud the sound is, as the head of this module says.

    Args:
        clips: the most clips to look at.
        max_offset_frames: largest shift to either side.

    Raises:
        ValueError: the clips are too short for such shifts, or all come from one video.
    """
    frames, reach = dataset.shape.frames, max_offset_frames
    if frames < 2 * reach + 4:
        most = (frames - 4) // 2
        raise ValueError(f"max_offset_frames must be at most {most} for clips of {frames} frames, got {reach}")
    chosen = spread_clips(dataset, clips)
    videos = video_numbers(dataset, chosen)
    if videos.max() < 1:
        raise ValueError("the offset is learned from some videos and tested on others: there is only one")
    pictures, loudness = _read(dataset, chosen)
    lags = np.arange(-reach, reach + 1)
    # The same pictures for each lag, so that all lags are compared on equal terms.
    x = pictures[:, reach : frames - reach]  # [n, t, P]
    y = np.stack([loudness[:, reach + lag : frames - reach + lag] for lag in lags])  # [L, n, t]
    y = y - y.mean(2, keepdims=True)
    halves = videos % 2
    predicted = np.empty((len(lags), *x.shape[:2]))  # [L, n, t] by the read-out of the other half
    for half in (0, 1):
        weights = _read_out(x[halves != half], y[:, halves != half])
        predicted[:, halves == half] = np.einsum("ntp,pl->lnt", x[halves == half], weights)
    correlation = np.array([_correlation(predicted[n], y[n]) for n in range(len(lags))])
    best = int(correlation.argmax())
    each_video = _each_video(predicted[best], y, videos, lags)
    return SyncEstimate("envelope", lags, correlation, each_video, float(lags[best]) + _vertex(correlation, best))


def make_estimate(
    lags: NDArray[np.int64],
    scores: Array,  # [n, L] of each clip at each lag
    videos: NDArray[np.int64],  # [n]
    method: Method,
) -> SyncEstimate:
    """The estimate from the clips' scores: the lag with the best mean over all clips, and over each video's own."""
    each_video = np.array([lags[scores[videos == video].mean(0).argmax()] for video in np.unique(videos)])
    curve = scores.mean(0)
    best = int(curve.argmax())
    step = int(lags[1] - lags[0]) if len(lags) > 1 else 1
    return SyncEstimate(method, lags, curve, each_video, float(lags[best]) + step * _vertex(curve, best))


def spread_clips(dataset: PackedDataset, clips: int) -> NDArray[np.int64]:
    """Indices of at most so many clips, evenly spread over the data set."""
    return np.unique(np.linspace(0, len(dataset) - 1, min(clips, len(dataset))).round().astype(np.int64))


def video_numbers(dataset: PackedDataset, clips: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] for each clip the number of its video, from 0."""
    names = [_START.sub("", dataset.sources[clip]) for clip in clips]
    return np.asarray(np.unique(names, return_inverse=True)[1])


def _read(dataset: PackedDataset, clips: NDArray[np.int64]) -> tuple[Array, Array]:
    """[n, T, P] small pictures and [n, T] natural logarithm of the loudness, each less its mean over the clip."""
    pictures, loudness = [], []
    for start in range(0, len(clips), _BATCH):
        batch = dataset.batch(torch.from_numpy(clips[start : start + _BATCH]))
        small = adaptive_avg_pool2d(batch.video.to(torch.float32), _POOLED).flatten(2)
        power = batch.audio.double().unflatten(1, (-1, SAMPLES_PER_FRAME)).square().mean(2)
        pictures.append((small - small.mean(1, keepdim=True)).double().numpy())
        loud = (power.sqrt() + _FLOOR).log()
        loudness.append((loud - loud.mean(1, keepdim=True)).numpy())
    return np.concatenate(pictures), np.concatenate(loudness)


def _read_out(x: Array, y: Array) -> Array:
    """[P, L] for each lag the weights of a ridge regression of the loudness on the pixels of the pictures."""
    flat = x.reshape(-1, x.shape[-1])
    centred = flat - flat.mean(0)
    gram = centred.T @ centred
    gram[np.diag_indices_from(gram)] += _RIDGE * np.trace(gram) / len(gram) + 1e-9
    return np.asarray(np.linalg.solve(gram, centred.T @ y.reshape(len(y), -1).T))


def _correlation(one: Array, other: Array) -> float:
    """Correlation of two arrays [..., T], each clip less its mean over time."""
    one, other = one - one.mean(-1, keepdims=True), other - other.mean(-1, keepdims=True)
    norm = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / norm) if norm > 0 else 0.0


def _each_video(predicted: Array, y: Array, videos: NDArray[np.int64], lags: NDArray[np.int64]) -> NDArray[np.int64]:
    """[videos] the lag at which each video's loudness correlates most with what the set's best lag predicts."""
    scores = np.array(
        [[_correlation(predicted[videos == v], y[n, videos == v]) for n in range(len(lags))] for v in np.unique(videos)]
    )
    return np.asarray(lags[scores.argmax(1)])


def _vertex(values: Array, best: int) -> float:
    """How far beside `best` the parabola through it and its neighbours has its peak, -0.5 to 0.5 steps."""
    if not 0 < best < len(values) - 1:
        return 0.0
    before, peak, after = values[best - 1 : best + 2]
    curve = before - 2 * peak + after
    return float(np.clip((before - after) / (2 * curve), -0.5, 0.5)) if curve < 0 else 0.0
