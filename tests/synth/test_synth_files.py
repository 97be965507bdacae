"""What lies on the disk: LRW's layout, the clock, the manifest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avppc.clip import SPLITS
from avppc.synth.config import WORDS, SynthConfig
from avppc.synth.dataset import read_records
from avppc.synth.voice import voice_variants
from avppc.synth.worker import write_contact_sheet


def test_files_lie_as_in_lrw(small_set: Path) -> None:
    found = {str(path.relative_to(small_set)) for path in small_set.rglob("*") if path.is_file()}
    expected = {"synth.json", "manifest.jsonl", "contact_sheet.png"}
    stems = [f"_UNLABELED/train/_UNLABELED_{number:05d}" for number in (1, 2)]
    for word in WORDS[:10]:
        stems += [f"{word}/train/{word}_00001", f"{word}/train/{word}_00002"]
        stems += [f"{word}/val/{word}_00001", f"{word}/test/{word}_00001"]
    expected |= {stem + suffix for stem in stems for suffix in (".mp4", ".txt", ".npy")}
    assert found == expected


def test_clips_keep_lrws_clock(small_set: Path, decode_clip: Callable[[Path], Any]) -> None:
    for path in (small_set / "MILLION/train/MILLION_00001.mp4", small_set / "_UNLABELED/train/_UNLABELED_00002.mp4"):
        clip = decode_clip(path)
        assert clip.codecs == ("h264", "aac")
        assert clip.frames.shape == (29, 256, 256, 3)
        np.testing.assert_allclose(clip.frame_seconds, np.arange(29) / 25, atol=1e-6)
        assert (clip.rate_hz, len(clip.audio)) == (16_000, 18_560)
        assert clip.audio.std() > 0.005
        assert clip.frames.std(axis=0).max() > 5, "nothing moves"


def test_text_holds_the_duration_in_its_fifth_line(small_set: Path) -> None:
    for record in read_records(small_set / "manifest.jsonl").values():
        lines = (small_set / record["path"]).with_suffix(".txt").read_text().splitlines()
        match = re.fullmatch(r"Duration: (\d+\.\d\d) seconds", lines[4])
        assert match, lines
        assert float(match[1]) == pytest.approx(record["word_seconds"] or 1.16, abs=0.0051)


def test_mouths_are_plain_arrays(small_set: Path) -> None:
    columns = json.loads((small_set / "synth.json").read_text())["mouth_columns"]
    mouths = [np.load(path, allow_pickle=False) for path in small_set.rglob("*.npy")]
    assert {(mouth.shape, mouth.dtype.str) for mouth in mouths} == {((29, len(columns)), "<f2")}
    assert np.isfinite(mouths).all()
    opening = np.concatenate(mouths)[:, columns.index("open")]
    assert opening.min() >= 0
    assert opening.min() < 0.05 < 0.5 < opening.max() < 1.5


def test_manifest_has_every_clip_with_its_checksum(small_set: Path, small_config: SynthConfig) -> None:
    records = list(read_records(small_set / "manifest.jsonl").values())
    assert len(records) == small_config.clips == 42
    assert {record["path"] for record in records} == {str(p.relative_to(small_set)) for p in small_set.rglob("*.mp4")}
    for record in records:
        assert record["sha256"] == hashlib.sha256((small_set / record["path"]).read_bytes()).hexdigest()
        folder, split, _ = record["path"].split("/")
        assert split == record["split"]
        assert record["word"] == (None if folder == "_UNLABELED" else folder)
        times = [seconds for _, seconds in record["phonemes"]]
        assert times == sorted(times)


def test_labelled_words_are_in_the_middle_and_never_in_unlabelled_clips(small_set: Path) -> None:
    for record in read_records(small_set / "manifest.jsonl").values():
        said = record["text"].split()
        if record["word"] is None:
            assert not {word.lower() for word in WORDS[:10]} & set(said)
        else:
            assert record["word"].lower() in said
            middle = record["word_start_seconds"] + record["word_seconds"] / 2
            assert middle == pytest.approx(0.58, abs=0.25)
            assert 0.1 < record["word_seconds"] < 1.2


def test_splits_share_neither_face_nor_voice(small_set: Path) -> None:
    records = list(read_records(small_set / "manifest.jsonl").values())
    for of in (lambda r: r["face"], lambda r: r["voice"].split("+")[1], lambda r: r["speaker"]):
        sets = [{of(record) for record in records if record["split"] == split} for split in SPLITS]
        assert all(len(each) > 1 for each in sets)
        assert len(set.union(*sets)) == sum(map(len, sets))
    assert {record["voice"].split("+")[1] for record in records} <= voice_variants()


def test_contact_sheet_shows_the_clips(small_set: Path, tmp_path: Path) -> None:
    import cv2

    write_contact_sheet(small_set, tmp_path / "sheet.png", clips=3, frames=5, faces=1)
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet.shape == (3 * (96 + 14), 6 * 96, 3)
    assert all(row.std() > 10 for row in sheet.reshape(3, -1))
    with pytest.raises(ValueError, match=r"root must hold \.mp4 files"):
        write_contact_sheet(tmp_path, tmp_path / "sheet.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clips": 0}, "clips must be from 1 to 10000, got 0"),
        ({"frames": 30}, "frames must be from 1 to 29, got 30"),
        ({"faces": -1}, "faces must be from 0 to 29, got -1"),
        ({"faces": 30}, "faces must be from 0 to 29, got 30"),
    ],
    ids=str,
)
def test_what_a_contact_sheet_cannot_have_is_refused_by_name(
    tmp_path: Path, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_contact_sheet(tmp_path, tmp_path / "sheet.png", **arguments)
