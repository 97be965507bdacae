"""The command `avppc check-sync`: a histogram, a curve, numbers and a verdict."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from avppc.config.sync import CheckSyncConfig
from avppc.data.packed import PackedDataset
from avppc.data.sync import SyncEstimate, estimate_offset
from avppc.files import write_json


def run(config: CheckSyncConfig) -> int:
    """Writes OUT/histogram.png and OUT/sync.json; 0: in sync, 3: shifted, 1: it cannot be told.

    Raises:
        ValueError: no packed data set, or clips too short for the shifts looked for.
    """
    with PackedDataset(config.data, config.split, verify=False) as dataset:
        found = estimate_offset(dataset, config.clips, config.max_offset_frames)
    shifted = abs(found.offset_frames) > config.tolerance_frames
    verdict = "cannot be told" if not found.is_clear else "shifted" if shifted else "in sync"
    write_json(config.out / "sync.json", _numbers(config, found, verdict))
    _plot(config.out / "histogram.png", found)
    print(f"{config.data}, {config.split}: {verdict}")
    if found.is_clear:
        side = "late" if found.offset_frames > 0 else "early"
        print(f"  the sound comes {abs(found.offset_ms):.0f} ms ({abs(found.offset_frames):.1f} frames) {side}")
    else:
        print("  sound and picture have too little to do with each other: no mouths, no speech, or a larger shift")
    print(f"  correlation of loudness and picture there: {found.peak:.2f} on {len(found.video_offsets):,} videos")
    print(f"  {config.out / 'histogram.png'} shows each video's own offset")
    return 1 if not found.is_clear else 3 if shifted else 0


def _numbers(config: CheckSyncConfig, found: SyncEstimate, verdict: str) -> dict[str, object]:
    counts = {int(lag): int((found.video_offsets == lag).sum()) for lag in found.lags}
    return {
        "data": str(config.data),
        "split": config.split,
        "verdict": verdict,
        "offset_frames": round(found.offset_frames, 3),
        "offset_ms": round(found.offset_ms, 1),
        "correlation": {int(lag): round(float(r), 4) for lag, r in zip(found.lags, found.correlation, strict=True)},
        "videos_with_offset": counts,
    }


def _plot(path: Path, found: SyncEstimate) -> None:
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(figsize=(7, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    edges = np.append(found.lags, found.lags[-1] + 1) - 0.5
    upper.hist(found.video_offsets, bins=edges.tolist(), color="tab:blue", rwidth=0.9)
    upper.set_ylabel("videos")
    upper.set_title(f"offset {found.offset_frames:+.1f} frames ({found.offset_ms:+.0f} ms)")
    lower.plot(found.lags, found.correlation, color="tab:orange", marker="o")
    lower.axvline(found.offset_frames, color="tab:grey", linestyle="--")
    lower.set_ylabel("correlation, held out")
    lower.set_xlabel("sound later than picture by, frames of 40 ms")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
