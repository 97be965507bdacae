"""The reports of `pytest benchmarks -k log_mel`: how many times faster than each peer, by how many clips at once."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_tables import markdown

Record = dict[str, Any]  # a benchmark's extra_info, with its test's name as "test"


def report_log_mel(records: list[Record]) -> Figure:
    """Prints the table and what is lost; draws rates of 64 clips of 4 s, and ratios over the number of clips."""
    steps = [record for record in records if record["test"].startswith("test_64_clips")]
    grid = [record for record in records if record["test"].startswith("test_clips")]
    print("64 clips of 4 s, times faster by medians (by fastest turns):\n")
    print(_table(steps), end="\n\n")
    losing = [f"- {r['test']}: {r['times_faster']:.2f} by medians\n" for r in grid + steps if r["times_faster"] < 1]
    print("Losing cases:" if losing else "Losing cases: none.", "".join(losing), sep="\n")
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    rates, ratios = figure.subplots(1, 2)
    _draw_rates(rates, steps)
    _draw_ratios(ratios, [record for record in grid if record["seconds"] < 2])
    return figure


def report_log_mel_cuda(records: list[Record]) -> Figure:
    """On a GPU: milliseconds of ours and of each peer at every size, and our share of a copy's bandwidth."""
    sizes = [_size(record) for record in records if _peer(record) == _peers(records)[0]]
    rows = []
    for peer in _peers(records):
        cells = {_size(record): record for record in _of(records, peer)}
        rows.append([peer, *(_gpu_cell(cells[size], peer) if size in cells else "-" for size in sizes)])
    print(markdown(["peer: ms (ours), times faster", *sizes], rows), end="\n\n")
    losing = [f"- {r['test']}: {r['times_faster']:.2f}\n" for r in records if r["times_faster"] < 1]
    print("Losing cases:" if losing else "Losing cases: none.", "".join(losing), sep="\n")
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    ratios, shares = figure.subplots(1, 2)
    for peer in _peers(records):
        ratios.plot(sizes, [r["times_faster"] for r in _of(records, peer)], marker="o", markersize=3, label=peer)
        shares.plot(sizes, [r["share_of_copy"] for r in _of(records, peer)], marker="o", markersize=3, label=peer)
    ratios.axhline(1, color="#98a2ad", linewidth=0.8)
    ratios.set(yscale="log", title="times faster")
    shares.set(ylim=(0, None), title="ours in the peer's convention: share of a copy's bandwidth")
    ratios.legend(frameon=False, fontsize=7)
    return figure


def _size(record: Record) -> str:
    return f"{record['clips']} x {record['seconds']:g} s"


def _gpu_cell(record: Record, peer: str) -> str:
    ours, theirs = (min(times[0] for times in record["milliseconds"][name].values()) for name in ("ours", peer))
    return f"{theirs:.3f} ({ours:.3f}), {record['times_faster']:.1f}"


def _table(steps: list[Record]) -> str:
    threads = sorted({record["threads"] for record in steps})
    rows = []
    for peer in _peers(steps):
        cells = {r["threads"]: f"{r['times_faster']:.1f} ({r['times_faster_best']:.1f})" for r in _of(steps, peer)}
        rows.append([peer, *(cells.get(count, "-") for count in threads)])
    return markdown(["peer", *map(_threads, threads)], rows)


def _draw_rates(axes: Axes, steps: list[Record]) -> None:
    """Two bars a peer and number of threads: ours in the peer's convention, and the peer."""
    peers = _peers(steps)
    for place, peer in enumerate(peers):
        for row, record in enumerate(_of(steps, peer)):
            y, rate = place + 0.4 * row, record["frames_per_second"]
            axes.barh(y, rate["ours"] / 1e6, 0.36, color="#2560a8", alpha=0.4)
            axes.barh(y, rate[peer] / 1e6, 0.36, color="#bf6516")
            text = f" {record['times_faster']:.1f} x, {_threads(record['threads'])}"
            axes.annotate(text, (rate[peer] / 1e6, y), va="center", fontsize=7)
    axes.set_yticks([place + 0.2 for place in range(len(peers))], peers)
    axes.set(title="64 clips of 4 s: each peer, and ours (pale)", xlabel="million frames a second")


def _draw_ratios(axes: Axes, grid: list[Record]) -> None:
    for peer in _peers(grid):
        chosen = _of(grid, peer)
        ratios = [record["times_faster"] for record in chosen]
        axes.plot([record["clips"] for record in chosen], ratios, marker="o", markersize=3, label=peer)
    axes.axhline(1, color="#98a2ad", linewidth=0.8)
    axes.set(xscale="log", yscale="log", title="clips of 1.16 s: times faster", xlabel="clips at once")
    counts, factors = sorted({record["clips"] for record in grid}), (1, 2, 5, 10, 20, 50)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_yticks(factors, [str(factor) for factor in factors])
    axes.minorticks_off()
    axes.set_ylim(bottom=0.55)  # room for the names below the line of equal speed
    axes.legend(frameon=False, fontsize=7, loc="lower center", ncols=3)


def _peer(record: Record) -> str:
    return record["test"].split("[")[1].split("-")[0].rstrip("]")


def _peers(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(map(_peer, records)))


def _of(records: list[Record], peer: str) -> list[Record]:
    return [record for record in records if _peer(record) == peer]


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count > 1)
