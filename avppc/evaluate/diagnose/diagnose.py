"""`avppc diagnose`: what a pretrained run can tell apart, and by what.

That includes which words are confused, by how far apart they look, with words as strings of visemes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from avppc.data.packed.dataset import Clips
from avppc.data.source import DataSource
from avppc.evaluate.config import DiagnoseConfig
from avppc.evaluate.diagnose.task import (
    TrainedTask,
    gradient_conflict,
    load_task,
    offset_accuracy,
    retrieval,
    shortcut_report,
    vote_of_neighbours,
)
from avppc.evaluate.lipreading.classifier import VIEWS, encode_split
from avppc.evaluate.lipreading.heads import BinsHead
from avppc.evaluate.lipreading.results import confusion_rates, read_rows
from avppc.files import write_json
from avppc.printing import Console
from avppc.settings import config_to_dict
from avppc.train.hardware import resolve_device, set_up_cpu, use_bf16
from avppc.train.run_folder import source_of

FINDINGS_FILE = "probe.json"  # the command was called probe once

FARTHEST = 4
"""Viseme distances of this or more are counted together."""


def execute(config: DiagnoseConfig) -> int:
    """`avppc diagnose`: measures, writes evaluation/probe.json, and prints it; returns 0."""
    print_findings(diagnose(config))
    return 0


def diagnose(config: DiagnoseConfig) -> dict[str, Any]:
    """All measures asked for, by name; None for one that the run's task does not have."""
    set_up_cpu(config.threads)
    device = resolve_device(config.device)
    trained = load_task(config.run, device, use_bf16(config.precision, device))
    source = source_of(config.run, config.data)
    dataset = source.open(config.split)
    measures: dict[str, Callable[[], Any]] = {
        "retrieval": lambda: retrieval(trained, dataset),
        "offset": lambda: offset_accuracy(trained, dataset),
        "knn": lambda: knn(trained, source, dataset, config.neighbours),
        "shortcut": lambda: shortcut_report(trained, dataset),
        "conflict": lambda: gradient_conflict(
            trained, source.open("train", verify=False), config.conflict_batches, config.seed
        ),
        "visemes": lambda: visemes(config.run),
    }
    console = Console(stderr=True)
    findings: dict[str, Any] = {"settings": config_to_dict(config), "task": trained.config.task}
    for name in config.measures:
        console.print(f"diagnose: {name}")
        findings[name] = measures[name]()
    write_json(config.run / "evaluation" / FINDINGS_FILE, findings)
    return findings


def knn(trained: TrainedTask, source: DataSource, dataset: Clips, neighbours: int) -> dict[str, Any] | None:
    """Words by a vote of the nearest training clips, on features averaged in seven time bins; None without labels."""
    train = source.open("train", verify=False)
    labelled, known = torch.where(train.labels >= 0)[0], torch.where(dataset.labels >= 0)[0]
    if not len(labelled) or not len(known):
        return None
    features = []
    for split, clips in ((train, labelled), (dataset, known)):
        frames = encode_split(trained.task.video_encoder, split, clips, VIEWS[0], trained.device, trained.bf16)
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


def viseme_strings(words: Sequence[str]) -> list[tuple[str, ...]]:
    """The viseme classes of each word as espeak-ng says it in American English; each is named by its first phoneme.

    Raises:
        ImportError: the extra "synth" is not installed.
    """
    try:
        from avppc.synth.visemes import viseme_class
        from avppc.synth.voice import Espeak
    except ImportError as error:
        raise ImportError(f"viseme_strings needs espeak-ng: pip install 'avppc[synth]' ({error})") from error
    espeak = Espeak()
    strings = []
    for word in words:
        speech = espeak.say(word.lower(), "en-us", rate_wpm=160, pitch=50, pitch_range=50)
        strings.append(tuple(viseme_class(p.name) for p in speech.phonemes if not p.is_pause))
    return strings


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """The fewest visemes to insert, delete or replace to turn one string into the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def confusions_by_visemes(counts: Sequence[Sequence[int]], strings: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    """Errors by the distance between the word spoken and the word read.

    Args:
        counts: [words spoken, words predicted].
        strings: the visemes of each word.

    Returns:
        "by_distance": for each distance (FARTHEST: that or more) the share of all errors, the share of the pairs of
        words (which errors at random would have) and their ratio; "groups": the words that look alike.
    """
    rates = confusion_rates(counts)
    words = len(strings)
    if rates.shape != (words, words):
        raise ValueError(f"counts must be a table of {words} words, got shape {rates.shape}")
    distance = np.array([[min(FARTHEST, edit_distance(a, b)) for b in strings] for a in strings])
    off = ~np.eye(words, dtype=bool)
    errors: NDArray[np.float64] = np.asarray(counts, np.float64) * off
    total, pairs = errors.sum(), off.sum()
    found = {}
    for value in range(FARTHEST + 1):
        at = off & (distance == value)
        share, expected = float(errors[at].sum() / max(total, 1.0)), float(at.sum() / max(pairs, 1))
        ratio = share / expected if expected else None
        found[str(value)] = {"share_of_errors": share, "share_of_pairs": expected, "ratio": ratio}
    alike: dict[tuple[str, ...], list[int]] = {}
    for number, string in enumerate(strings):
        alike.setdefault(string, []).append(number)
    return {"by_distance": found, "groups": [members for members in alike.values() if len(members) > 1]}
