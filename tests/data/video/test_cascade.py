"""OpenCV's cascade itself, on rendered talking heads.

It needs OpenCV 4; the synthetic data are drawn by version 5, which has no cascades. So an OpenCV 4 lies in a folder of
its own beside the environment (`make setup` puts it there), for processes that ask for it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import find_mouths
import numpy as np
import pytest

import avppc.data
from avppc.data.packed.dataset import PackedDataset
from avppc.synth.config import SynthConfig

FOLDER = Path(os.environ.get("AVPPC_OPENCV4", Path(sys.prefix) / "opencv4"))
MOUTH = (127, 163)  # column and row of the middle of LRW's window, where the talking heads have it
CLIPS = 6


def with_cascades(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of this Python with an OpenCV that has cascades."""
    folders = [str(FOLDER), str(Path(avppc.data.__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    """Talking heads, one a speaker."""
    if importlib.util.find_spec("espeakng_loader") is None:
        pytest.skip("rendering needs the extra synth")
    if not FOLDER.is_dir():
        pytest.skip(f"no OpenCV 4 in {FOLDER}: `make test` puts it there")
    from avppc.synth.dataset import execute

    out = tmp_path_factory.mktemp("heads") / "set"
    config = SynthConfig(
        out, words=CLIPS, clips_per_word=1, val_clips_per_word=0, test_clips_per_word=0, difficulty="easy", workers=1
    )
    assert execute(config) == 0
    return out


def test_mouths_are_found_where_they_are(heads):
    paths = [str(path) for path in sorted(heads.rglob("*.mp4"))]
    assert len(paths) == CLIPS
    result = with_cascades(find_mouths.__file__, *paths)
    assert result.returncode == 0, result.stderr[-2000:]
    places = [place for faces in json.loads(result.stdout).values() for place in faces]
    found = np.array([place for place in places if place is not None])
    assert len(found) > 0.4 * len(places)
    distance = np.hypot(*(found - MOUTH).T)
    assert np.median(distance) < 20
    assert (distance < 40).mean() > 0.9


def test_prepare_crops_talking_heads(heads, tmp_path):
    out = tmp_path / "packed"
    flags = ["--data", str(heads), "--out", str(out), "--crop", "cascade", "--workers", "1"]
    result = with_cascades("-m", "avppc", "prepare", *flags)
    assert result.returncode in (0, 3), result.stderr[-2000:]
    refused = [json.loads(line)["reason"] for line in (out / "refused.jsonl").read_text().splitlines()]
    assert all(reason.startswith("no face to follow") for reason in refused)
    with PackedDataset(out) as dataset:
        assert len(dataset) + len(refused) == CLIPS
        assert len(dataset) >= CLIPS / 4
        assert dataset.shape.height == 96
    assert (out / "crops.png").is_file()
