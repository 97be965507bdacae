"""No command writes over its input, or over what is not its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from packed_sets import write_packed

from avppc.cli import main


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["pretrain", "--data", "packed", "--out", "packed/run"], "out must be a folder apart from data"),
        (["pretrain", "--data", "packed", "--out", "."], "out must be a folder apart from data"),
        (["table", "--data", "packed", "--out", "link/table"], "out must be a folder apart from data"),
        (["table", "--data", "packed", "--out", "mine"], "mine holds 'config.json', 'histogram.png', 'list.txt'"),
        (
            ["check-sync", "--data", "packed", "--out", "mine"],
            "histogram.png is there already",
        ),
        (["report", "--run", "mine", "--out", "mine/config.json"], "out must end in .html or .htm"),
        (["index", "--data", "mine", "--out", "mine/list.txt"], "out must end in .jsonl"),
        (["synth", "--out", "mine", "--overwrite"], "out must be an empty or missing folder"),
        (["export", "mine", "--out", "packed"], "mine"),
    ],
    ids=lambda value: "-".join(value[:1] + value[-1:]).replace("/", "-") if isinstance(value, list) else "",
)
def test_outputs_that_would_cost_something_are_refused(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_packed(tmp_path / "packed")
    os.symlink(tmp_path / "packed", tmp_path / "link")
    (tmp_path / "mine").mkdir()
    for name in ("config.json", "histogram.png", "list.txt", "table.html"):
        (tmp_path / "mine" / name).write_text("mine")
    before = contents(tmp_path)
    try:
        code = main(flags)
    except SystemExit as end:  # of a bad argument
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == before
