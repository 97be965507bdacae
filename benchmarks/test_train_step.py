"""The training step, and what each part of the library brings over one that does without: at the demo's size on a CPU,
that of the preset "gpu" on a GPU.

Needs the data that `make demo` leaves, in data/demo or where AVPPC_BENCH_DATA says: videos/ and packed/. Each row of
`extra_info["parts"]` is a step with one more part replaced; the seconds saved add up from the first row to the last.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from pathlib import Path

import pytest
import torch
from train_baseline import Trainer, stages

from avppc.config import BenchTrainConfig, PretrainConfig
from avppc.evaluate.bench_train import measure
from avppc.train.hardware import resolve_device

DATA = Path(os.environ.get("AVPPC_BENCH_DATA", Path(__file__).parents[1] / "data" / "demo"))
BUDGET_SECONDS = 12.0  # a stage

pytestmark = pytest.mark.skipif(
    not (DATA / "packed" / "index.json").exists(), reason=f"no data in {DATA}: run `make demo`, or set AVPPC_BENCH_DATA"
)


def step_seconds(trainer: Trainer) -> float:
    """Median seconds of a step, two not counted."""
    seconds: list[float] = []
    end = time.perf_counter() + BUDGET_SECONDS
    while len(seconds) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        trainer.step()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def test_train_step(benchmark) -> None:
    """Clips a second of `avppc pretrain`'s step by spans, against the straightforward one, and the parts between."""
    device = resolve_device("auto")
    preset = "gpu" if device.type == "cuda" else "laptop"
    config = PretrainConfig.from_preset(preset, DATA / "packed", DATA)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, moments="none"))
    videos = sorted((DATA / "videos").glob("*/train/*.mp4"))
    times = {}
    for name, parts in stages().items():
        trainer = Trainer(config, parts, videos, device)
        times[name] = step_seconds(trainer)
        trainer.close()
    result = measure(BenchTrainConfig(DATA / "packed", preset, steps=20, moments="none"))
    times["+ the step of pretrain"] = result.step_seconds
    names, clips = list(times), config.batch_size
    saved = [times[before] - times[after] for before, after in itertools.pairwise(names)]
    rows = [
        {"step": name, "seconds": times[name], "saved_seconds": gain, "clips_per_second": clips / times[name]}
        for name, gain in zip(names, [0.0, *saved], strict=True)
    ]
    assert sum(saved) == pytest.approx(times[names[0]] - times[names[-1]])
    benchmark.extra_info.update(
        parts=rows,
        preset=preset,
        speedup=times["straightforward"] / result.step_seconds,
        **dataclasses.asdict(result),
    )
    for row in rows:
        saved_text = f"{row['saved_seconds']:9.3f} s saved"
        print(f"{row['step']:<28}{row['seconds']:8.3f} s{saved_text}{row['clips_per_second']:9.1f} clips/s")
    print(f"{benchmark.extra_info['speedup']:.1f} times the straightforward step; {result}")
    benchmark.pedantic(lambda: None, rounds=1)
