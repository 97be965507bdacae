"""What the pages of the report and of the table share."""

from __future__ import annotations

import re
from pathlib import Path

from report_runs import write_run

from avppc.config import ReportConfig, TableConfig
from avppc.evaluate.report.plots import PALETTE
from avppc.evaluate.report.report import render
from avppc.evaluate.table.results import Table, entries_of
from avppc.evaluate.table.table import to_html


def test_both_pages_have_one_style_sheet_with_every_colour_for_light_and_dark(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tmp_path / "packed")
    config = TableConfig(tmp_path / "packed", tmp_path / "table")
    pages = (render(ReportConfig(tmp_path / "run")), to_html(Table(config, entries_of(config), {}, [])))
    sheets = [re.findall(r"<style>(.*?)</style>", page, re.DOTALL) for page in pages]
    assert sheets[0] == sheets[1]
    assert len(sheets[0]) == 1
    light, dark = sheets[0][0].split("@media (prefers-color-scheme: dark)")
    for name, (of_light, of_dark) in PALETTE.items():
        assert f"--{name}: {of_light};" in light
        assert f"--{name}: {of_dark};" in dark
    assert not re.search(r"--[a-z-]+: #", "".join(page.partition("</style>")[2] for page in pages))
