"""The commands whose file operations go wrong, at the smallest size that has all of them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(_TESTS / folder) for folder in ("data/video", "train")]

from make_videos import write_lrw_tree  # noqa: E402 - after the path
from tiny_runs import write_tiny_set  # noqa: E402 - after the path

TINY = ["--steps", "2", "--batch-size", "8", "--log-every", "1", "--checkpoint-every", "1", "--device", "cpu"]
TINY += ["--threads", "1", "--encoder.width", "8", "--encoder.features", "16", "--audio-width", "4"]
TINY += ["--objective.dim", "16", "--keep-checkpoints", "1"]
TABLE = "batch_size=8;encoder.width=8;encoder.features=16;audio_width=4;objective.dim=16;checkpoint_every=1;log_every=1"
QUICK = ["--epochs", "1", "--training-epochs", "1", "--selection-epochs", "1", "--heads", "bins", "--head-hidden", "8"]
QUICK += ["--rows", "random", "frozen", "--labels-per-word", "2", "--draws", "1", "--device", "cpu", "--threads", "1"]
_LOST = ("metrics.jsonl", "train.log", "tensorboard", "tensorboard/events", "checkpoints/step_00000001*")
"""What a run may lack that went on without it, or have left: an old checkpoint that could not be removed."""


@dataclass(frozen=True)
class Case:
    """A command that writes below a folder."""

    name: str
    arguments: Callable[[Path, Path], Sequence[str]]
    """From the folders of the inputs and of the work."""
    needs_run: bool = False
    """Whether a finished run has to be at work/run."""
    codes: tuple[int, ...] = (0,)
    """Exit codes of a command that has done its work."""
    may_lose: tuple[str, ...] = ()
    """Patterns of files that may differ or be missing where a disk has failed and the command has gone on."""
    refuses: int | None = None
    """Exit code of a command that has left out what it could not read, if it does; it tries that again."""


CASES = (
    Case(
        "synth",
        lambda inputs, work: [
            *("synth", "--out", str(work / "set"), "--words", "1", "--clips-per-word", "1", "--val-clips-per-word"),
            *("0", "--test-clips-per-word", "1", "--train-speakers", "1", "--val-speakers", "1", "--test-speakers"),
            *("1", "--workers", "1"),
        ],
    ),
    Case(
        "index",
        lambda inputs, work: [
            "index",
            "--data",
            str(inputs / "videos"),
            "--out",
            str(work / "list.jsonl"),
            "--workers",
            "1",
        ],
        refuses=3,
    ),
    Case(
        "prepare",
        lambda inputs, work: [
            *("prepare", "--data", str(inputs / "videos"), "--out", str(work / "packed"), "--workers", "1"),
        ],
        refuses=3,
    ),
    Case(
        "pretrain",
        lambda inputs, work: ["pretrain", "--data", str(inputs / "packed"), "--out", str(work / "run"), *TINY],
        may_lose=tuple(f"run/{name}" for name in _LOST),
    ),
    Case(
        "evaluate",
        lambda inputs, work: ["evaluate", "--run", str(work / "run"), *QUICK, "--workers", "2"],
        needs_run=True,
    ),
    Case(
        "table",
        lambda inputs, work: [
            *("table", "--data", str(inputs / "packed"), "--out", str(work / "table"), "--device", "cpu"),
            *("--tasks", f"time-arrow:{TABLE}", "--labels", "1", "--heads", "bins", "--no-finetune", "--steps", "1"),
            *("--draws", "1", "--training-draws", "1", "--most-clips", "1", "--threads", "1", "--workers", "1"),
        ],
        may_lose=tuple(f"table/runs/*/{name}" for name in _LOST),
    ),
    Case(
        "diagnose",
        lambda inputs, work: [
            *("diagnose", "--run", str(work / "run"), "--device", "cpu", "--threads", "1", "--conflict-batches", "1"),
        ],
        needs_run=True,
    ),
    Case(
        "check-sync",
        lambda inputs, work: ["check-sync", "--data", str(inputs / "packed"), "--out", str(work / "sync")],
    ),
    Case("report", lambda inputs, work: ["report", "--run", str(work / "run")], needs_run=True),
    Case(
        "export",
        lambda inputs, work: [
            *("export", str(work / "run"), "--out", str(work / "exported"), "--formats", "safetensors"),
        ],
        needs_run=True,
    ),
    Case(
        "export graphs",
        lambda inputs, work: [
            *("export", str(work / "run"), "--out", str(work / "exported"), "--formats", "torch-export", "onnx"),
        ],
        needs_run=True,
    ),
    Case(
        "read",
        lambda inputs, work: [
            *("read", str(_video(inputs)), "--run", str(inputs / "measured"), "--out", str(work / "read.html")),
            *("--json", str(work / "read.json"), "--device", "cpu", "--threads", "1"),
        ],
    ),
    Case("embed npz", lambda inputs, work: _embed(inputs, work, "npz"), needs_run=True),
    Case("embed parquet", lambda inputs, work: _embed(inputs, work, "parquet"), needs_run=True),
    Case(
        "features",
        lambda inputs, work: [
            *("features", str(_video(inputs)), "--out", str(work / "features.npy")),
            *("--plot", str(work / "features.png")),
        ],
    ),
)


def _video(inputs: Path) -> Path:
    return inputs / "videos" / "OPEN" / "train" / "OPEN_00001.mp4"


def _embed(inputs: Path, work: Path, ending: str) -> list[str]:
    out = str(work / f"features.{ending}")
    return ["embed", str(inputs / "packed"), "--encoder", str(work / "run"), "--out", out, "--device", "cpu"]


def write_inputs(folder: Path, command: Callable[[list[str]], int | None]) -> None:
    """Makes videos, a packed set and, by the command, a finished run and one with a lip reader."""
    write_lrw_tree(folder / "videos", ["OPEN"], {"train": 2, "val": 1})
    write_tiny_set(folder / "packed")
    assert command(["pretrain", "--data", str(folder / "packed"), "--out", str(folder / "run"), *TINY]) == 0
    shutil.copytree(folder / "run", folder / "measured")
    assert command(["evaluate", "--run", str(folder / "measured"), *QUICK, "--workers", "1"]) == 0


def clear_work(case: Case, inputs: Path, work: Path) -> None:
    """Makes the folder as it is before the command."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if case.needs_run:
        shutil.copytree(inputs / "run", work / "run")
