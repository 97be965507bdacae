"""`avppc report`: one self-contained HTML page about a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from avppc._version import __version__
from avppc.data.packed.remote import remote_url
from avppc.evaluate.config import ROWS, EvaluateConfig, ReportConfig
from avppc.evaluate.lipreading.results import (
    ConfusedPair,
    RowResult,
    confusion_rates,
    decisive,
    most_confused,
    order_by_confusion,
    task_of,
    title_of,
)
from avppc.evaluate.media import ClipSheet, make_clip_sheet
from avppc.evaluate.record import (
    PALETTE,
    RunRecord,
    changed_settings,
    command_line,
    group_by_modality,
    group_by_size,
    page_environment,
    read_record,
)
from avppc.evaluate.report import plots
from avppc.files import sha256_of, write_atomically
from avppc.models.encoder_file import ENCODER_FILE
from avppc.settings import config_from_dict, config_to_dict
from avppc.tasks.registry import TASKS
from avppc.train.config import PretrainConfig
from avppc.train.run_folder import source_of

TEMPLATE = "report/report.html.jinja"
HEADS = {"gru": "GRU", "tconv": "temporal conv.", "bins": "time bins", "mstcn": "MS-TCN"}
_ENCODERS = {
    "random": "a frozen encoder of random weights",
    "supervised": "supervised training from scratch",
    "frozen": "the frozen {task} encoder",
    "finetuned": "the fine-tuned {task} encoder",
    "ceiling": "the true mouth trajectories",
}
COMPARED = (("frozen", "supervised"), ("frozen", "random"), ("finetuned", "supervised"))


def execute(config: ReportConfig) -> int:
    """`avppc report`: writes the page, and prints where it is; returns 0.

    Raises:
        FileNotFoundError: config.run is no directory of a run.
        ValueError: a file of the run is damaged, or config.data is given and holds no packed clips.
    """
    path = config.out or config.run / "report.html"
    write_atomically(path, render(config).encode())
    print(f"report written to {path}")
    return 0


def render(config: ReportConfig) -> str:
    """The page's HTML; the same files always give the same text."""
    record = read_record(config.run)
    sheet, sheet_problem = _clip_sheet(config, record.config)
    encoder = sha256_of(record.run / ENCODER_FILE) if (record.run / ENCODER_FILE).exists() else None
    environment = page_environment()
    environment.filters |= {
        "percent": percent,
        "duration": duration,
        "rate": rate,
        "labels": plots.labels_title,
        "title": title_of,
        "sentence": _sentence,
    }
    return environment.get_template(TEMPLATE).render(
        record=record,
        config=record.config,
        task=TASKS[record.config.task].title,
        name=record.run.resolve().name,
        version=__version__,
        palette=PALETTE,
        heads=HEADS,
        labelled_words=plots.LABELLED_WORDS,
        summary=summarize(record),
        key_numbers=_key_numbers(record),
        groups=record.groups,
        comparisons=[item for rows in record.groups for item in compare(rows)],
        differing=[name for rows in record.groups for name in _differing_settings(rows)],
        confusions=[_confusion(rows) for rows in record.groups],
        figures=_figures(record),
        limit=math.log(record.candidates),
        final_groups=_final_groups(record),
        sheet=sheet,
        sheet_problem=sheet_problem,
        settings=config_to_dict(record.config),
        changed=changed_settings(record.config, _preset(record.config)),
        evaluations=_by_settings(record.rows),
        commands=_commands(config, record),
        encoder_file=ENCODER_FILE if encoder else None,
        outdated=[row for row in record.rows if encoder and row.settings["encoder_sha256"] != encoder],
    )


def percent(share: float, digits: int = 1) -> str:
    """For example "46.2 %", with a space that does not break."""
    return f"{100 * share:.{digits}f}\u00a0%" if math.isfinite(share) else "\u2013"


def duration(seconds: float) -> str:
    """For example "48 s", "5.2 min", "2.1 h"."""
    if seconds < 100:
        return f"{seconds:.0f}\u00a0s"
    return f"{seconds / 60:.1f}\u00a0min" if seconds < 6000 else f"{seconds / 3600:.1f}\u00a0h"


def _sentence(text: str) -> str:
    """The text with a capital first letter, its other letters as they are."""
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Comparison:
    """Two rows of the table with the same labels."""

    first: RowResult
    second: RowResult

    @property
    def difference(self) -> float:
        """Rate of the first less that of the second."""
        return self.first.wcr - self.second.wcr

    @property
    def intervals(self) -> float:
        """Sum of the half-widths of the two 95% intervals."""
        return self.first.interval95 + self.second.interval95

    @property
    def verdict(self) -> str:
        """ "above" or "below" if the difference exceeds both intervals together, else "not told apart"."""
        if abs(self.difference) <= self.intervals:
            return "not told apart"
        return "above" if self.difference > 0 else "below"


def compare(rows: Sequence[RowResult]) -> list[Comparison]:
    """The pairs of COMPARED that are among the rows, which have the same number of labels."""
    by_name = {row.row: row for row in rows}
    return [Comparison(by_name[a], by_name[b]) for a, b in COMPARED if a in by_name and b in by_name]


def summarize(record: RunRecord) -> str:
    """What the numbers say, in a paragraph that claims no more than they do."""
    sentences = [_pretraining_sentence(record)]
    if record.subtasks and record.metrics.entries:
        accuracy = record.final(record.task_accuracy)
        between = [place for place, subtask in enumerate(record.subtasks) if subtask.between_modalities]
        when, guessing = "At the end" if record.finished else "So far", percent(1 / record.candidates)
        text = f"{when}, the {len(record.subtasks)} sub-tasks find the right clip in {percent(accuracy.mean())} of "
        text += f"the cases on average (guessing: {guessing})"
        if between:
            text += f", those from one modality to the other in {percent(accuracy[between].mean())}"
        sentences.append(text + ".")
    sentences += [_lipreading_sentence(rows) for rows in record.groups]
    if not record.rows:
        sentences.append("Its lip reading has not been evaluated yet.")
    return " ".join(sentences)


def _pretraining_sentence(record: RunRecord) -> str:
    config, encoder = record.config, record.config.encoder
    clips = record.steps_done * config.batch_size * config.accumulate
    side = encoder.input_pixels
    start = f"A visual encoder ({encoder.backbone}, {side} \u00d7 {side} pixels, {encoder.features} features a frame)"
    if not record.steps_done:
        return f"{start} is to be pretrained without labels for {config.steps:,} steps; none is logged yet."
    if not record.finished:
        return (
            f"{start} is being pretrained without labels: {record.steps_done:,} of {config.steps:,} steps are logged, "
            f"so all figures here are those of an unfinished run."
        )
    return (
        f"{start} was pretrained without labels for {config.steps:,} steps, on {clips:,} clips drawn in batches of "
        f"{config.batch_size:,}, in {duration(record.training_seconds)}."
    )


def _encoder_of(row: RowResult) -> str:
    return _ENCODERS[row.row].format(task=task_of(row))


def _lipreading_sentence(rows: Sequence[RowResult]) -> str:
    """The rate of the frozen encoder, and whether it is told apart from supervised training."""
    by_name = {row.row: row for row in rows}
    row = by_name.get("frozen") or by_name.get("finetuned") or rows[0]
    text = (
        f"With {plots.labels_title(row.labels_per_word)}, lip reading of {len(row.words):,} words in {row.tested:,} "
        f"test clips (guessing: {percent(row.chance)}) gets {rate(row)} right with {_encoder_of(row)}"
    )
    pair = next((pair for pair in compare(rows) if (pair.first.row, pair.second.row) == COMPARED[0]), None)
    if pair is None:
        return text + "."
    points = f"{100 * abs(pair.difference):.1f} points {'below' if pair.difference < 0 else 'above'} it"
    text += f" and {rate(pair.second)} with {_encoder_of(pair.second)}. The frozen encoder lies {points}, "
    if pair.verdict == "not told apart":
        return text + "no more than both 95% intervals together: these numbers do not tell the two apart."
    return text + "more than both 95% intervals together."


def rate(row: RowResult) -> str:
    """For example "46.2 ± 3.1 %", on one line."""
    return f"{100 * row.wcr:.1f}\u00a0±\u00a0{percent(row.interval95)}"


def _key_numbers(record: RunRecord) -> list[tuple[str, str, str]]:
    """(value, name, remark) of the numbers at the top of the page."""
    numbers = []
    if record.rows:
        rows = {row.row: row for row in record.groups[-1]}
        for row in (rows[name] for name in ("frozen", "finetuned", "supervised") if name in rows):
            labels = plots.labels_title(row.labels_per_word)
            numbers.append((percent(row.wcr), title_of(row), f"±\u00a0{percent(row.interval95)}, {labels}"))
    if record.metrics.entries:
        speeds, waits = (record.metrics.column(name) for name in ("clips_per_second", "data_wait"))
        share = f"{record.steps_done:,} of {record.config.steps:,} steps"
        numbers.append((duration(record.training_seconds), "pretraining", share))
        if np.isfinite(speeds).any():
            wait = f"waiting for data {percent(float(np.nanmedian(waits)))}" if np.isfinite(waits).any() else "median"
            numbers.append((f"{np.nanmedian(speeds):,.0f}", "clips a second", wait))
    return numbers


def _differing_settings(rows: Sequence[RowResult]) -> list[str]:
    """Settings of the evaluation that differ between rows: such rows should not be compared."""
    settings = [decisive(row.settings) for row in rows]
    names = {name for known in settings for name in known}
    return sorted(name for name in names if any(known.get(name) != settings[0].get(name) for known in settings))


@dataclass(frozen=True)
class Confusion:
    """The words that one row of the table mistakes for each other."""

    row: RowResult
    figure: Markup
    pairs: list[ConfusedPair]


def _confusion(rows: Sequence[RowResult]) -> Confusion:
    """The confusions of the frozen encoder, or of the row that comes closest to it."""
    order = ("frozen", "finetuned", "supervised", "random", "ceiling")
    row = min(rows, key=lambda row: order.index(row.row))
    rates = confusion_rates(row.confusion)
    order_of_words = order_by_confusion(rates)
    words = [row.words[word] for word in order_of_words]
    figure = plots.plot_confusion(
        rates[np.ix_(order_of_words, order_of_words)], words, f"confusion-{row.labels_per_word}"
    )
    return Confusion(row, Markup(figure), most_confused(rates, row.words, 8))


def _figures(record: RunRecord) -> dict[str, Markup]:
    """SVG of the plots for which there are numbers, by name; matplotlib has escaped the texts in them."""
    figures = {}
    if record.rows:
        figures["rates"] = plots.plot_rates(record.groups)
    if record.metrics.entries:
        figures["training"] = plots.plot_training(record)
        figures["speed"] = plots.plot_speed(record)
        if record.subtasks:
            limit = math.log(record.candidates)
            accuracy, loss = record.final(record.task_accuracy), record.final(record.task_loss)
            figures["groups"] = plots.plot_groups(record)
            figures["subtasks"] = plots.plot_subtasks(record.subtasks, accuracy, limit - loss, limit)
    return {name: Markup(figure) for name, figure in figures.items()}


def _final_groups(record: RunRecord) -> list[tuple[str, int, float, float]]:
    """(group, sub-tasks, accuracy, information in nats) at the end of training."""
    if not record.subtasks or not record.metrics.entries:
        return []
    accuracy, loss = record.final(record.task_accuracy), record.final(record.task_loss)
    groups = {
        **group_by_size(record.subtasks),
        **group_by_modality(record.subtasks),
        "all": list(range(len(record.subtasks))),
    }
    limit = math.log(record.candidates)
    return [
        (label, len(numbers), float(accuracy[numbers].mean()), float(limit - loss[numbers].mean()))
        for label, numbers in groups.items()
    ]


def _clip_sheet(config: ReportConfig, run_config: PretrainConfig) -> tuple[ClipSheet | None, str]:
    """The clips, or why there are none; data that was asked for must be there."""
    if config.data is None and (url := remote_url(run_config.data)):  # a page about a run calls nobody
        return None, f"they lie at {url}, from where they are fetched only where --data says so"
    try:
        source = source_of(config.run, config.data)
        return make_clip_sheet(source, run_config.cut, run_config.features), ""
    except (ValueError, OSError) as error:
        if config.data is not None:
            raise
        return None, str(error)


def _preset(config: PretrainConfig) -> PretrainConfig:
    return PretrainConfig.from_preset(config.preset, config.data, config.out)


def _by_settings(rows: Sequence[RowResult]) -> list[list[RowResult]]:
    """The rows in groups of equal settings: each group can come from one command."""
    groups: list[list[RowResult]] = []
    for row in rows:
        group = next((group for group in groups if decisive(group[0].settings) == decisive(row.settings)), None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return groups


def _commands(config: ReportConfig, record: RunRecord) -> list[str]:
    """The commands that make this run, its rows and this page again."""
    ours = record.config
    named = {"data": str(ours.data), "out": str(ours.out)}
    if ours.preset != "laptop":
        named["preset"] = ours.preset
    commands = [command_line("pretrain", {**named, **changed_settings(ours, _preset(ours))})]
    commands += [_evaluate_command(config.run, rows) for rows in _by_settings(record.rows)]
    shown: dict[str, Any] = {"run": str(config.run)}
    shown |= {name: str(path) for name, path in (("out", config.out), ("data", config.data)) if path}
    return [*commands, command_line("report", shown)]


def _evaluate_command(run: Path, rows: Sequence[RowResult]) -> str:
    evaluated = [row.row for row in rows]
    first = rows[0]
    where = f"settings of {run / 'evaluation'}, row {first.row}"
    fields = {field.name for field in dataclasses.fields(EvaluateConfig)}  # a row's settings also name its encoder
    known = {name: value for name, value in first.settings.items() if name in fields}
    settings = config_from_dict(EvaluateConfig, {**known, "run": str(run)}, where)
    flags = {"run": str(run), **changed_settings(settings, EvaluateConfig(run))}
    if set(evaluated) != set(ROWS):
        flags["rows"] = [name for name in ROWS if name in evaluated]
    if "ceiling" in evaluated:
        flags["trajectories"] = "VIDEOS"  # a path that the rows do not keep
    return command_line("evaluate", flags)
