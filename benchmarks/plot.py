"""Draws what `pytest benchmarks` measured and prints it as markdown tables: `python benchmarks/plot.py FOLDER ...`.

Reads only the JSON in each folder (benchmarks/results/MACHINE, from `--benchmark-json=FOLDER/NAME.json`) and writes
FOLDER/NAME.png beside it. Losing cases are drawn and listed like the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plot_log_mel import report_log_mel, report_log_mel_cuda
from plot_tables import TABLE_D, markdown

Record = dict[str, Any]  # a benchmark's extra_info, with its test's name as "test"

COLOURS = {
    "ours": "#2560a8",
    "eager bmm": "#bf6516",
    "eager loop": "#b09a2c",
    "compiled bmm": "#2a8a6c",
    "compiled loop": "#7bb661",
    "checkpointed loop": "#8356a5",
    "linear_cross_entropy loop": "#c0504d",
}


def main(folders: Sequence[str]) -> int:
    """Draws and prints every folder; 2 without one."""
    if not folders:
        print(__doc__, file=sys.stderr)
        return 2
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    for folder in map(Path, folders):
        for path in sorted(folder.glob("*.json")):
            report = REPORTS.get(path.stem)
            if report is None:
                continue
            results = json.loads(path.read_text())
            records = [{**result["extra_info"], "test": result["name"]} for result in results["benchmarks"]]
            print(f"\n## {path.stem}: {caption(results['machine_info'])}\n")
            figure = report(records)
            figure.savefig(path.with_suffix(".png"), dpi=160)
    return 0


def caption(machine: dict[str, Any]) -> str:
    """The machine, the versions and the day of the figures."""
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    changed = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    commit = machine["commit"][:7] if machine["commit"] else "commit unknown"
    return f"{where}, torch {machine['versions']['torch']}, {machine['date']}, {commit}{changed}"


def report_info_nce(records: list[Record]) -> Figure:
    """Milliseconds of a full step of the 42 by every way to compute it; how many times faster ours is everywhere."""
    steps = [record for record in records if "share_of_mm" in record and record["mode"] == "full"]
    table = [r for r in steps if (r["K"], r["D"], r["dtype"]) == (42, TABLE_D, "float32")]
    print(markdown(*_info_nce_table(table)), end="\n\n")
    losing = [(r["test"], name, ratio) for r in records for name, ratio in r["times_faster"].items() if ratio < 1]
    print("Losing cases:" if losing else "Losing cases: none.")
    print("".join(f"- {test}: {name} takes {ratio:.2f} of our time\n" for test, name, ratio in losing))

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    times, ratios, memory = figure.subplots(1, 3)
    _draw_lines(times, table, "milliseconds")
    times.set(xscale="log", yscale="log", title=f"full step, K = 42, D = {TABLE_D}, float32", ylabel="ms")
    for width in sorted({record["D"] for record in steps}):
        chosen = [r for r in steps if (r["K"], r["D"], r["dtype"]) == (42, width, "float32")]
        sizes = [record["N"] for record in chosen]
        ratios.plot(sizes, [r["times_faster"]["eager bmm"] for r in chosen], marker="o", label=f"D = {width}")
    ratios.axhline(1, color="#98a2ad", linewidth=0.8)
    ratios.set(xscale="log", title="times faster than eager bmm", ylim=(0, None))
    _draw_lines(memory, [record for record in table if "peak_extra_mib" in record], "peak_extra_mib")
    memory.set(xscale="log", yscale="log", title="peak memory over the inputs", ylabel="MiB")
    for axes in (times, ratios, memory):
        _mark_sizes(axes)
    times.legend(frameon=False, fontsize=7)
    ratios.legend(frameon=False, fontsize=7)
    return figure


def _info_nce_table(table: list[Record]) -> tuple[list[str], list[list[str]]]:
    header = ["N", "ours", "eager bmm", "compiled bmm", "best other", "times faster than it", "GFLOP/s", "of torch.mm"]
    rows = []
    for record in table:
        times, faster = record["milliseconds"], record["times_faster"]
        nearest = min(faster, key=faster.__getitem__)
        rows.append(
            [
                f"{record['N']:,}",
                *(f"{times[name]:,.1f} ms" for name in ("ours", "eager bmm", "compiled bmm")),
                f"{nearest}, {times[nearest]:,.1f} ms",
                f"{faster[nearest]:.2f}",
                f"{record['useful_gflop_per_second']:,.0f}",
                f"{100 * record['share_of_mm']:.0f} %",
            ]
        )
    return header, rows


def _draw_lines(axes: Axes, records: list[Record], quantity: str) -> None:
    """A line for each contestant, over N."""
    for name in records[0][quantity] if records else ():
        if name == "products":
            style: dict[str, Any] = {"color": "#98a2ad", "linestyle": ":", "label": "torch.mm alone"}
        else:
            style = {"color": COLOURS[name], "marker": "o", "markersize": 3, "label": name}
            style["linewidth"] = 2.2 if name == "ours" else 1.1
        axes.plot([record["N"] for record in records], [record[quantity][name] for record in records], **style)


def _mark_sizes(axes: Axes) -> None:
    sizes = sorted({int(x) for line in axes.lines for x in line.get_xdata() if x > 1})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("N")


def report_info_nce_cuda(records: list[Record]) -> Figure:
    """On a GPU: milliseconds and peak memory of every contestant of every size, and our share of cuBLAS's speed."""
    steps = [record for record in records if "contestants" in record]
    for test in dict.fromkeys(_test_of(record) for record in steps):
        some = [record for record in steps if _test_of(record) == test]
        names = list(dict.fromkeys(name for record in some for name in record["contestants"]))
        rows = [[_size_of(r), f"{r['share_of_cublas']:.2f}", *(_gpu_cell(r, name) for name in names)] for r in some]
        print(markdown([f"{test}: ms (MiB)", "share of cuBLAS", *names], rows), end="\n\n")
    losing = [(r["test"], name, ratio) for r in steps for name, ratio in r["times_faster"].items() if ratio < 1]
    print("Losing cases:" if losing else "Losing cases: none.")
    print("".join(f"- {test}: {name} takes {ratio:.2f} of our time\n" for test, name, ratio in losing))
    figure = Figure(figsize=(9, 0.4 * len(steps) + 1.5), layout="constrained")
    axes: Axes = figure.subplots()
    labels = [f"{_test_of(record)}: {_size_of(record)}" for record in steps]
    axes.barh(labels, [r["share_of_cublas"] for r in steps], color=COLOURS["ours"])
    axes.invert_yaxis()
    axes.set_xlabel("cuBLAS on the same products, share of our time")
    return figure


def _test_of(record: Record) -> str:
    return str(record["test"]).split("[")[0].removeprefix("test_")


def _size_of(record: Record) -> str:
    return f"K {record['K']}, N {record['N']}, D {record['D']}"


def _gpu_cell(record: Record, name: str) -> str:
    result = record["contestants"].get(name, "")
    if isinstance(result, str):
        return result.split(":")[0]
    best = min(times[0] for times in (result["eager_ms"], result["graph_ms"]) if times)
    return f"{best:.3f} ({result['peak_extra_mib']:.0f})"


REPORTS: dict[str, Callable[[list[Record]], Figure]] = {
    "info_nce": report_info_nce,
    "info_nce_cuda": report_info_nce_cuda,
    "info_nce_cuda_peers": report_info_nce_cuda,
    "info_nce_cuda_compiled": report_info_nce_cuda,
    "log_mel": report_log_mel,
    "log_mel_cuda": report_log_mel_cuda,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
