"""`avppc embed`: every clip's features beside what is known of it; damage costs the clips it hit and no more."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from packed_sets import write_packed
from tiny_runs import SPLITS, WORDS, write_tiny_set

from avppc import EncoderConfig, VideoEncoder, load_encoder
from avppc.cli import main
from avppc.config import EmbedConfig
from avppc.data.augment import crop_video
from avppc.data.packed.dataset import PackedDataset
from avppc.data.packed.index import SHARD_FOLDER, PackedIndex
from avppc.export import embed as embed_module
from avppc.export.embed import embed, skipped_list
from avppc.files import sha256_of
from avppc.models.encoder_file import save_encoder

CLIPS = sum(SPLITS.values())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("embed") / "data")


@pytest.fixture(scope="module")
def encoder(data: Path) -> Path:
    torch.manual_seed(0)
    path = data.parent / "encoder.safetensors"
    save_encoder(VideoEncoder(EncoderConfig(width=4, features=16)), path)
    return path


def read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def features_of(encoder: Path, data: Path, split: str) -> np.ndarray:
    """[n, T, D] by the public functions alone."""
    model = load_encoder(encoder)
    with PackedDataset(data, split) as dataset, torch.inference_mode():
        video = dataset.batch(torch.arange(len(dataset))).video
        return model(crop_video(video, model.config.crop_pixels, model.config.input_pixels)).numpy()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_npz_has_every_clip_in_order(batch_size: int, data: Path, encoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "clips.npz"
    assert embed(EmbedConfig(data, encoder, out, batch_size=batch_size)) == (CLIPS, [])
    found = read_npz(out)
    expected = np.concatenate([features_of(encoder, data, split).mean(1) for split in SPLITS])
    np.testing.assert_allclose(found["embeddings"], expected, rtol=0, atol=1e-5)
    assert found["embeddings"].dtype == np.float32
    datasets = [PackedDataset(data, split) for split in SPLITS]
    assert found["sources"].tolist() == [source for dataset in datasets for source in dataset.sources]
    assert found["ids"].tolist() == [number for dataset in datasets for number in dataset.clip_ids.tolist()]
    assert found["words"].tolist() == [source.split("/")[0] for source in found["sources"].tolist()]
    assert [WORDS[label] for label in found["labels"]] == found["words"].tolist()
    assert found["splits"].tolist() == [split for split, clips in SPLITS.items() for _ in range(clips)]
    assert found["speakers"].tolist() == [place for place, clips in enumerate(SPLITS.values()) for _ in range(clips)]
    assert json.loads(str(found["about"]))["encoder_sha256"] == sha256_of(encoder)
    assert [path.name for path in out.parent.iterdir()] == ["clips.npz"]


@pytest.mark.parametrize("per", ["clip", "frame"])
def test_parquet_holds_what_npz_holds(per: Any, data: Path, encoder: Path, tmp_path: Path) -> None:
    for name in ("a.npz", "a.parquet"):
        embed(EmbedConfig(data, encoder, tmp_path / name, splits=("val", "test"), per=per, batch_size=4))
    arrays, table = read_npz(tmp_path / "a.npz"), parquet.read_table(tmp_path / "a.parquet")
    clips, frames = SPLITS["val"] + SPLITS["test"], 29 if per == "frame" else 1
    assert arrays["embeddings"].shape == ((clips, 29, 16) if per == "frame" else (clips, 16))
    rows = table.to_pylist()
    assert len(rows) == clips * frames
    np.testing.assert_array_equal([row["embedding"] for row in rows], arrays["embeddings"].reshape(-1, 16))
    for column, name in (("id", "ids"), ("source", "sources"), ("split", "splits"), ("word", "words")):
        assert [row[column] for row in rows] == np.repeat(arrays[name], frames).tolist()
    if per == "frame":
        assert [row["frame"] for row in rows] == list(range(29)) * clips
    assert json.loads(table.schema.metadata[b"avppc"]) == json.loads(str(arrays["about"]))


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    """Clip n of this set has label n % 4 - 1, and one in four has none; its clips have 3 frames of 8 x 12 pixels."""
    data = write_packed(tmp_path / "data")
    config = EncoderConfig("resnet10", 8, "small", channels="luma", crop_pixels=8, input_pixels=8, features=8)
    save_encoder(VideoEncoder(config), tmp_path / "encoder.safetensors")
    for name in ("a.npz", "a.parquet"):
        embed(EmbedConfig(data, tmp_path / "encoder.safetensors", tmp_path / name))
    arrays, rows = read_npz(tmp_path / "a.npz"), parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert arrays["words"].tolist()[:5] == ["", "WORD0", "WORD1", "WORD2", ""]
    assert arrays["labels"].tolist()[:5] == [-1, 0, 1, 2, -1]
    assert [row["word"] for row in rows[:5]] == [None, "WORD0", "WORD1", "WORD2", None]
    assert [row["label"] for row in rows[:5]] == [None, 0, 1, 2, None]
    assert [row["speaker"] for row in rows[:5]] == [0, 1, 2, 3, 0]


def test_the_data_may_lie_elsewhere(data: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVPPC_CACHE", str(tmp_path / "cache"))
    embed(EmbedConfig(Path(f"file://{data}"), encoder, tmp_path / "a.npz", splits=("val",)))
    embed(EmbedConfig(data, encoder, tmp_path / "b.npz", splits=("val",)))
    a, b = (read_npz(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert a["embeddings"].shape == (SPLITS["val"], 16)
    assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "missing"])
def test_a_damaged_shard_costs_its_own_clips_alone(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_packed(tmp_path / "data", clips=23, per_shard=5)
    config = EncoderConfig("resnet10", 8, "small", channels="luma", crop_pixels=8, input_pixels=8, features=8)
    save_encoder(VideoEncoder(config), tmp_path / "encoder.safetensors")
    shard = data / SHARD_FOLDER / "train-00002.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "flipped byte":
        content[-100] ^= 1
        shard.write_bytes(content)
    elif damage == "truncated":
        shard.write_bytes(content[:-100])
    else:
        shard.unlink()
    out = tmp_path / "a.npz"
    flags = ["embed", str(data), "--encoder", str(tmp_path / "encoder.safetensors"), "--out", str(out)]
    assert main(flags) == 0
    assert read_npz(out)["ids"].tolist() == [1000 + n for n in range(23) if not 10 <= n < 15]
    listed = [json.loads(line) for line in skipped_list(out).read_text().splitlines()]
    assert [clip["source"] for clip in listed] == [f"W{n}.mp4" for n in range(10, 15)]
    assert all("train-00002.safetensors" in clip["reason"] and clip["split"] == "train" for clip in listed)
    error = capsys.readouterr().err
    assert "skipped 5 clips: " in error
    assert "features of 18 clips written" in error
    # The list is of the last run: it goes with the damage.
    write_packed(data, clips=23, per_shard=5)
    assert main(flags) == 0
    assert not skipped_list(out).exists()


def test_clips_without_finite_features_are_skipped(
    data: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crop_with_damage(video: torch.Tensor, crop: int, side: int) -> torch.Tensor:
        crops = crop_video(video, crop, side)
        crops[2:3] = float("nan")
        return crops

    monkeypatch.setattr(embed_module, "crop_video", crop_with_damage)
    clips, skipped = embed(EmbedConfig(data, encoder, tmp_path / "a.npz", splits=("test",), batch_size=4))
    names = PackedDataset(data, "test").sources
    assert clips == 7
    assert [(clip.source, clip.reason) for clip in skipped] == [
        (names[row], "its features are not finite") for row in (2, 6)
    ]


def test_no_clip_at_all_is_an_error_and_keeps_the_old_file(tmp_path: Path, encoder: Path) -> None:
    data = write_tiny_set(tmp_path / "data")
    out = tmp_path / "a.npz"
    out.write_text("old")
    for shard in (data / SHARD_FOLDER).iterdir():
        shard.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"no clip of .* could be embedded; the reasons are in .*a\.npz\.skipped\.jsonl"
    ):
        embed(EmbedConfig(data, encoder, out))
    assert out.read_text() == "old"
    assert len(skipped_list(out).read_text().splitlines()) == CLIPS


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_failure_on_the_way_leaves_the_old_file_and_nothing_else(
    suffix: str, data: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / f"a{suffix}"
    out.write_text("old")
    calls = []

    def fail_later(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return crop_video(*arguments)

    monkeypatch.setattr(embed_module, "crop_video", fail_later)
    with pytest.raises(KeyboardInterrupt):
        embed(EmbedConfig(data, encoder, out, batch_size=4))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_text() == "old"


def test_an_encoder_that_sees_more_than_the_clips_have_is_refused(tmp_path: Path, encoder: Path) -> None:
    with pytest.raises(ValueError, match=r"the encoder sees 64 x 64 pixels, but the clips of .* have 8 a side"):
        embed(EmbedConfig(write_packed(tmp_path / "data"), encoder, tmp_path / "a.npz"))


def test_missing_splits_encoders_and_packages_are_named(
    data: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = PackedIndex.read(data)
    (tmp_path / "some").mkdir()
    PackedIndex(index.shape, index.words, {"train": index.splits["train"]}).write(tmp_path / "some")
    with pytest.raises(ValueError, match=r"split 'test' of .* has no clips; available: 'train'"):
        embed(EmbedConfig(tmp_path / "some", encoder, tmp_path / "a.npz", splits=("test",)))
    with pytest.raises(FileNotFoundError, match="no encoder at"):
        embed(EmbedConfig(data, tmp_path, tmp_path / "a.npz"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"needs pyarrow .*: pip install 'avppc\[parquet\]', or write a \.npz"):
        embed(EmbedConfig(data, encoder, tmp_path / "a.parquet"))
    assert not list(tmp_path.glob("a.*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        embed(EmbedConfig(data, encoder, tmp_path / "file" / "a.npz"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": Path("a.csv")}, r"out must end in \.npz or \.parquet, got 'a\.csv'"),
        ({"splits": ("dev",)}, "splits must be one of 'train', 'val', 'test'; got 'dev'"),
        ({"per": "word"}, "per must be one of 'clip', 'frame'; got 'word'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbedConfig(**{"data": Path("data"), "encoder": Path("run"), "out": Path("a.npz"), **changes})
