"""Every reader of files from elsewhere, as a function of one file's content: it reads, or refuses as it promises to."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import mutate
import numpy as np
import torch
from hand_edited import change_json
from packed_sets import write_packed

from avppc.config import EncoderConfig, PretrainConfig
from avppc.data.config import CropSettings, IndexConfig
from avppc.data.manifest import read_list
from avppc.data.packed.dataset import PackedDataset
from avppc.data.packed.index import INDEX_NAME, SHARD_FOLDER, PackedIndex
from avppc.data.prepare.index import read_known
from avppc.data.scan import scan
from avppc.data.sentences import find_sentences
from avppc.evaluate.lipreading.classifier import read_trajectory
from avppc.evaluate.lipreading.heads import ReaderInfo, load_reader, save_reader
from avppc.evaluate.lipreading.results import RowResult, read_rows, write_row
from avppc.files import sha256_of, write_json
from avppc.models.encoder_file import load_encoder, save_encoder
from avppc.models.encoders import VideoEncoder
from avppc.settings import config_to_dict
from avppc.synth.dataset import read_records
from avppc.train.checkpoint import CheckpointStore, read_checkpoint
from avppc.train.log import read_metrics
from avppc.train.run_folder import read_run_config

MOST_MIB = 512
"""What reading one small file may take."""


@dataclass(frozen=True)
class Reader:
    """One kind of file."""

    whole: bytes
    """Its content where nothing is wrong."""
    mutate: Callable[[bytes, random.Random], bytes]
    """Damages it."""
    read: Callable[[bytes], object]
    """Reads a content; raises ValueError where it refuses it."""


def make_readers(folder: Path) -> dict[str, Reader]:
    """All readers, each with a place of its own in the folder."""
    return {
        **_packed_readers(folder),
        **_manifest_readers(folder),
        **_word_readers(folder),
        **_run_readers(folder / "run"),
        **_checkpoint_readers(folder / "checkpoints"),
        "encoder": _encoder_reader(folder / "encoder.safetensors"),
        "lip reader": _lip_reader(folder / "reader.safetensors"),
        "trajectory": _trajectory_reader(folder / "trajectory.mp4"),
    }


def _file_reader(path: Path, mutator: Callable[[bytes, random.Random], bytes], read: Callable[[], object]) -> Reader:
    """Of a file that is there whole already. One of JSON has no checksum, which would stop all that is changed."""
    if path.suffix == ".json":
        change_json(path)

    def read_content(content: bytes) -> object:
        path.write_bytes(content)
        return read()

    return Reader(path.read_bytes(), mutator, read_content)


def _read_all(folder: Path) -> None:
    with PackedDataset(folder, verify=False) as dataset:
        dataset.batch(torch.arange(len(dataset)))


def _packed_readers(folder: Path) -> dict[str, Reader]:
    for name in ("index", "shard"):
        write_packed(folder / name, clips=4, per_shard=2)
    index = PackedIndex.read(folder / "shard")
    shard = folder / "shard" / SHARD_FOLDER / index.splits["train"][0].file

    def read_shard(content: bytes) -> None:
        """The index says what size the shard has: nothing else stands between the reader and its header."""
        shard.write_bytes(content)
        first, *others = index.splits["train"]
        replace(index, splits={"train": (replace(first, bytes=len(content)), *others)}).write(folder / "shard")
        _read_all(folder / "shard")

    return {
        "index": _file_reader(folder / "index" / INDEX_NAME, mutate.mutate_json, lambda: _read_all(folder / "index")),
        "shard": Reader(shard.read_bytes(), mutate.mutate_safetensors, read_shard),
    }


def _manifest_readers(folder: Path) -> dict[str, Reader]:
    root = folder / "videos"
    (root / "a").mkdir(parents=True)
    (root / "a" / "b.mp4").write_bytes(b"none")
    facts = {
        "bytes": 4,
        "mtime_ns": 1,
        "clip_frames": 29,
        "duration_seconds": 2.5,
        "fps": 25.0,
        "width": 9,
        "height": 9,
    }
    lines = [
        {"path": "a/b.mp4", "speaker": 3, "box": [9, 8, 105, 104], "video_codec": "h264", "problems": [], **facts},
        {"path": "c/d.mp4", "face": "somebody", "problems": ["none"], "notes": ["some"]},
    ]
    manifest, listed, records = root / "manifest.jsonl", folder / "list.txt", folder / "records.jsonl"
    manifest.write_bytes(b"\n".join(map(mutate.dump, lines)))
    listed.write_text("a/b.mp4\nc/d.mp4\n")
    records.write_bytes(b"\n".join(mutate.dump({"path": f"a/{n}.mp4", "sha256": "0" * 64, "word": "A"}) for n in "ab"))
    return {
        "manifest": _file_reader(manifest, mutate.mutate_lines, lambda: (scan(root), read_known(manifest))),
        "list": _file_reader(listed, mutate.mutate_lines, lambda: (read_list(listed), scan(root, listed))),
        "records": _file_reader(records, mutate.mutate_lines, lambda: read_records(records)),
    }


_TABLE = "clip,start_frame,end_frame,word,split\na/b,1,2.5,one,train\nb.mp4,3,4,sil,train\nb,4,5,two,train\n"
_TEXT_GRID = """File type = "ooTextFile"
Object class = "TextGrid"
xmin = 0
xmax = 2
tiers? <exists>
size = 1
item [1]:
    class = "IntervalTier"
    name = "words"
    xmin = 0
    xmax = 2
    intervals: size = 1
    intervals [1]:
        xmin = 0.5
        xmax = 1.5
        text = "one"
"""


def _word_readers(folder: Path) -> dict[str, Reader]:
    """Of the words inside a video, also of which video they are."""
    root = folder / "sentences"
    root.mkdir()
    (root / "b.mp4").write_bytes(b"none")
    found, readers = scan(root), {}
    for name, content in (("b.csv", _TABLE), ("b.align", "0 1000 one\n2000 3500 two\n"), ("b.TextGrid", _TEXT_GRID)):
        path = folder / name
        path.write_text(content)
        config = IndexConfig(root, words=path, val_share=0.0, test_share=0.0)
        read = partial(find_sentences, found, config)
        readers[path.suffix[1:]] = _file_reader(path, mutate.mutate_bytes, read)
    return readers


def _run_readers(run: Path) -> dict[str, Reader]:
    config = PretrainConfig(Path("data"), Path("out"))
    write_json(run / "config.json", config_to_dict(config))
    (run / "metrics.jsonl").write_bytes(
        b"\n".join(mutate.dump({"step": n, "loss": 1.5, "task_loss": [1.0]}) for n in (1, 2))
    )
    trial, draw = {"head": "gru", "rate": 0.1, "val_wcr": 0.5}, {"seed": 0, "val_wcr": 0.5, "test_wcr": 0.5}
    settings, counts = {"task": "av-permutative", "encoder_sha256": "0" * 64}, [[1, 0], [0, 1]]
    row = RowResult("frozen", 10, 0.5, 0.1, 0.05, trial, [trial], [draw], ["A", "B"], 2, counts, 1.0, settings)
    write_row(run, row)
    return {
        "config": _file_reader(run / "config.json", mutate.mutate_json, lambda: read_run_config(run)),
        "metrics": _file_reader(run / "metrics.jsonl", mutate.mutate_lines, lambda: read_metrics(run)),
        "row": _file_reader(run / "evaluation" / "frozen-10.json", mutate.mutate_json, lambda: read_rows(run)),
    }


def _checkpoint_readers(folder: Path) -> dict[str, Reader]:
    tensors = {"model": {"weight": torch.ones(2, 3), "count": torch.tensor(3)}}
    progress, weights = (CheckpointStore(folder / name, 1).save(1, tensors, {"epoch": 0}) for name in ("a", "b"))

    def read(directory: Path) -> None:
        read_checkpoint(directory).tensors("model")

    def read_weights(content: bytes) -> None:
        """The checksum is that of the file: whoever writes one can write the other."""
        file = weights / "model.safetensors"
        file.write_bytes(content)
        change_json(weights / "progress.json", files={file.name: sha256_of(file)})
        read(weights)

    return {
        "progress": _file_reader(progress / "progress.json", mutate.mutate_json, lambda: read(progress)),
        "weights": Reader((weights / "model.safetensors").read_bytes(), mutate.mutate_safetensors, read_weights),
    }


def _encoder_reader(path: Path) -> Reader:
    config = EncoderConfig(width=4, crop_pixels=16, input_pixels=16, features=8)
    save_encoder(VideoEncoder(config), path)
    return _file_reader(path, mutate.mutate_safetensors, lambda: load_encoder(path))


def _lip_reader(path: Path) -> Reader:
    encoder = EncoderConfig(width=4, crop_pixels=16, input_pixels=16, features=8)
    settings = {"task": "av-permutative", "encoder_sha256": "0" * 64}
    info = ReaderInfo(encoder, ("A", "B"), 29, "gru", 8, 1, "frozen", 10, 0, 0.5, 0.5, CropSettings(), settings)
    save_reader(info, {}, path)
    return _file_reader(path, mutate.mutate_safetensors, lambda: load_reader(path))


def _trajectory_reader(video: Path) -> Reader:
    path = video.with_suffix(".npy")
    np.save(path, np.zeros((29, 8), np.float32))
    return _file_reader(path, mutate.mutate_bytes, lambda: read_trajectory(video))
