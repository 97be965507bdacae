"""Directories of runs made up for the tests of the report, and a reader of its pages."""

from __future__ import annotations

import html.parser
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avppc.config import CutConfig, EvaluateConfig, OptimizerConfig, PretrainConfig
from avppc.data.packed.index import SHARD_FOLDER, PackedIndex
from avppc.data.packed.shard import ClipShape, ShardWriter
from avppc.evaluate.lipreading.results import RowResult, mean_and_interval, write_row
from avppc.files import sha256_of, write_json
from avppc.losses.subtasks import SUBTASKS
from avppc.settings import config_to_dict

WORDS = ("ABOUT", "<B>", "C&语", "$x$ -->", "BILLION")
SHAPE = ClipShape(29, 12, 12)
RATES = {"random": 0.25, "supervised": 0.4, "frozen": 0.62, "finetuned": 0.66, "ceiling": 0.9}
TESTED = 500


def write_clips(directory: Path, words: Sequence[str] = WORDS, per_word: int = 2) -> Path:
    """A packed test split; frame f of clip n is all 8 f + n."""
    (directory / SHARD_FOLDER).mkdir(parents=True)
    writer = ShardWriter(SHAPE, len(words) * per_word)
    for number in range(writer.capacity):
        frames = (8 * np.arange(SHAPE.frames) + number).astype(np.uint8)
        audio = np.random.default_rng(number).integers(-9000, 9000, SHAPE.samples).astype(np.int16)
        writer.add(
            f"clips/<{number}>.mp4",
            video=np.broadcast_to(frames[:, None, None], (SHAPE.frames, SHAPE.height, SHAPE.width)),
            audio=audio,
            label=number % len(words),
            clip_id=number,
            speaker=0,
        )
    record = writer.write(directory / SHARD_FOLDER / "test-00000.safetensors")
    PackedIndex(SHAPE, tuple(words), {"test": (record,)}).write(directory)
    return directory


def write_run(run: Path, data: Path, *, steps: int = 60, logged: int = 60, log_every: int = 5) -> PretrainConfig:
    """Settings and log of a run that got to step `logged`; returns its configuration."""
    config = PretrainConfig(
        data,
        run,
        steps=steps,
        batch_size=16,
        log_every=log_every,
        verify_data=False,
        cut=CutConfig(past_frames=12, gap_frames=3, future_frames=12),
        optimizer=OptimizerConfig(learning_rate=1.5e-3),
    )
    write_json(run / "config.json", config_to_dict(config))
    write_json(run / "environment.json", {"avppc": "9.8.7", "torch": "6.5.4", "machine": "riscv<64>"})
    names = [subtask.name for subtask in SUBTASKS]
    write_json(run / "task.json", {"task_loss": names, "task_accuracy": names})
    rows = [_metrics_row(step) for step in range(log_every, logged + 1, log_every)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


def _metrics_row(step: int) -> dict[str, Any]:
    generator = np.random.default_rng(step)
    loss = math.log(16) * np.exp(-step / 40) * generator.uniform(0.8, 1.0, len(SUBTASKS))
    row = {"step": step, "learning_rate": 1e-3, "grad_norm": 1.0, "loss": float(loss.mean())}
    speed = {"clips_per_second": 160.0, "data_wait": 0.015}
    return {**row, **speed, "task_loss": loss.tolist(), "task_accuracy": np.exp(-loss).tolist()}


def make_row(
    run: Path, row: str, rate: float | None = None, labels: int = 10, words: Sequence[str] = WORDS, **changes: Any
) -> RowResult:
    """A row of the table, with a confusion matrix and draws that fit its rate."""
    wcr = RATES[row] if rate is None else rate
    settings = config_to_dict(EvaluateConfig(run, labels_per_word=labels, draws=3, heads=("gru", "bins")))
    for name in ("rows", "run", "threads", "trajectories"):
        del settings[name]
    encoder = run / "encoder.safetensors"
    settings["task"] = "av-permutative"
    settings["encoder_sha256"] = sha256_of(encoder) if encoder.exists() else "0" * 64
    trains = row in ("supervised", "finetuned")
    trials: list[dict[str, Any]] = [
        {"head": head, "head_learning_rate": 0.003, "encoder_learning_rate": 0.001 if trains else None, "val_wcr": val}
        for head, val in (("gru", wcr - 0.031), ("bins", wcr - 0.017))
    ]
    draws = [
        {"seed": seed, "val_wcr": wcr + 0.005, "test_wcr": wcr + change} for seed, change in enumerate((-0.01, 0, 0.01))
    ]
    mean, half = mean_and_interval([draw["test_wcr"] for draw in draws], TESTED)
    right = round(100 * wcr)
    confusion = np.full((len(words), len(words)), 1) + right * np.eye(len(words), dtype=int)
    confusion[0, -1] += 40
    values: dict[str, Any] = {
        "row": row,
        "labels_per_word": labels,
        "wcr": mean,
        "interval95": half,
        "chance": 1 / len(words),
        "chosen": {name: trials[1][name] for name in ("head", "head_learning_rate", "encoder_learning_rate")},
        "trials": trials,
        "draws": draws,
        "words": list(words),
        "tested": TESTED,
        "confusion": confusion.tolist(),
        "seconds": 125.0,
        "settings": settings,
    }
    return RowResult(**{**values, **changes})


def write_evaluation(run: Path, labels: int = 10) -> list[RowResult]:
    """All rows of a table; returns them."""
    rows = [make_row(run, row, labels=labels) for row in RATES]
    for row in rows:
        write_row(run, row)
    return rows


class Page(html.parser.HTMLParser):
    """What a reader finds in a page: texts, tables, elements; fails where an element is not closed."""

    _VOID = ("meta", "img", "link", "br", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        """All text, whitespace collapsed, spaces that do not break as spaces."""
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get(name)) is not None]

    def row(self, *cells: str) -> list[str]:
        """The one table row that begins with these cells."""
        found = [row for row in self.rows if tuple(row[: len(cells)]) == cells]
        assert len(found) == 1, (cells, found)
        return found[0]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self._VOID:
            return
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            return
        self.texts.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data.replace("\u00a0", " ")
