"""`avppc table`: every proxy task under one encoder, one budget and one evaluation; as markdown, CSV and HTML."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from markupsafe import Markup

from avppc._version import __version__
from avppc.checks import read_share
from avppc.data.packed.dataset import PackedDataset, check_data_apart, split_sha256
from avppc.evaluate.config import EvaluateConfig, TableConfig
from avppc.evaluate.lipreading.classifier import HELD_OUT_SPLITS
from avppc.evaluate.lipreading.evaluate import evaluate, settings_of
from avppc.evaluate.lipreading.fits import check_words
from avppc.evaluate.lipreading.results import read_row
from avppc.evaluate.record import PALETTE, changed_settings, command_line, page_environment
from avppc.evaluate.report import plots
from avppc.evaluate.report.report import HEADS, duration
from avppc.evaluate.table.results import (
    NOTHING,
    PUBLISHED,
    SOURCE,
    Cell,
    CellResult,
    Entry,
    Rate,
    Table,
    cells_of,
    entries_of,
    read_cost,
)
from avppc.files import InUse, check_vacant, sole_use, write_atomically, write_json
from avppc.models.encoder_file import ENCODER_FILE, save_encoder
from avppc.models.encoders import VideoEncoder
from avppc.printing import Console
from avppc.settings import config_to_dict, write_checked_json
from avppc.tasks.registry import make_task
from avppc.train.config import PretrainConfig
from avppc.train.loop import pretrain
from avppc.train.run_folder import CONFIG_FILE, is_same_run, source_of

TEMPLATE = "table/table.html.jinja"
_TURN_SECONDS = 2.0
NOTES = (
    "Word classification rate on the test clips in %, encoder frozen (in brackets: the encoder trained, too). Frozen "
    "means that its batch norms stay in eval mode as well. Head, learning rates and epoch were chosen on validation "
    "clips with the first draws of labels; each draw was tested once. ±: 95% interval over draws of the labelled clips "
    "and over test clips, and over pretraining seeds where there are several. Best: the head with the best validation "
    "rate. Ahead: the difference to the best rival, the proxy task other than permutative coding with sound that reads "
    "most validation clips, encoder frozen, last head; over the same test clips and label draws, with its 95% interval."
)


def execute(config: TableConfig) -> int:
    """`avppc table`: makes the table and prints it; returns 0."""
    print(to_markdown(make_table(config)))
    return 0


def make_table(config: TableConfig) -> Table:
    """Pretrains and measures what the table lacks; what is finished, with the same settings, is only read.

    What another process is at comes last, and is waited for. The pages are rewritten after each group of cells, so that
    they always show what there is; a part of the work writes them once, of all that is there then.
    """
    check_data_apart(config.out, config.data)
    if not (config.out / "runs").is_dir():
        check_vacant(config.out, "one that avppc table began")
    entries = entries_of(config)
    runs = {(entry, seed): entry.pretraining(config, seed) for entry in entries for seed in range(config.seeds)}
    for run_config in runs.values():
        make_task(run_config.task, run_config)  # refuses settings that do not fit before hours are spent
    labels = _training_labels(config)
    console = Console(stderr=True, soft_wrap=True)
    share, shares = read_share("part", config.part)
    (config.out / "runs").mkdir(parents=True, exist_ok=True)  # a part without a run is of this table, too
    if not config.only_finished:
        _pretrain(runs, list(runs)[share::shares], console)
    costs = {key: read_cost(run_config.out) for key, run_config in runs.items() if _is_finished(run_config)}

    baseline = _write_untrained(runs[entries[0], 0], config.out / "cells" / "baselines")
    protocols: dict[Cell, EvaluateConfig] = {}
    for cell in cells_of(config):
        encoder = runs[cell.entry, cell.seed].out if cell.entry else baseline
        protocols[cell] = _protocol(config, cell, encoder, _count_labelled(labels, cell.labels_per_word))
    results: dict[Cell, CellResult] = {}
    shown = replace(config, part="")  # the table is the same, whoever made it

    def table() -> Table:
        return Table(shown, entries, costs, [results[cell] for cell in protocols if cell in results])

    if not config.only_finished:
        own = _deal(list(protocols), list(runs), share, shares)
        for is_last_of_group in _measure(protocols, own, results, console):
            if shares == 1 and is_last_of_group:
                _write(table())
    for cell, protocol in protocols.items():
        if cell not in results and (cell.entry is None or (cell.entry, cell.seed) in costs):
            found = _read(protocol, cell)
            if found is not None:
                results[cell] = found
    _write(table())
    return table()


def _pretrain(
    runs: Mapping[tuple[Entry, int], PretrainConfig], own: Iterable[tuple[Entry, int]], console: Console
) -> None:
    """Finishes some of the runs."""

    def finish(key: tuple[Entry, int]) -> None:
        if _is_finished(runs[key]):
            return
        if runs[key].out.is_dir():
            with sole_use(runs[key].out):
                pass  # whether it may begin is known before it is announced
        console.print(f"pretraining {list(runs).index(key) + 1} of {len(runs)}: {key[0].text}, seed {key[1]}")
        pretrain(runs[key])

    for _ in _in_turn(own, finish, console):
        pass


def _measure(
    protocols: Mapping[Cell, EvaluateConfig], own: Sequence[Cell], results: dict[Cell, CellResult], console: Console
) -> Iterator[bool]:
    """Measures some of the cells; yields after each whether it was the last one of its group."""

    def finish(cell: Cell) -> None:
        protocol = protocols[cell]
        assert protocol.results is not None
        protocol.results.mkdir(parents=True, exist_ok=True)
        with sole_use(protocol.results):
            console.print(f"cell {list(protocols).index(cell) + 1} of {len(protocols)}: {cell}")
            results[cell] = CellResult(cell, *evaluate(protocol, show=False, keep_readers=False))

    for cell in _in_turn(own, finish, console):
        rest = own[own.index(cell) + 1 :]
        yield not rest or rest[0].group != cell.group


_Work = TypeVar("_Work")


def _in_turn(work: Iterable[_Work], finish: Callable[[_Work], None], console: Console) -> Iterator[_Work]:
    """Yields each piece of work when it is finished, first those that no other process is at."""
    waiting, is_told = list(work), False
    while waiting:
        busy = []
        for piece in waiting:
            try:
                finish(piece)
            except InUse:
                busy.append(piece)
            else:
                yield piece
        if len(busy) == len(waiting):
            if not is_told:
                console.print(f"another process is at the last {len(busy)}: waiting for it")
            is_told = True
            time.sleep(_TURN_SECONDS)
        waiting = busy


def _deal(cells: Sequence[Cell], keys: Sequence[tuple[Entry, int]], share: int, shares: int) -> list[Cell]:
    """The cells of a share: those of the runs that it pretrains, and of the baselines every n-th."""
    baselines = [cell for cell in cells if cell.entry is None]

    def number(cell: Cell) -> int:
        return baselines.index(cell) if cell.entry is None else keys.index((cell.entry, cell.seed))

    return [cell for cell in cells if number(cell) % shares == share]


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
        protocol.results, cell.row, cell.labels_per_word, settings_of(protocol, source_of(protocol.run, protocol.data))
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


def write_pages(table: Table) -> None:
    """Writes table.md, table.csv and table.html into the table's directory."""
    out = table.config.out
    write_atomically(out / "table.md", to_markdown(table).encode())
    write_atomically(out / "table.csv", to_csv(table).encode())
    write_atomically(out / "table.html", to_html(table).encode())


def pair_text(frozen: Rate | None, trained: Rate | None) -> str:
    """For example "46.2 ± 3.1 (50.3 ± 4.0)"; a dash for what was not measured."""
    text = frozen.text() if frozen else NOTHING
    return f"{text} ({trained.text()})" if trained else text


def published_text(task: str, head: str) -> str:
    """The rates that the authors' slides give for a task under a head, as `pair_text` writes them."""
    rates = PUBLISHED.get(task, {}).get(head)
    return NOTHING if rates is None else f"{100 * rates[0]:.1f} ({100 * rates[1]:.1f})"


def column_title(head: str) -> str:
    """What the table calls a head; "best" stays as it is."""
    return HEADS.get(head, head)


def published_heads(table: Table) -> list[str]:
    """The heads of this table that are in the slides, too."""
    return [head for head in table.config.heads if head in PUBLISHED["av-permutative"]]


def to_markdown(table: Table) -> str:
    """One table for each number of labels."""
    config = table.config
    slides = published_heads(table)
    heads = [column_title(head) for head in table.columns]
    header = [
        "proxy task",
        *heads,
        "ahead",
        *(f"slides: {column_title(head)}" for head in slides),
        "clips seen",
        "pretraining",
    ]
    parts = []
    for labels in config.label_counts:
        lines = [f"### {plots.labels_title(labels)}", "", _line(header), _line(["---"] * len(header))]
        for title, entry, pairs in table.lines(labels):
            cells = [title]
            for head in table.columns:
                mark = "**" if table.is_best(entry, head, labels) else ""
                cells.append(f"{mark}{pair_text(*pairs[head])}{mark}")
            cells.append(table.ahead(entry, title, labels))
            cells += [published_text(entry.task, head) if entry else NOTHING for head in slides]
            cost = table.cost(entry)
            cells += [f"{cost.clips:,}", duration(cost.seconds).replace("\u00a0", " ")] if cost else [NOTHING, NOTHING]
            lines.append(_line(cells))
        parts.append("\n".join(lines))
    measured = f" {table.config.data.name}: {table.measured_on}." if table.measured_on else ""
    notes = f"{NOTES} {seeds_text(table)}.{measured} Bold: the proxy task that reads most in a column, frozen."
    parts.append(f"{notes}\n\nSlides: {SOURCE}\n\n`{_command(config)}`\n")
    return "\n\n".join(parts)


def seeds_text(table: Table) -> str:
    """For example "3 pretraining seeds", "1 to 3 pretraining seeds"."""
    fewest, most = table.seed_counts
    return f"{most if fewest == most else f'{fewest} to {most}'} pretraining seed{'s' if most > 1 else ''}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _command(config: TableConfig) -> str:
    given = {"data": str(config.data), "out": str(config.out)}
    return command_line("table", {**given, **changed_settings(config, TableConfig(config.data, config.out))})


def to_csv(table: Table) -> str:
    """One line for each cell, with rates from 0 to 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["task", "row", "seed", "head", "labels_per_word", "wcr", "interval95", "val_wcr", "draws", "seconds"]
    writer.writerow([*header, "published_frozen", "published_finetuned"])
    for item in table.results:
        cell, result = item.cell, item.result
        published = PUBLISHED.get(cell.entry.task, {}).get(cell.head, ("", "")) if cell.entry else ("", "")
        writer.writerow(
            [
                cell.entry.text if cell.entry else "",
                cell.row,
                cell.seed if cell.entry else "",
                cell.head,
                cell.labels_per_word or "all",
                f"{result.wcr:.6f}",
                f"{result.interval95:.6f}",
                f"{item.val_rate:.6f}",
                len(result.draws),
                f"{result.seconds:.1f}",
                *published,
            ]
        )
    return text.getvalue()


def to_html(table: Table) -> str:
    """A self-contained page."""
    environment = page_environment()
    environment.filters |= {"duration": duration, "labels": plots.labels_title, "column": column_title}
    environment.globals |= {"pair_text": pair_text, "published_text": published_text}
    curve = low_shot_curve(table)
    return environment.get_template(TEMPLATE).render(
        table=table,
        version=__version__,
        palette=PALETTE,
        slides=published_heads(table),
        notes=NOTES,
        source=SOURCE,
        seeds=seeds_text(table),
        command=_command(table.config),
        curve=Markup(curve) if curve else None,
    )


def low_shot_curve(table: Table) -> str | None:
    """SVG of the rates over the number of labels; None if there is only one number."""
    counts = sorted(table.config.label_counts, key=lambda count: count or 10**9)
    if len(counts) < 2:
        return None
    head = table.columns[-1]
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for labels in counts:
        for title, entry, pairs in table.lines(labels):
            frozen, trained = pairs[head]
            names = (title, title) if entry is None else (f"{title}, frozen", f"{title}, fine-tuned")
            for name, rate in zip(names, (frozen, trained), strict=True):
                if rate is not None:
                    curves.setdefault(name, []).append((labels, rate.mean, rate.interval95))
    if not curves:
        return None
    return plots.plot_low_shot(curves, counts)
