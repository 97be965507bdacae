from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mutate_videos
from make_videos import write_video

import avppc.data

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
    assert outcomes.get("altered", 0) <= COUNT * 0.03
