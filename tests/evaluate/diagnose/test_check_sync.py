from __future__ import annotations

import json

import numpy as np
import pytest

from avppc.cli import main
from avppc.data.packed.dataset import PackedDataset
from avppc.data.packed.index import SHARD_FOLDER, PackedIndex
from avppc.data.packed.shard import ClipShape, ShardWriter
from avppc.evaluate.diagnose.check_sync import estimate_offset

SHAPE = ClipShape(29, 24, 24)


def opening(rng: np.random.Generator, frames: int) -> np.ndarray:
    """A mouth that opens and closes a few times a second, 0 to 1."""
    wave = np.convolve(rng.normal(size=frames + 8), np.hanning(7), "same")[4:-4]
    return (wave - wave.min()) / (np.ptp(wave) + 1e-9)


def write_talking(directory, shifts: list[int], *, inverted: bool = False, related: bool = True, videos_of: int = 1):
    """One clip a shift: sound that is late by so many frames; the mouth is a dark (or bright) ellipse that opens."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:24, :24]
    writer = ShardWriter(SHAPE, len(shifts))
    for number, shift in enumerate(shifts):
        mouth = opening(rng, 29 + 40)
        face = rng.normal(150, 20, (24, 24))
        seen = mouth[20 : 20 + 29]
        heights = 1 + 6 * seen[:, None, None]
        inside = ((columns - 12) / 7) ** 2 + ((rows - 14) / heights) ** 2 < 1
        video = np.where(inside, 230 if inverted else 40, face) + rng.normal(0, 4, (29, 24, 24))
        heard = mouth[20 - shift : 49 - shift] if related else opening(rng, 29)
        audio = rng.normal(0, 1, SHAPE.samples) * np.repeat(30 + 3000 * heard**2, 640)
        source = f"talk #{number // videos_of}.mp4" + (f"#{29 * (number % videos_of)}" if number % videos_of else "")
        writer.add(
            source,
            video=video.clip(0, 255).astype(np.uint8),
            audio=audio.clip(-32768, 32767).astype(np.int16),
            label=-1,
            clip_id=number,
            speaker=-1,
        )
    (directory / SHARD_FOLDER).mkdir(parents=True)
    record = writer.write(directory / SHARD_FOLDER / "train-00000.safetensors")
    PackedIndex(SHAPE, (), {"train": (record,)}).write(directory)
    return directory


@pytest.mark.parametrize("inverted", [False, True], ids=["dark", "bright"])
@pytest.mark.parametrize("shift", [-5, -1, 0, 3, 6])
def test_known_shifts_are_found(tmp_path, shift, inverted):
    dataset = PackedDataset(write_talking(tmp_path / "set", [shift] * 120, inverted=inverted))
    found = estimate_offset(dataset, 1000, 8)
    assert found.is_clear
    assert found.offset_frames == pytest.approx(shift, abs=0.4)
    assert found.offset_ms == pytest.approx(40 * shift, abs=16)
    assert np.median(found.video_offsets) == shift
    assert (found.video_offsets == shift).mean() > 0.6


def test_two_kinds_of_videos_show_in_the_histogram(tmp_path):
    dataset = PackedDataset(write_talking(tmp_path / "set", [0] * 120 + [5] * 60))
    found = estimate_offset(dataset, 1000, 8)
    counts = {lag: int((found.video_offsets == lag).sum()) for lag in found.lags.tolist()}
    assert sorted(counts, key=lambda lag: -counts[lag])[:2] == [0, 5]
    assert found.offset_frames == pytest.approx(0, abs=0.5)


def test_clips_of_one_video_are_judged_together(tmp_path):
    dataset = PackedDataset(write_talking(tmp_path / "set", [2] * 120, videos_of=4))
    found = estimate_offset(dataset, 1000, 8)
    assert len(found.video_offsets) == 30
    assert (found.video_offsets == 2).all()


def test_unrelated_sound_is_told(tmp_path):
    found = estimate_offset(PackedDataset(write_talking(tmp_path / "set", [0] * 150, related=False)), 1000, 8)
    assert not found.is_clear


def test_a_shift_beyond_the_range_is_not_taken_for_one_inside(tmp_path):
    found = estimate_offset(PackedDataset(write_talking(tmp_path / "set", [9] * 150)), 1000, 4)
    assert not found.is_clear


class TestCommand:
    @pytest.mark.parametrize(("shift", "code", "verdict"), [(1, 0, "in sync"), (-4, 3, "shifted")])
    def test_verdict(self, tmp_path, capsys, shift, code, verdict):
        data = write_talking(tmp_path / "set", [shift] * 100)
        assert main(["check-sync", "--data", str(data), "--out", str(tmp_path / "out")]) == code
        printed = capsys.readouterr().out
        assert verdict in printed
        assert ("early" if shift < 0 else "late") in printed
        numbers = json.loads((tmp_path / "out" / "sync.json").read_text())
        assert numbers["verdict"] == verdict
        assert numbers["offset_frames"] == pytest.approx(shift, abs=0.4)
        assert sum(numbers["videos_with_offset"].values()) == 100
        assert (tmp_path / "out" / "histogram.png").read_bytes().startswith(b"\x89PNG")

    def test_nothing_to_tell(self, tmp_path, capsys):
        data = write_talking(tmp_path / "set", [0] * 150, related=False)
        assert main(["check-sync", "--data", str(data), "--out", str(tmp_path / "out")]) == 1
        assert "cannot be told" in capsys.readouterr().out

    def test_bad_arguments(self, tmp_path, capsys):
        data = write_talking(tmp_path / "set", [0] * 4)
        assert main(["check-sync", "--data", str(data), "--max-offset-frames", "13"]) == 2
        assert "max_offset_frames must be at most 12 for clips of 29 frames, got 13" in capsys.readouterr().err
        one = write_talking(tmp_path / "one", [0] * 4, videos_of=4)
        assert main(["check-sync", "--data", str(one)]) == 2
        assert "there is only one" in capsys.readouterr().err
