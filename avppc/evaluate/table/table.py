"""`avppc table`: every proxy task under one encoder, one budget and one evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from avppc.data.packed.dataset import PackedDataset, check_data_apart, split_sha256
from avppc.evaluate.config import EvaluateConfig, TableConfig
from avppc.evaluate.lipreading.classifier import HELD_OUT_SPLITS
from avppc.evaluate.lipreading.evaluate import evaluate, settings_of
from avppc.evaluate.lipreading.fits import check_words
from avppc.evaluate.lipreading.results import read_row
from avppc.evaluate.table.pages import to_markdown, write_pages
from avppc.evaluate.table.plan import Cell, Entry, cells_of, entries_of
from avppc.evaluate.table.results import CellResult, RunCost, Table, read_cost
from avppc.files import check_vacant, write_json
from avppc.models.encoder_file import ENCODER_FILE, save_encoder
from avppc.models.video import VideoEncoder
from avppc.printing import Console
from avppc.settings import config_to_dict, write_checked_json
from avppc.tasks.registry import make_task
from avppc.train.config import PretrainConfig
from avppc.train.loop import pretrain
from avppc.train.run_folder import CONFIG_FILE, data_of, is_same_run


def execute(config: TableConfig) -> int:
    """`avppc table`: makes the table and prints it; returns 0."""
    print(to_markdown(make_table(config)))
    return 0


def make_table(config: TableConfig) -> Table:
    """Pretrains and measures what the table lacks; what is finished, with the same settings, is only read.

    The pages are rewritten after each group of cells, so that they always show what there is.
    """
    check_data_apart(config.out, config.data)
    if not (config.out / "runs").is_dir():
        check_vacant(config.out, "one that avppc table began")
    console = Console(stderr=True, soft_wrap=True)
    entries = entries_of(config)
    runs = {(entry, seed): entry.pretraining(config, seed) for entry in entries for seed in range(config.seeds)}
    for run_config in runs.values():
        make_task(run_config.task, run_config)  # refuses settings that do not fit before hours are spent
    labels = _training_labels(config)
    costs: dict[tuple[Entry, int], RunCost] = {}
    for number, (key, run_config) in enumerate(runs.items(), 1):
        if not _is_finished(run_config):
            if config.only_finished:
                continue
            console.print(f"pretraining {number} of {len(runs)}: {key[0].text}, seed {key[1]}")
            pretrain(run_config)
        costs[key] = read_cost(run_config.out)

    results: list[CellResult] = []
    cells = cells_of(config)
    baseline = _write_untrained(runs[entries[0], 0], config.out / "cells" / "baselines")
    for number, cell in enumerate(cells, 1):
        encoder = runs[cell.entry, cell.seed].out if cell.entry else baseline
        protocol = _protocol(config, cell, encoder, _count_labelled(labels, cell.labels_per_word))
        if config.only_finished:
            found = _read(protocol, cell) if cell.entry is None or (cell.entry, cell.seed) in costs else None
            results += [found] if found else []
        else:
            console.print(f"cell {number} of {len(cells)}: {cell}")
            results.append(CellResult(cell, *evaluate(protocol, show=False, keep_readers=False)))
        if number == len(cells) or cells[number].group != cell.group:
            _write(Table(config, entries, costs, results))
    return Table(config, entries, costs, results)


def _write_untrained(config: PretrainConfig, directory: Path) -> Path:
    """Writes a run that was never trained, an encoder of random weights, on which the baselines are measured.

    It does not depend on the tasks of the table, so that a table of other tasks measures no baseline anew.
    """
    torch.manual_seed(0)
    write_checked_json(directory / CONFIG_FILE, config_to_dict(replace(config, task="av-permutative", out=directory)))
    save_encoder(VideoEncoder(config.encoder), directory / ENCODER_FILE)
    return directory


def _is_finished(config: PretrainConfig) -> bool:
    """Whether there is a finished run with these settings. If not, `pretrain` goes on with it, or refuses another's."""
    if not (config.out / CONFIG_FILE).exists() or not (config.out / ENCODER_FILE).exists():
        return False
    return is_same_run(config, split_sha256(config.data, "train"))


def _protocol(config: TableConfig, cell: Cell, run: Path, labelled: int) -> EvaluateConfig:
    """The settings of `evaluate` that measure one cell."""
    return replace(
        config.protocol(run, cell.labels_per_word, labelled),
        rows=(cell.row,),
        heads=(cell.head,),
        results=cell.directory(config),
        verify_data=False,  # _training_labels has done it, once for all cells
    )


def _read(protocol: EvaluateConfig, cell: Cell) -> CellResult | None:
    """A cell as it was measured before with these settings; None if it was not."""
    assert protocol.results is not None
    result = read_row(
        protocol.results, cell.row, cell.labels_per_word, settings_of(protocol, data_of(protocol.run, protocol.data))
    )
    return None if result is None else CellResult(cell, result)


def _training_labels(config: TableConfig) -> torch.Tensor:
    """[n] int64 labels of the training clips. Verifies the shards of all splits, unless nothing is to be measured."""
    train = PackedDataset(config.data, "train", verify=not config.only_finished)
    check_words(config.data, train.words)
    if not config.only_finished:
        for split in HELD_OUT_SPLITS:
            PackedDataset(config.data, split, verify=True).close()
    return train.labels


def _count_labelled(labels: torch.Tensor, per_word: int) -> int:
    """How many training clips have a label that may be used: `per_word` of each word, 0: all."""
    known = labels[labels >= 0]
    return len(known) if per_word == 0 else per_word * len(known.unique())


def _write(table: Table) -> None:
    write_json(table.config.out / "table.json", {"settings": config_to_dict(table.config), **table.as_dict()})
    write_pages(table)
