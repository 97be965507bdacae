"""The command `avppc check-sync`: histograms, curves, numbers and a verdict."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avppc.data.packed.dataset import PackedDataset
from avppc.evaluate.config_sync import CheckSyncConfig
from avppc.evaluate.diagnose.check_sync_model_sync import estimate_offset_by_model
from avppc.evaluate.diagnose.check_sync_sync import SyncEstimate, estimate_offset
from avppc.evaluate.diagnose.task import load_task
from avppc.files import write_atomically, write_json
from avppc.train.hardware import resolve_device

_NAMES = {"envelope": "by loudness", "model": "by the run"}
_CURVES = {"envelope": "correlation, held out", "model": "mean score, deviations"}


def run(config: CheckSyncConfig) -> int:
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
