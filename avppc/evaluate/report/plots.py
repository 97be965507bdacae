"""The report's figures as SVG that takes its fonts and colours, light or dark, from the page around it."""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from avppc.evaluate.lipreading.results import RowResult, title_of
from avppc.evaluate.record import PALETTE, RunRecord, group_by_modality, group_by_size, mean_of_finite
from avppc.losses.subtasks import ELEMENTS, SubTask

_LIGHT = {name: light for name, (light, _) in PALETTE.items()}
_SERIES = [_LIGHT[name] for name in ("accent", "second", "third", "fourth")]
_FONT = "'DejaVu Sans', sans-serif"  # comes with matplotlib, so text has the same size everywhere
_WIDTH = 960  # CSS pixels at full size; one point of matplotlib is one pixel
_LEAST_WIDTH = 640  # on narrower screens a figure scrolls
_POINTS = 400  # at most, of one curve
LABELLED_WORDS = 40
"""A confusion matrix of more words has no room for their names."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 6 / 72,
    "figure.constrained_layout.h_pad": 6 / 72,
    "figure.constrained_layout.wspace": 0.02,
    "figure.constrained_layout.hspace": 0.04,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.5,
    "text.parse_math": False,
    "text.color": _LIGHT["ink"],
    "axes.edgecolor": _LIGHT["line"],
    "axes.labelcolor": _LIGHT["soft"],
    "axes.titlecolor": _LIGHT["ink"],
    "axes.titlelocation": "left",
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LIGHT["line"],
    "grid.linewidth": 0.8,
    "xtick.color": _LIGHT["line"],
    "ytick.color": _LIGHT["line"],
    "xtick.labelcolor": _LIGHT["soft"],
    "ytick.labelcolor": _LIGHT["soft"],
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}


def _draw(name: str, height: float, draw: Callable[[Figure], None], width: float = _WIDTH) -> str:
    """An <svg> element of that size in CSS pixels; its ids begin with `name`, so that several can be in one page."""
    # another salt in each figure, so that the ids of equal clip paths differ, and are the same each time
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's own fonts draw the text
        figure = Figure(figsize=(width / 72, height / 72))
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _adapt(buffer.getvalue().decode(), name, width)


def _adapt(svg: str, name: str, width: float) -> str:
    """matplotlib's SVG file as an element of a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]+>", lambda tag: _adapt_tag(tag[0], name, width), svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def _adapt_tag(tag: str, name: str, width: float) -> str:
    if tag.startswith("<svg"):
        box = re.search(r'viewBox="[^"]*"', tag)
        assert box is not None
        widths = f"max-width: {width:g}px; min-width: {min(width, _LEAST_WIDTH):g}px"
        return f'<svg {box[0]} style="{widths}" aria-hidden="true">'  # the caption says what the figure shows
    tag = tag.replace(_FONT, "var(--sans)")
    for colour, light in _LIGHT.items():
        tag = tag.replace(light, f"var(--{colour})")
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r'\bid="|url\(#|href="#', lambda match: f"{match[0]}{name}-", tag)
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)


def plot_rates(groups: Sequence[Sequence[RowResult]]) -> str:
    """Bars of the word classification rates with their 95% intervals, one panel for each number of labels."""
    bars = sum(map(len, groups))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(
            len(groups), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [len(rows) for rows in groups]}
        )[:, 0]
        for axes, rows in zip(panels, groups, strict=True):
            _draw_bars(axes, rows)
            if len(groups) > 1:
                axes.set_title(labels_title(rows[0].labels_per_word))
        highest = max(100 * min(row.wcr + row.interval95, 1.0) for rows in groups for row in rows)
        panels[-1].set_xlim(0, 1.22 * max(highest, 1.0))  # room for the numbers to the right of the bars
        panels[-1].set_xticks([tick for tick in panels[-1].get_xticks() if tick <= 100])
        panels[-1].set_xlabel("words right, %")

    return _draw("rates", 44 + 40 * bars + 34 * len(groups), draw)


def _draw_bars(axes: Axes, rows: Sequence[RowResult]) -> None:
    colours = {"frozen": "accent", "finetuned": "third", "supervised": "second"}
    for place, row in enumerate(rows):
        colour = _LIGHT[colours.get(row.row, "soft")]
        rate, half = 100 * row.wcr, 100 * row.interval95
        below, above = min(half, rate), min(half, 100 - rate)
        strength = 0.35 if row.row in ("random", "ceiling") else 0.85
        axes.barh(place, rate, height=0.62, color=colour, alpha=strength)
        axes.errorbar(rate, place, xerr=[[below], [above]], color=_LIGHT["ink"], capsize=4, elinewidth=1.4)
        axes.annotate(
            f"{rate:.1f} ± {half:.1f} %", (rate + above, place), (8, 0), textcoords="offset points", va="center"
        )
    axes.axvline(100 * rows[0].chance, color=_LIGHT["soft"], linestyle=(0, (4, 3)), linewidth=1.2)
    axes.set_yticks(range(len(rows)), [title_of(row) for row in rows], color=_LIGHT["ink"])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.tick_params("y", length=0)
    axes.grid(visible=False, axis="y")


def labels_title(labels_per_word: int) -> str:
    """For example "10 labels a word"."""
    if labels_per_word == 0:
        return "all labels"
    return f"{labels_per_word} label{'s' if labels_per_word > 1 else ''} a word"


def plot_low_shot(
    curves: Mapping[str, Sequence[tuple[int, float, float]]],  # (labels a word, 0 for all; rate; half of its interval)
    counts: Sequence[int],
) -> str:
    """Word classification rates over the number of labels, with their 95% intervals."""
    places = {count: place for place, count in enumerate(counts)}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (name, points) in enumerate(curves.items()):
            x = np.array([places[count] for count, _, _ in points], np.float64)
            rates, halves = (100 * np.array([point[part] for point in points]) for part in (1, 2))
            x = x + 0.05 * (number - (len(curves) - 1) / 2) / max(1.0, len(curves) / 8)  # bars side by side
            line = ("-", "--", ":")[number // len(_SERIES) % 3]
            colour = _SERIES[number % len(_SERIES)]
            bars = [np.minimum(halves, rates), np.minimum(halves, 100 - rates)]
            axes.errorbar(
                x, rates, yerr=bars, color=colour, linestyle=line, marker="o", capsize=3, label=_shorten(name)
            )
        axes.set_xticks(range(len(counts)), ["all" if count == 0 else str(count) for count in counts])
        axes.set_xlabel("labelled clips a word")
        axes.set_ylabel("words right, %")
        axes.set_ylim(0, None)
        figure.legend(loc="outside lower left", ncols=2)

    return _draw("low-shot", 380 + 22 * -(-len(curves) // 2), draw)


def _shorten(name: str, most: int = 60) -> str:
    """A long name without its middle: names that begin alike differ at their ends."""
    half = most // 2
    return name if len(name) <= most else f"{name[: half - 1]}…{name[-half:]}"


def plot_training(record: RunRecord) -> str:
    """The loss, and beside it the learning rate and the norm of the gradient."""

    def draw(figure: Figure) -> None:
        panels = figure.subplot_mosaic([["loss", "rate"], ["loss", "norm"]], width_ratios=[2, 1])
        names = {
            "loss": ("loss", "Loss, nats"),
            "rate": ("learning_rate", "Learning rate"),
            "norm": ("grad_norm", "Norm of the gradient"),
        }
        for key, (column, title) in names.items():
            _draw_curve(panels[key], record, record.metrics.column(column), title)
        if record.subtasks:
            _mark_chance(panels["loss"], math.log(record.candidates), "log N: guessing")
        panels["rate"].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panels["rate"].tick_params("x", labelbottom=False)
        for key in ("loss", "norm"):
            panels[key].set_xlabel("step")

    return _draw("training", 340, draw)


def plot_groups(record: RunRecord) -> str:
    """Accuracy and loss of the groups of sub-tasks over the steps."""
    groupings = {
        "by elements, context → target": group_by_size(record.subtasks),
        "by modality": group_by_modality(record.subtasks),
    }

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, 2, sharex=True, sharey="row")
        for column, (title, groups) in enumerate(groupings.items()):
            _draw_groups(panels[0, column], record, 100 * record.task_accuracy, groups)
            _draw_groups(panels[1, column], record, record.task_loss, groups)
            panels[0, column].set_title(f"Accuracy {title}", pad=26)
            panels[1, column].set_title(f"Loss {title}")
            legend = panels[0, column].legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderpad=0, handlelength=1.2, columnspacing=1.4
            )
            legend.set_in_layout(False)  # it may reach beyond the panel without making the panel smaller
            _mark_chance(panels[0, column], 100 / record.candidates)
            _mark_chance(panels[1, column], math.log(record.candidates))
            panels[1, column].set_xlabel("step")
        panels[0, 0].set_ylabel("right clip found, %")
        panels[0, 0].set_ylim(bottom=0)
        panels[1, 0].set_ylabel("nats")

    return _draw("groups", 540, draw)


def plot_speed(record: RunRecord) -> str:
    """Clips a second, and the share of time spent waiting for data."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _draw_curve(left, record, record.metrics.column("clips_per_second"), "Clips a second")
        _draw_curve(right, record, 100 * record.metrics.column("data_wait"), "Time spent waiting for data, %")
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
        right.set_ylim(top=max(right.get_ylim()[1], 5.0))

    return _draw("speed", 230, draw)


def _draw_curve(axes: Axes, record: RunRecord, values: NDArray[np.float64], title: str) -> None:
    axes.plot(_thin(record.metrics.steps), _thin(values), color=_LIGHT["accent"])
    axes.set_title(title)
    axes.locator_params(axis="x", integer=True)


def _draw_groups(
    axes: Axes,
    record: RunRecord,
    table: NDArray[np.float64],  # [R, K]
    groups: Mapping[str, Sequence[int]],
) -> None:
    steps = _thin(record.metrics.steps)
    for (label, numbers), colour in zip(groups.items(), _SERIES, strict=False):
        axes.plot(steps, _thin(mean_of_finite(table[:, list(numbers)], 1)), color=colour, label=label)
    axes.locator_params(axis="x", integer=True)


def _mark_chance(axes: Axes, value: float, text: str = "") -> None:
    axes.axhline(value, color=_LIGHT["soft"], linestyle=(0, (4, 3)), linewidth=1.2)
    if text:
        place = axes.get_yaxis_transform()
        axes.annotate(
            text, (1, value), (-4, -5), "axes fraction" if place is None else place, "offset points",
            ha="right", va="top", color=_LIGHT["soft"],
        )  # fmt: skip


def _thin(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The means of parts of equally many rows, so that a long log gives at most _POINTS points."""
    if len(values) <= _POINTS:
        return values
    return np.array([mean_of_finite(part, 0) for part in np.array_split(values, _POINTS)])


def plot_subtasks(
    subtasks: Sequence[SubTask],
    accuracy: NDArray[np.float64],  # [K]
    information: NDArray[np.float64],  # [K]
    limit: float,
) -> str:
    """Two 10 x 10 pictures, context set by target set: accuracies in percent, and bounds in nats up to `limit`."""
    sides = [*((element,) for element in ELEMENTS), *itertools.combinations(ELEMENTS, 2)]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for axes, values, full, title in (
            (left, 100 * accuracy, 100.0, "Accuracy, %"),
            (right, information, limit, "Mutual information, at least, nats"),
        ):
            _start_grid(axes, [" ".join(side) for side in sides], rotation=90)
            axes.set_title(title, pad=14)
            axes.set_ylabel("context")
            axes.xaxis.set_label_position("top")
            axes.set_xlabel("target")
            for subtask, value in zip(subtasks, values, strict=True):
                row, column = sides.index(subtask.inputs), sides.index(subtask.targets)
                digits = 1 if full == 100.0 else 2
                _fill_cell(axes, row, column, value / full, f"{value:.{digits}f}", subtask.between_modalities)
            between_singles_and_pairs = len(ELEMENTS) - 0.5
            axes.axhline(between_singles_and_pairs, color=_LIGHT["soft"], linewidth=0.8)
            axes.axvline(between_singles_and_pairs, color=_LIGHT["soft"], linewidth=0.8)

    return _draw("subtasks", 540, draw)


def _start_grid(axes: Axes, labels: Sequence[str], rotation: float) -> None:
    count = len(labels)
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.grid(visible=False)
    axes.set_xticks(range(count), labels, rotation=rotation, color=_LIGHT["ink"])
    axes.set_yticks(range(count), labels, color=_LIGHT["ink"])
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


def _fill_cell(axes: Axes, row: int, column: int, share: float, text: str, framed: bool = False) -> None:
    """One cell of a grid, its colour the stronger the larger its share, with the text on top."""
    if not math.isfinite(share):
        share, text = 0.0, "\u2013"
    strength = 0.06 + 0.94 * min(max(share, 0.0), 1.0)
    corner, side = (column - 0.46, row - 0.46), 0.92
    axes.add_patch(Rectangle(corner, side, side, facecolor=_LIGHT["accent"], alpha=strength, linewidth=0))
    if framed:
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=_LIGHT["accent"], linewidth=1.4))
    colour = _LIGHT["on-accent" if strength > 0.66 else "ink"]
    axes.text(column, row, text, ha="center", va="center", fontsize=9.5, color=colour)


def plot_confusion(
    rates: NDArray[np.float64],  # [words spoken, words chosen], each row sums to 1
    words: Sequence[str],
    name: str,
) -> str:
    """The confusion matrix, with the words in the order given; shares of 5% or more are written into the cells."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if len(words) > LABELLED_WORDS:
            _draw_picture(axes, rates)
        else:
            _start_grid(axes, words, rotation=90)
            for row, column in np.argwhere(rates > 0):
                share = float(rates[row, column])
                _fill_cell(axes, row, column, share, f"{100 * share:.0f}" if share >= 0.05 else "")
        axes.set_ylabel("spoken")
        axes.set_xlabel("read as")
        axes.xaxis.set_label_position("top")

    side = 31 * min(max(len(words), 6), LABELLED_WORDS // 2)
    margin = 8 * max(map(len, words)) + 30 if len(words) <= LABELLED_WORDS else 40
    return _draw(name, side + margin, draw, min(side + margin + 10, _WIDTH))


def _draw_picture(axes: Axes, rates: NDArray[np.float64]) -> None:
    """Each cell is a pixel: no colour for 0, full accent for 1, by the square root, so that rare confusions show."""
    accent = [int(_LIGHT["accent"][place : place + 2], 16) for place in (1, 3, 5)]
    picture = np.empty((*rates.shape, 4), np.uint8)
    picture[..., :3] = accent
    picture[..., 3] = np.round(255 * np.sqrt(rates))
    axes.imshow(picture, interpolation="none")
    axes.grid(visible=False)
    axes.tick_params(length=0, labelleft=False, labelbottom=False)
