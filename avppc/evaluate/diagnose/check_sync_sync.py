"""The offset between sound and picture of a data set, by how loud the sound is (evaluate/check_sync.py is the command).

No model of a mouth is needed: a linear read-out of the small picture is fitted to how loud the sound is, at each shift
of one against the other, on one half of the videos; the shift at which it predicts the other half best is the offset.
In effect it learns to read the mouth's opening, wherever the crop shows it, dark or bright.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import adaptive_avg_pool2d

from avppc.clip import SAMPLES_PER_FRAME, VIDEO_FPS
from avppc.data.packed.dataset import PackedDataset

_POOLED = 12  # pixels a side of the picture that is read
_RIDGE = 0.01  # of the mean variance of the pixels
_FLOOR = 10.0  # int16 steps: below this it is silence
_MIN_PEAK = {"envelope": 0.15, "model": 0.25}  # below, it is chance
_BATCH = 64
_START = re.compile(r"#\d+\Z")  # where in its video a clip starts; names of videos may have a "#" of their own

Array = NDArray[np.float64]
Method = Literal["envelope", "model"]


@dataclass(frozen=True, eq=False)
class SyncEstimate:
    """Offsets are in frames of 1/25 s; positive: the sound comes late."""

    method: Method
    """By how loud the sound is, or by a pretrained model."""
    lags: NDArray[np.int64]
    """[L] the shifts tried."""
    curve: Array
    """[L] how well sound and picture fit at each: the correlation between loudness and what the held-out pictures
    predict of it; or the mean of the model's scores, each clip's with mean 0 and deviation 1 over the shifts."""
    video_offsets: NDArray[np.int64]
    """[videos] the best shift of each video alone: scattered where videos are short."""
    offset_frames: float
    """Of the whole set, between frames by a parabola through the peak."""

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
        """The same in milliseconds."""
        return 1000 * self.offset_frames / VIDEO_FPS


def estimate_offset(dataset: PackedDataset, clips: int, max_offset_frames: int) -> SyncEstimate:
    """The offset of a data set.

    Args:
        clips: most clips looked at.
        max_offset_frames: largest shift to either side.

    Raises:
        ValueError: the clips are too short for such shifts, or all come from one video.
    """
    frames, reach = dataset.shape.frames, max_offset_frames
    if frames < 2 * reach + 4:
        most = (frames - 4) // 2
        raise ValueError(f"max_offset_frames must be at most {most} for clips of {frames} frames, got {reach}")
    rows = chosen_rows(dataset, clips)
    videos = video_numbers(dataset, rows)
    if videos.max() < 1:
        raise ValueError("the offset is learned from some videos and tested on others: there is only one")
    pictures, loudness = _read(dataset, rows)
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
    """What the clips' scores say together; each video by the mean of its clips."""
    each_video = np.array([lags[scores[videos == video].mean(0).argmax()] for video in np.unique(videos)])
    curve = scores.mean(0)
    best = int(curve.argmax())
    step = int(lags[1] - lags[0]) if len(lags) > 1 else 1
    return SyncEstimate(method, lags, curve, each_video, float(lags[best]) + step * _vertex(curve, best))


def chosen_rows(dataset: PackedDataset, clips: int) -> NDArray[np.int64]:
    """At most so many clips of a set, evenly chosen."""
    return np.unique(np.linspace(0, len(dataset) - 1, min(clips, len(dataset))).round().astype(np.int64))


def video_numbers(dataset: PackedDataset, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] equal for clips of the same video, 0 to the number of videos - 1."""
    names = [_START.sub("", dataset.sources[row]) for row in rows]
    return np.asarray(np.unique(names, return_inverse=True)[1])


def _read(dataset: PackedDataset, rows: NDArray[np.int64]) -> tuple[Array, Array]:
    """[n, T, P] small pictures and [n, T] ln loudness, each without its mean over time."""
    pictures, loudness = [], []
    for start in range(0, len(rows), _BATCH):
        batch = dataset.batch(torch.from_numpy(rows[start : start + _BATCH]))
        small = adaptive_avg_pool2d(batch.video.to(torch.float32), _POOLED).flatten(2)
        power = batch.audio.double().unflatten(1, (-1, SAMPLES_PER_FRAME)).square().mean(2)
        pictures.append((small - small.mean(1, keepdim=True)).double().numpy())
        loud = (power.sqrt() + _FLOOR).log()
        loudness.append((loud - loud.mean(1, keepdim=True)).numpy())
    return np.concatenate(pictures), np.concatenate(loudness)


def _read_out(x: Array, y: Array) -> Array:
    """[P, L] ridge regression of each lag's loudness on the pictures."""
    flat = x.reshape(-1, x.shape[-1])
    centred = flat - flat.mean(0)
    gram = centred.T @ centred
    gram[np.diag_indices_from(gram)] += _RIDGE * np.trace(gram) / len(gram) + 1e-9
    return np.asarray(np.linalg.solve(gram, centred.T @ y.reshape(len(y), -1).T))


def _correlation(one: Array, other: Array) -> float:
    """Of two arrays of clips, each clip without its mean."""
    one, other = one - one.mean(-1, keepdims=True), other - other.mean(-1, keepdims=True)
    norm = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / norm) if norm > 0 else 0.0


def _each_video(predicted: Array, y: Array, videos: NDArray[np.int64], lags: NDArray[np.int64]) -> NDArray[np.int64]:
    """The lag at which each video's loudness follows what the read-out of the best lag sees."""
    scores = np.array(
        [[_correlation(predicted[videos == v], y[n, videos == v]) for n in range(len(lags))] for v in np.unique(videos)]
    )
    return np.asarray(lags[scores.argmax(1)])


def _vertex(values: Array, best: int) -> float:
    """Where between its neighbours the peak lies, -0.5 to 0.5."""
    if not 0 < best < len(values) - 1:
        return 0.0
    before, peak, after = values[best - 1 : best + 2]
    curve = before - 2 * peak + after
    return float(np.clip((before - after) / (2 * curve), -0.5, 0.5)) if curve < 0 else 0.0
