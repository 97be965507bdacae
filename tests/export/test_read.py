"""`avppc read`: it reads what evaluation reads, at the right time, of any file; and the page holds it all."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import itertools
import json
import os
import re
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from blob_faces import BlobFinder, write_face_video
from make_videos import set_matrix, write_video
from tiny_runs import WORDS, make_clip, tiny_config, write_tiny_set

import avppc.export.read as read
from avppc.cli import main
from avppc.config import EvaluateConfig, ReadConfig
from avppc.evaluate.lipreading.evaluate import evaluate
from avppc.evaluate.lipreading.heads import load_reader, reader_path, save_reader
from avppc.export.read import compare, find_words
from avppc.export.read_page import SpokenWord
from avppc.train.loop import pretrain

EXACT = {"size": (96, 96), "options": {"qp": "0", "preset": "ultrafast"}}  # the luma comes back as it was


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with a reader."""
    folder = tmp_path_factory.mktemp("read")
    pretrain(tiny_config(write_tiny_set(folder / "packed"), folder / "run", steps=2))
    few = {"labels_per_word": 8, "draws": 1, "heads": ("bins",), "head_learning_rates": (1e-2,), "epochs": 20}
    config = EvaluateConfig(folder / "run", rows=("frozen",), **few, threads=1, workers=1, device="cpu")
    evaluate(config, show=False)
    return folder / "run"


def talking(number: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """[height, width] the three words one after the other, 29 frames each, in the middle of a larger frame."""
    word, frame = divmod(number, 29)
    image = np.full((height, width), 120, np.uint8)
    top, left = (height - 96) // 2, (width - 96) // 2
    image[top : top + 96, left : left + 96] = make_clip(word % 3, 2000 + word)["video"][frame]
    return image


def read_json(run: Path, video: Path, *flags: str, code: int = 0) -> dict:
    out = video.with_suffix(".json")
    page = ["--out", str(video.with_suffix(".html")), "--json", str(out), "--threads", "1", "--device", "cpu"]
    assert main(["read", str(video), "--run", str(run), "--precision", "fp32", *page, *flags]) == code
    return json.loads(out.read_text())


def test_windows_give_what_the_reader_gives_of_the_same_clips(run: Path, tmp_path: Path, capsys) -> None:
    video = write_video(tmp_path / "three.mp4", frames=87, pattern=talking, **EXACT)
    found = read_json(run, video)
    reader = load_reader(run)
    clips = torch.from_numpy(np.stack([make_clip(word, 2000 + word)["video"] for word in range(3)]))
    expected = reader.read(clips)
    seconds = [window["seconds"] for window in found["windows"]]
    assert seconds == pytest.approx([(start + 14.5) / 25 for start in range(59)])
    for word, start in enumerate((0, 29, 58)):
        shares = found["windows"][start]["words"]
        assert list(shares) == [WORDS[place] for place in expected[word].argsort(descending=True)]
        assert [shares[name] for name in WORDS] == pytest.approx(expected[word].tolist(), abs=2e-3)
    assert found["text"] == " ".join(item["word"] for item in found["words"])
    assert found["reader"]["words"] == list(WORDS)
    assert found["refused"] == []
    assert found["damage"] is None
    assert capsys.readouterr().out.splitlines()[0] == found["text"]


def test_a_larger_stride_takes_every_so_many_windows(run: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", frames=60, pattern=talking, **EXACT)
    every = read_json(run, video)["windows"]
    assert read_json(run, video, "--stride-frames", "4")["windows"] == every[::4]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("no-sound", {"audio_codec": None}),
        ("late-sound", {"audio_start": 1.5}),
        ("short-sound", {"audio_seconds": 0.2}),
        (
            "double-rate",
            {"fps": 50, "frames": 120, "pattern": lambda number, *given, **_: talking(number // 2, *given)},
        ),
    ],
)
def test_sound_and_frame_rate_change_nothing_that_is_seen(run: Path, tmp_path: Path, name: str, options: dict) -> None:
    settings = {"frames": 60, "pattern": talking, **EXACT}
    plain = read_json(run, write_video(tmp_path / "plain.mp4", **settings))
    other = read_json(run, write_video(tmp_path / f"{name}.mp4", **{**settings, **options}))
    count = min(len(plain["windows"]), len(other["windows"]))  # a double rate ends half a frame later
    assert count >= 31
    assert other["windows"][:count] == plain["windows"][:count]
    if name == "no-sound":
        assert other["offset"] == {"late_ms": None, "problem": "the video has no sound"}


def test_frames_that_are_missing_are_told(run: Path, tmp_path: Path, capsys) -> None:
    video = write_video(tmp_path / "hole.mkv", frames=87, pattern=talking, skipped=range(40, 48), **EXACT)
    found = read_json(run, video, code=3)
    (refused,) = found["refused"]
    assert refused["reason"].startswith("frames missing: ")
    read_starts = {round(window["seconds"] * 25 - 14.5) for window in found["windows"]}
    bad = [start for start in range(59) if start not in read_starts]
    assert bad == list(range(bad[0], bad[-1] + 1))
    assert 40 - 29 < bad[0] < bad[-1] < 48
    assert refused["start_seconds"] == pytest.approx((bad[0] + 14.5) / 25)
    assert "not read from" in capsys.readouterr().out


def test_a_video_cut_short_is_read_up_to_there(run: Path, tmp_path: Path, capsys) -> None:
    video = write_video(tmp_path / "cut.ts", frames=87, pattern=talking, audio_codec=None, **EXACT)
    content = bytearray(video.read_bytes())
    content[len(content) * 2 // 3 :] = bytes(len(content) // 10)
    video.write_bytes(content)
    found = read_json(run, video, code=3)
    assert found["damage"]
    assert 0 < len(found["windows"]) < 59
    assert "not read after" in capsys.readouterr().out
    assert "Only the video up to" in video.with_suffix(".html").read_text()


@pytest.mark.parametrize(
    ("frames", "flags", "message"),
    [
        (28, [], r"short\.mp4: too short: 28 frames of 1/25 s, 29 are needed"),
        (29, ["--crop", "box"], "crop 'box' takes the mouth's place from a manifest"),
        (29, ["--crop", "window"], "the window of rows 115:211.* does not fit into a frame of 96 x 96"),
    ],
)
def test_what_cannot_be_read_is_told(
    run: Path, tmp_path: Path, frames: int, flags: list[str], message: str, capsys
) -> None:
    video = write_video(tmp_path / "short.mp4", frames=frames, pattern=talking, **EXACT)
    assert main(["read", str(video), "--run", str(run), "--out", str(tmp_path / "page.html"), *flags]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert [path.name for path in tmp_path.iterdir()] == ["short.mp4"]


def test_no_other_file_is_replaced(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "v.mp4", pattern=talking, **EXACT)
    Path("v.html").write_text("<html>mine</html>")
    assert main(["read", "v.mp4", "--run", str(run)]) == 2
    assert "v.html is there already, and not a page of this command" in " ".join(capsys.readouterr().err.split())
    assert Path("v.html").read_text() == "<html>mine</html>"
    Path("v.html").unlink()
    for _ in range(2):  # one of its own is
        assert main(["read", "v.mp4", "--run", str(run), "--device", "cpu"]) == 0


class Full(io.BytesIO):
    """A file on a disk that has room for so many bytes."""

    room = 0

    def write(self, piece: bytes) -> int:
        if self.tell() + len(piece) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(piece)


@pytest.mark.parametrize("room", [0, 30, 6000])
def test_a_full_disk_is_told_with_the_file_and_nothing_stays(
    run: Path, tmp_path: Path, monkeypatch, capsys, room: int
) -> None:
    """Whether it is full at the film's head, among its pictures or at its end."""
    video = write_video(tmp_path / "v.mp4", frames=60, pattern=talking, **EXACT)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(Full, "room", room)
    opened = Path.open

    def open_file(path: Path, mode: str = "r", **given: Any) -> Any:
        return Full() if path.name == "film" and "w" in mode else opened(path, mode, **given)

    monkeypatch.setattr(Path, "open", open_file)
    page = tmp_path / "v.html"
    assert main(["read", str(video), "--run", str(run), "--out", str(page), "--device", "cpu", "--threads", "1"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"No space left on device: '{temporary / 'avppc-read'}'" in told
    assert "Traceback" not in told
    assert not page.exists()
    assert [*temporary.iterdir()] == []


def page_parts(page: str) -> tuple[bytes, dict]:
    """The video in a page, and the data of its script."""
    film = re.search(r'src="data:video/\w+;base64,([^"]*)"', page)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert film is not None
    assert data is not None
    return base64.b64decode(film[1], validate=True), json.loads(data[1])


def test_the_page_holds_the_video_and_loads_nothing(run: Path, tmp_path: Path) -> None:
    video = write_video(tmp_path / '<b>&".mp4', frames=60, pattern=talking, flashes=(1.0,), **EXACT)
    found = read_json(run, video)
    page = video.with_suffix(".html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;&#34;.mp4" in page
    film, data = page_parts(page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert policy is not None
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy[1]
    assert policy[1].startswith("default-src 'none'")
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    with av.open(io.BytesIO(film)) as container:
        frames = [(frame.time, frame.to_ndarray(format="gray").mean()) for frame in container.decode(video=0)]
        assert len(container.streams.audio) == 1
    assert [time for time, _ in frames] == pytest.approx([number / 25 for number in range(60)])
    assert int(np.argmax([mean for _, mean in frames])) == 25  # the flash, when the video has it
    assert data["times"] == pytest.approx([window["seconds"] for window in found["windows"]], abs=1e-3)
    names = [[data["vocabulary"][word] for word in words] for words in data["words"]]
    assert names == [list(window["words"]) for window in found["windows"]]
    assert data["box"] == [0, 0, 96, 96]
    for item in found["words"]:
        assert f">{item['word']}</button>" in page


def test_a_turned_video_is_shown_and_read_upright(run: Path, tmp_path: Path) -> None:
    """As phones record: the picture lies on its side, and the file says so."""
    upright = write_video(tmp_path / "upright.mp4", frames=40, pattern=talking, **(EXACT | {"size": (160, 96)}))

    def lying(number: int, height: int, width: int, seed: int = 0) -> np.ndarray:
        return np.rot90(talking(number, width, height)).copy()

    turned = write_video(tmp_path / "turned.mp4", frames=40, pattern=lying, **(EXACT | {"size": (96, 160)}))
    set_matrix(turned, 0, 1, -1, 0)
    expected, found = read_json(run, upright), read_json(run, turned)
    assert found["windows"] == expected["windows"]
    film, data = page_parts(turned.with_suffix(".html").read_text())
    assert (data["width"], data["box"]) == (96, [0, 32, 96, 128])
    with av.open(io.BytesIO(film)) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (96, 160)


def test_a_mouth_that_is_followed_has_a_box_in_each_frame(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(read, "make_finder", lambda name: BlobFinder())
    video = write_face_video(tmp_path / "face.mp4", [(60 + n / 2, 60) for n in range(50)])
    found = read_json(run, video, "--crop", "mesh")
    assert len(found["windows"]) == 22
    _, data = page_parts(video.with_suffix(".html").read_text())
    track = data["track"]
    assert track["times"] == pytest.approx([number / 25 for number in range(50)], abs=1e-3)
    places = np.array(track["places"])
    assert np.abs(places[:, 0] - (60.5 + np.arange(50) / 2)).max() < 1.0
    assert np.abs(np.hypot(places[:, 2], places[:, 3]) - 40).max() < 2.0


def test_a_video_without_a_face_is_refused(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(read, "make_finder", lambda name: BlobFinder())
    video = write_face_video(tmp_path / "nobody.mp4", [None] * 40)
    flags = ["--crop", "mesh", "--out", str(tmp_path / "page.html")]
    assert main(["read", str(video), "--run", str(run), *flags]) == 2
    assert "no face to follow: one was found in 0 of 40 frames" in " ".join(capsys.readouterr().err.split())


def test_the_crop_is_that_of_the_training_clips(run: Path, tmp_path: Path) -> None:
    """A reader remembers how its clips were cropped; what is asked for comes first."""
    reader = load_reader(run)
    window = {"crop": "window", "crop_rows": (40, 136), "crop_columns": (8, 104)}
    info = type(reader.info)(**{**vars(reader.info), "crop": type(reader.info.crop)(**window)})
    path = reader_path(tmp_path, "frozen", 8)
    save_reader(info, reader.state_dict(), path)
    video = write_video(tmp_path / "v.mp4", frames=29, pattern=talking, **(EXACT | {"size": (200, 120)}))
    rows = ["--crop-rows", "40", "136", "--crop-columns", "8", "104"]
    remembered = read_json(path, video)["windows"]
    assert remembered == read_json(run, video, "--crop", "window", *rows)["windows"]
    assert "Nothing tells where the mouth is" not in video.with_suffix(".html").read_text()
    assert remembered != read_json(path, video, "--crop", "centre")["windows"]
    assert "Nothing tells where the mouth is" not in video.with_suffix(".html").read_text()
    read_json(run, video)  # of clips whose crop nobody knows: the middle square, and that is said
    assert "Nothing tells where the mouth is" in video.with_suffix(".html").read_text()


def test_what_is_said_is_shown_and_compared(run: Path, tmp_path: Path, capsys) -> None:
    """The reader's own likeliest words, said at their middles, are all right; others are not."""
    video = write_video(tmp_path / "three.mp4", frames=87, pattern=talking, **EXACT)
    (tmp_path / "three.align").write_text("0 29000 open\n29000 58000 SHUT\n58000 87000 ship\n87000 88000 sil\n")
    found = read_json(run, video, "--words", str(tmp_path / "three.align"))
    expected = [next(iter(found["windows"][start]["words"])) for start in (0, 29, 58)]
    truth = found["truth"]
    assert [item["word"] for item in truth["words"]] == ["OPEN", "SHUT", "ship"]
    assert [item["at_middle"] for item in truth["words"]] == expected
    assert truth["right_at_middle"] == sum(a == b for a, b in zip(expected, ("OPEN", "SHUT", "ship"), strict=True)) / 3
    assert [item["known"] for item in truth["words"]] == [True, True, False]
    assert f"of 3 words of {tmp_path / 'three.align'}" in capsys.readouterr().out
    _, data = page_parts(video.with_suffix(".html").read_text())
    assert [(item["word"], item["end"]) for item in data["truth"]] == [("OPEN", 1.16), ("SHUT", 2.32), ("ship", 3.48)]
    table = tmp_path / "words.tsv"
    table.write_text("clip\tstart_frame\tend_frame\tword\ns1/three\t0\t29\tOPEN\nother\t0\t29\tSHUT\n")
    assert [item["word"] for item in read_json(run, video, "--words", str(table))["truth"]["words"]] == ["OPEN"]
    table.write_text("clip\tstart_frame\tend_frame\tword\nother\t0\t29\tSHUT\n")
    assert main(["read", str(video), "--run", str(run), "--words", str(table)]) == 2
    assert "words.tsv has no words of three" in " ".join(capsys.readouterr().err.split())


def test_not_more_than_a_batch_of_windows_is_held(run: Path, tmp_path: Path, monkeypatch) -> None:
    held = []
    add = read._Found.add

    def note(found: read._Found, clips: list) -> None:
        held.append(len(clips))
        add(found, clips)

    monkeypatch.setattr(read._Found, "add", note)
    monkeypatch.setattr(read, "_BATCH", 10)
    video = write_video(tmp_path / "v.mp4", frames=80, pattern=talking, **EXACT)
    assert len(read_json(run, video)["windows"]) == 52
    assert held == [10] * 5 + [2]


def test_a_recording_that_declares_no_length_has_one(run: Path, tmp_path: Path) -> None:
    """As browsers record: WebM written to a stream."""
    video = write_video(
        tmp_path / "live.webm",
        frames=50,
        pattern=talking,
        size=(96, 96),
        video_codec="libvpx",
        audio_codec="libopus",
        rate=48_000,
        options={"deadline": "realtime"},
        container_options={"live": "1"},
    )
    picture = read.look_at(video)
    assert picture.seconds == pytest.approx(2.0, abs=0.06)
    assert picture.origin_seconds == Fraction(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": Path("page.mp4")}, r"out must end in \.html or \.htm, got page\.mp4"),
        ({"json": Path("config")}, r"json must end in \.json, got config"),
        ({"stride_frames": 0}, "stride_frames must be from 1 to 1000, got 0"),
    ],
)
def test_settings_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReadConfig(video=Path("v.mp4"), run=Path("run"), **changes)


def moments(rows: list[dict[int, float]], words: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds, numbers and probabilities of moments that give some words."""
    table = np.full((len(rows), words), 0.01, np.float32)
    for line, row in zip(table, rows, strict=True):
        for word, share in row.items():
            line[word] = share
    order = np.argsort(-table, 1)[:, :3].astype(np.int32)
    return (np.arange(len(rows)) + 14.5) / 25, order, np.take_along_axis(table, order, 1)


NAMES = ("bin", "blue", "at", "now")


def test_words_are_found_where_they_are_likeliest() -> None:
    rows = [{0: 0.9}] * 6 + [{0: 0.5, 1: 0.4}] + [{1: 0.8}] * 4 + [{2: 0.9}] + [{1: 0.8}] * 4 + [{3: 0.7}] * 5
    found = find_words(*moments(rows), NAMES)
    assert [item.word for item in found] == ["bin", "blue", "now"]  # one moment of "at" is not worth two changes
    assert found[0].start_seconds == pytest.approx(14 / 25)
    assert found[1].start_seconds == pytest.approx(found[0].end_seconds)
    assert found[2].probability == pytest.approx(0.7)
    assert found[1].start_seconds <= found[1].seconds <= found[1].end_seconds


def test_a_word_that_is_never_probable_is_left_out() -> None:
    rows = [{0: 0.9}] * 6 + [{3: 0.2}] * 9 + [{1: 0.9}] * 6
    assert [item.word for item in find_words(*moments(rows), NAMES)] == ["bin", "blue"]
    assert find_words(*(array[:0] for array in moments(rows)), NAMES) == []


def test_nothing_is_said_across_a_gap() -> None:
    seconds, numbers, probabilities = moments([{0: 0.9}] * 12)
    seconds[6:] += 3.0
    first, second = find_words(seconds, numbers, probabilities, NAMES)
    assert (first.word, second.word) == ("bin", "bin")
    assert first.end_seconds < second.start_seconds - 2.9


def test_the_path_is_the_best_of_all() -> None:
    """Against all rows of words that there are."""
    generator = np.random.default_rng(0)
    for _ in range(5):
        table = generator.dirichlet([0.4] * 3, 6).astype(np.float32)
        order = np.argsort(-table, 1).astype(np.int32)
        found = find_words(np.arange(6) / 25, order, np.take_along_axis(table, order, 1), NAMES[:3])
        paths = np.stack(np.meshgrid(*[np.arange(3)] * 6, indexing="ij"), -1).reshape(-1, 6)
        gains = np.log(table + 1e-3)[np.arange(6), paths].sum(1) - 5.0 * (np.diff(paths) != 0).sum(1)
        best = paths[gains.argmax()]
        changes = [best[0], *(word for before, word in itertools.pairwise(best) if word != before)]
        likely = [NAMES[word] for word in changes]
        assert [item.word for item in found] == [word for word in likely if word in {item.word for item in found}]


def test_words_that_are_said_are_compared_with_those_that_were_read() -> None:
    seconds, likeliest = np.arange(10) / 10, np.array([0, 0, 0, 1, 1, 1, 3, 3, 3, 3], np.int32)
    found = [SpokenWord("bin", 0.0, 0.3, 0.1, 0.9), SpokenWord("now", 0.6, 1.0, 0.8, 0.9)]
    truth = [("BIN", 0.0, 0.2), ("bin", 0.2, 0.3), ("blue", 0.3, 0.5), ("now", 0.45, 0.55), ("ship", 3.0, 4.0)]
    compared = compare(truth, found, seconds, likeliest, NAMES)
    assert [item.found for item in compared] == [True, False, False, False, False]  # each word is read once
    assert [item.at_middle for item in compared] == ["bin", "bin", "blue", "blue", ""]
    assert [item.right_at_middle for item in compared] == [True, True, True, False, False]
    assert [item.known for item in compared] == [True, True, True, True, False]
