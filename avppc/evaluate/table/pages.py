"""The table as markdown, CSV and one HTML page with the low-shot curve."""

from __future__ import annotations

import csv
import io

from markupsafe import Markup

from avppc._version import __version__
from avppc.evaluate.config import TableConfig
from avppc.evaluate.pages import PALETTE, changed_settings, command_line, page_environment
from avppc.evaluate.report import plots
from avppc.evaluate.report.report import HEADS, duration
from avppc.evaluate.table.results import NOTHING, PUBLISHED, SOURCE, Rate, Table
from avppc.files import write_atomically

TEMPLATE = "table/table.html.jinja"
NOTES = (
    "Word classification rate on the test clips in %, encoder frozen (in brackets: the encoder trained, too). Frozen "
    "means that its batch norms stay in eval mode as well. Head, learning rates and epoch were chosen on validation "
    "clips with the first draws of labels; each draw was tested once. ±: 95% interval over draws of the labelled clips "
    "and over test clips, and over pretraining seeds where there are several. Best: the head with the best validation "
    "rate. Ahead: the difference to the best rival, the proxy task other than permutative coding with sound that reads "
    "most validation clips, encoder frozen, last head; over the same test clips and label draws, with its 95% interval."
)


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
            cells = [title, *(pair_text(*pairs[head]) for head in table.columns)]
            cells.append(table.ahead(entry, title, labels))
            cells += [published_text(entry.task, head) if entry else NOTHING for head in slides]
            cost = table.cost(entry)
            cells += [f"{cost.clips:,}", duration(cost.seconds).replace("\u00a0", " ")] if cost else [NOTHING, NOTHING]
            lines.append(_line(cells))
        parts.append("\n".join(lines))
    parts.append(f"{NOTES} {seeds_text(table)}.\n\nSlides: {SOURCE}\n\n`{_command(config)}`\n")
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
