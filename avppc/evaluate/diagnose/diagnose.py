"""`avppc probe`: what a pretrained run can tell apart, and by what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from avppc.data.packed.dataset import PackedDataset
from avppc.evaluate.config_probe import ProbeConfig
from avppc.evaluate.diagnose.diagnose_viseme_confusion import confusions_by_visemes, viseme_strings
from avppc.evaluate.diagnose.task import (
    TrainedTask,
    gradient_conflict,
    load_task,
    offset_accuracy,
    retrieval,
    shortcut_report,
)
from avppc.evaluate.diagnose.task_ranking import vote_of_neighbours
from avppc.evaluate.lipreading.heads import BinsHead
from avppc.evaluate.lipreading.inputs import VIEWS, encode_split
from avppc.evaluate.lipreading.results import read_rows
from avppc.files import write_json
from avppc.printing import Console
from avppc.settings import config_to_dict
from avppc.train.hardware import keep_memory, resolve_device, use_bf16
from avppc.train.run_folder import data_of

PROBE_FILE = "probe.json"


def run(config: ProbeConfig) -> int:
    """`avppc probe`: measures, writes evaluation/probe.json, and prints it; returns 0."""
    print_findings(probe(config))
    return 0


def probe(config: ProbeConfig) -> dict[str, Any]:
    """All measures asked for, by name; None for one that the run's task does not have."""
    if config.threads:
        torch.set_num_threads(config.threads)
    keep_memory()
    device = resolve_device(config.device)
    trained = load_task(config.run, device, use_bf16(config.precision, device))
    data = data_of(config.run, config.data)
    dataset = PackedDataset(data, config.split)
    measures: dict[str, Callable[[], Any]] = {
        "retrieval": lambda: retrieval(trained, dataset),
        "offset": lambda: offset_accuracy(trained, dataset),
        "knn": lambda: knn(trained, data, dataset, config.neighbours),
        "shortcut": lambda: shortcut_report(trained, dataset),
        "conflict": lambda: gradient_conflict(
            trained, PackedDataset(data, "train", verify=False), config.conflict_batches, config.seed
        ),
        "visemes": lambda: visemes(config.run),
    }
    console = Console(stderr=True)
    findings: dict[str, Any] = {"settings": config_to_dict(config), "task": trained.config.task}
    for name in config.measures:
        console.print(f"probe: {name}")
        findings[name] = measures[name]()
    write_json(config.run / "evaluation" / PROBE_FILE, findings)
    return findings


def knn(trained: TrainedTask, data: Path, dataset: PackedDataset, neighbours: int) -> dict[str, Any] | None:
    """Words by a vote of the nearest training clips, on features averaged in seven time bins; None without labels."""
    train = PackedDataset(data, "train", verify=False)
    labelled, known = torch.where(train.labels >= 0)[0], torch.where(dataset.labels >= 0)[0]
    if not len(labelled) or not len(known):
        return None
    features = []
    for split, rows in ((train, labelled), (dataset, known)):
        frames = encode_split(trained.task.video_encoder, split, rows, VIEWS[0], trained.device, trained.bf16)
        bins = torch.nn.functional.adaptive_avg_pool1d(frames.transpose(1, 2), BinsHead.BINS)
        features.append(bins.flatten(1))
    mean, deviation = features[0].mean(0), features[0].std(0) + 1e-3
    ours, theirs = ((part - mean) / deviation for part in features)
    chosen = vote_of_neighbours(ours, train.labels[labelled], theirs, neighbours)
    return {
        "clips": len(known),
        "neighbours": neighbours,
        "accuracy": (chosen == dataset.labels[known]).float().mean().item(),
        "chance": 1 / len(train.words),
    }


def visemes(run: Path) -> dict[str, Any] | None:
    """Confusions of the run's evaluated rows by how far apart the words look; None if nothing was evaluated."""
    rows = [row for row in read_rows(run) if row.row in ("frozen", "finetuned")]
    if not rows:
        return None
    strings = viseme_strings(rows[0].words)
    found = {}
    for row in rows:
        finding = confusions_by_visemes(row.confusion, strings)
        finding["groups"] = [[row.words[word] for word in group] for group in finding["groups"]]
        found[f"{row.row}-{row.labels_per_word or 'all'}"] = finding
    return found


def print_findings(findings: dict[str, Any]) -> None:
    """Prints a few tables to standard output."""
    console = Console(width=110)
    simple = Table("measure", "value", "chance", title=f"Probe of a run of {findings['task']}")
    if found := findings.get("retrieval"):
        for way in ("sound_by_picture", "picture_by_sound"):
            for name, value in found[way].items():
                if name.startswith("r@"):
                    chance = int(name[2:]) / found["clips"]
                    simple.add_row(f"{way.replace('_', ' ')}, {name.upper()}", f"{value:.1%}", f"{chance:.1%}")
    if found := findings.get("offset"):
        name = f"offset within {found['within_frames']} frame, of {found['offsets']} offsets"
        simple.add_row(name, f"{found['accuracy']:.1%}", f"{found['chance']:.1%}")
    if found := findings.get("knn"):
        simple.add_row(
            f"words by {found['neighbours']} neighbours", f"{found['accuracy']:.1%}", f"{found['chance']:.1%}"
        )
    if simple.row_count:
        console.print(simple)
    if found := findings.get("shortcut"):
        columns = list(found["accuracy"])
        table = Table("sub-tasks", *(name.replace("_", " ") for name in columns), title="Accuracy by the candidates")
        for kind, rates in found["by_kind"].items():
            table.add_row(kind, *(f"{rates[name]:.1%}" for name in columns))
        console.print(table)
    if found := findings.get("conflict"):
        table = Table("", *found["groups"], title="Cosines of the gradients at the visual encoder")
        for kind, line in zip(found["groups"], found["cosines"], strict=True):
            table.add_row(kind, *(f"{value:+.2f}" for value in line))
        console.print(table)
    for name, finding in (findings.get("visemes") or {}).items():
        table = Table("visemes apart", "share of errors", "share of pairs", "ratio", title=f"Confusions, {name}")
        for distance, shares in finding["by_distance"].items():
            ratio = "" if shares["ratio"] is None else f"{shares['ratio']:.1f}"
            table.add_row(distance, f"{shares['share_of_errors']:.1%}", f"{shares['share_of_pairs']:.1%}", ratio)
        console.print(table)
