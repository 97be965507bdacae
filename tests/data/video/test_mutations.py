from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mutate_videos
import numpy as np
from make_videos import write_video

import avppc.data
from avppc.data.config import IndexConfig, PrepareConfig
from avppc.data.packed.dataset import PackedDataset
from avppc.data.prepare import index, prepare

COUNT = int(os.environ.get("AVPPC_MUTATIONS", "300"))


def test_damaged_videos_are_refused_or_whole(tmp_path):
    """No crash, no hang, no exception but DecodeError, no clip shorter than asked for."""
    small = {"size": (64, 64), "options": {"preset": "ultrafast"}}
    videos = [
        write_video(tmp_path / "plain.mp4", **small),
        write_video(tmp_path / "fast.mp4", container_options={"movflags": "faststart"}, **small),
        write_video(tmp_path / "stereo.mkv", rate=44_100, layout="stereo", **small),
        write_video(tmp_path / "long.mp4", frames=70, **small),
    ]
    result = subprocess.run(
        [sys.executable, mutate_videos.__file__, str(COUNT), *map(str, videos)],
        env={**os.environ, "PYTHONPATH": str(Path(avppc.data.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60 + COUNT,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2_000:]
    outcomes = json.loads(result.stdout.splitlines()[-1])
    assert sum(outcomes.values()) == COUNT
    # Most damage is noticed; some bits (padding, metadata) harm nothing.
    assert outcomes["refused"] > COUNT / 2
    assert outcomes["used"] > 0
    # Some damage cannot be told from content: mp4 has no checksums, and not each wrong bit breaks a decoder's rules.
    assert outcomes.get("altered", 0) <= COUNT * 0.02


def test_with_a_manifest_no_damaged_video_passes(tmp_path):
    """Size and time of the files stay where the damage lets them: the checksum alone tells."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    small = {"size": (64, 64), "options": {"preset": "ultrafast"}}
    contents = [write_video(tmp_path / f"{n}.mp4", seed=n, frames=29 + 15 * n, **small).read_bytes() for n in range(3)]
    paths = [data / f"{number}.mp4" for number in range(COUNT)]
    for number, path in enumerate(paths):
        path.write_bytes(contents[number % 3])
    assert index.execute(IndexConfig(data)) == 0
    rng = np.random.default_rng(1)
    whole = set()
    for number, path in enumerate(paths):
        content, status = contents[number % 3], path.stat()
        damaged = mutate_videos.mutate(content, rng) if number % 5 else content
        path.write_bytes(damaged)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        if damaged == content:
            whole.add(path.name)
    assert len(whole) < COUNT / 4
    assert prepare.execute(PrepareConfig(data, out, stride=0)) == 3
    with PackedDataset(out) as dataset:
        assert set(dataset.sources) == whole
    reasons = [json.loads(line)["reason"] for line in (out / "refused.jsonl").read_text().splitlines()]
    assert len(reasons) == COUNT - len(whole)
    assert all(reason.startswith(("changed since it was listed", "the file is empty")) for reason in reasons)
