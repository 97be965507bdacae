from __future__ import annotations

import json

import numpy as np
import pytest
from make_videos import write_video

from avppc.cli import main
from avppc.data.prepare.worker import Notes, kind_of


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("frame rate 29.97: converted to 25 by nearest time stamp", "frame rate"),
        ("frames missing: 2 of 29, the first at 0.28 s", "frames missing"),
        ("frame rate 24.74-29.97: converted to 25 by nearest time stamp", "frame rate"),
        ("10-bit luma: the upper 8 bits are kept", "10-bit luma"),
        ("it crashes the decoder (signal 11, SIGSEGV)", "it crashes the decoder"),
        ("no audio stream", "no audio stream"),
    ],
)
def test_kinds(text, kind):
    assert kind_of(text) == kind


@pytest.mark.parametrize(
    ("notes", "lines"),
    [
        ([], []),
        (["rotation: by 90"] * 3, ["rotation: by 90"]),
        (["frame rate 9.5: to 25", "frame rate 24.74: to 25", "frame rate 10: to 25"], ["frame rate 9.5-24.74: to 25"]),
        (["sound padded: 0 to 20 ms", "frame rate 30: to 25", "sound padded: 0 to 90 ms"],
         ["sound padded: 0 to 20-90 ms", "frame rate 30: to 25"]),
        (["padded: 1 to 2 ms", "padded: 3 to 4 ms", "padded: 1 to 4 ms"],
         ["padded: 1 to 2 ms; otherwise in other clips, 2 times"]),
        (["cropped: left", "cropped: right"], ["cropped: left; otherwise in other clips, 1 times"]),
    ],
)  # fmt: skip
def test_one_line_a_kind(notes, lines):
    found = Notes()
    found.add(notes)
    assert found.lines() == lines


def test_an_uneven_frame_rate_is_one_line_of_a_video_and_one_kind_of_the_set(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    skipped = np.random.default_rng(0).choice(np.arange(1, 140, 2), 20, replace=False).tolist()
    write_video(
        tmp_path / "data/a.mp4", frames=150, fps=50, size=(48, 64), skipped=skipped, options={"preset": "ultrafast"}
    )
    assert main(["prepare", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    (line,) = (json.loads(text) for text in (tmp_path / "out/notes.jsonl").read_text().splitlines())
    assert line["note"].startswith("frame rate 4")
    assert "-4" in line["note"].split(":")[0]
    assert "     1  frame rate\n" in capsys.readouterr().out
