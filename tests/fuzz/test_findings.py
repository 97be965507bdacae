"""Hostile files that once were believed, or refused in words of the insides."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hand_edited import change_json, read_plain
from packed_sets import write_packed
from safetensors.torch import save

from avppc import EncoderConfig, VideoEncoder
from avppc.config import EvaluateConfig, PretrainConfig, SynthConfig
from avppc.data.manifest import read_list, read_manifest
from avppc.data.packed.dataset import PackedDataset
from avppc.data.packed.index import SHARD_FOLDER, PackedIndex
from avppc.data.prepare.index import read_known
from avppc.evaluate.lipreading.classifier import read_trajectory
from avppc.evaluate.lipreading.results import RowResult, read_row, read_rows, write_row
from avppc.evaluate.record import Metrics, read_record
from avppc.files import read_json, sha256_of, write_json
from avppc.models.encoder_file import load_encoder
from avppc.settings import config_from_dict, config_to_dict
from avppc.synth.dataset import execute
from avppc.train.checkpoint import CheckpointStore, read_checkpoint
from avppc.train.log import read_metrics

DEEP = b"[" * 50_000
LONG = b"9" * 5_000


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A gigabyte of address space beyond what there is."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("content", [DEEP, LONG, b"\xff", b"\xef\xbb\xbf{"], ids=["deep", "long", "bytes", "cut"])
def test_no_json_gets_around_the_files_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"value\.json is not valid JSON") as caught:
        read_json(path)
    assert type(caught.value) is ValueError
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(b'{"path": "a.mp4"}\n' + content)
    with pytest.raises(ValueError, match=r"manifest\.jsonl, line 2: "):
        read_manifest(manifest)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + content)
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_shard_with_a_deep_header_is_no_packed_shard(tmp_path: Path) -> None:
    folder = write_packed(tmp_path / "set", clips=2, per_shard=2)
    index = read_plain(folder / "index.json")
    content = len(DEEP).to_bytes(8, "little") + DEEP
    (folder / SHARD_FOLDER / index["splits"]["train"][0]["file"]).write_bytes(content)
    index["splits"]["train"][0]["bytes"] = len(content)
    write_json(folder / "index.json", index)
    with pytest.raises(ValueError, match=r"\.safetensors is not a packed shard: its header is not JSON"):
        PackedDataset(folder, verify=False)
    (folder / "index.json").write_bytes(LONG)
    with pytest.raises(ValueError, match=r"index\.json is not valid JSON"):
        PackedIndex.read(folder)


def test_paths_that_no_file_can_have_are_told_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_text('\n{"path": "\\ud800.mp4"}')
    with pytest.raises(ValueError, match=r"manifest\.jsonl, line 2: path must be valid UTF-8"):
        read_manifest(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read as a list of videos"):
        read_list(path)


def encoder_file(path: Path, config: Any, tensors: dict[str, torch.Tensor]) -> Path:
    header = json.dumps({"format": "avppc-encoder", "version": 1, "config": config})
    path.write_bytes(save(tensors, {"avppc": header}))
    return path


@pytest.mark.parametrize("features", [8, 65_536])
def test_an_encoders_configuration_takes_no_memory(features: int, tmp_path: Path, little_memory: None) -> None:
    """ResNet-34 of width 512 has 5 GiB of weights."""
    config = {"backbone": "resnet34", "width": 512, "features": features}
    path = encoder_file(tmp_path / "encoder.safetensors", config, {"project.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"encoder\.safetensors: the weights do not fit its configuration: missing"):
        load_encoder(path)


def test_an_encoder_that_there_is_not_is_refused_by_its_file(tmp_path: Path) -> None:
    path = encoder_file(tmp_path / "encoder.safetensors", {"crop_pixels": 16, "input_pixels": 8}, {})
    with pytest.raises(ValueError, match=r"encoder\.safetensors: there is no such encoder: input_pixels must be"):
        load_encoder(path)


def test_an_encoders_weights_keep_their_kind(tmp_path: Path) -> None:
    config = EncoderConfig(width=4, crop_pixels=16, input_pixels=16, features=8)
    weights = {name: value.double().contiguous() for name, value in VideoEncoder(config).state_dict().items()}
    path = encoder_file(tmp_path / "encoder.safetensors", config_to_dict(config), weights)
    with pytest.raises(ValueError, match=r"must be torch\.\w+ \[.*\], got torch.float64"):
        load_encoder(path)


@pytest.mark.parametrize("shape", ["(29, 99999999999)", "(99999999999999999999999, 8)", "(29, 8"])
def test_a_trajectorys_shape_takes_no_memory(shape: str, tmp_path: Path, little_memory: None) -> None:
    np.save(tmp_path / "a.npy", np.zeros((29, 8), np.float32))
    content = (tmp_path / "a.npy").read_bytes()
    header = content[10:128].replace(b"(29, 8)", shape.encode())
    (tmp_path / "a.npy").write_bytes(content[:10] + header[:117] + b"\n" + content[128:])
    with pytest.raises(ValueError, match=r"a\.npy is not a trajectory"):
        read_trajectory(tmp_path / "a.mp4")


@pytest.mark.parametrize("depth", [3000, 9000])  # RecursionError and MemoryError of Python's parser
def test_a_trajectorys_header_may_be_nested_deep(depth: int, tmp_path: Path) -> None:
    header = f"{{'descr': {'-' * depth}1, 'fortran_order': False, 'shape': (29, 8)}}\n".encode()
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ValueError, match=r"a\.npy is not a trajectory: \w+"):
        read_trajectory(tmp_path / "a.mp4")


def test_a_checkpoints_tensors_are_refused_by_their_file(tmp_path: Path) -> None:
    directory = CheckpointStore(tmp_path, 1).save(1, {"model": {"weight": torch.ones(3)}}, {"loader": {}})
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    progress = read_plain(directory / "progress.json")
    write_json(directory / "progress.json", {**progress, "files": {file.name: sha256_of(file)}})
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        read_checkpoint(directory).tensors("model")
    for name in ("..", "../model.safetensors", "no\0.safetensors", "\ud800.safetensors"):
        write_json(directory / "progress.json", {**progress, "files": {name: "0" * 64}})
        with pytest.raises(ValueError, match=r"progress\.json names a file that is none: '"):
            read_checkpoint(directory)


def test_facts_that_index_cannot_have_written_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    kept = {"path": "a.mp4", "speaker": 3}
    for facts in ({"problems": 5}, {"notes": [1]}, {"fps": "25"}, {"video_codec": "h264"}, {"streams": []}):
        path.write_text(json.dumps(kept | facts))
        assert read_known(path) == {"a.mp4": {"speaker": 3}}
    path.write_text(json.dumps(kept | {"problems": ["short"], "fps": 25}))
    assert read_known(path) == {"a.mp4": kept | {"problems": ["short"], "fps": 25}}


def test_overwriting_a_synthetic_set_deletes_no_folder_that_a_file_names(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("espeakng_loader")
    (tmp_path / "thesis").mkdir()
    out = tmp_path / "set"
    write_json(out / "synth.json", {"format": "avppc talking mouths", "folders": ["..", "../thesis"], "config": []})
    config = SynthConfig(out, words=1, clips_per_word=1, val_clips_per_word=0, test_clips_per_word=0, overwrite=True)
    assert execute(config) == 0
    assert (tmp_path / "thesis").is_dir()


def test_a_configurations_file_is_named_whatever_its_value(tmp_path: Path) -> None:
    content = config_to_dict(PretrainConfig(Path("data"), Path("out")))
    optimizer = {**content["optimizer"], "learning_rate": -1}
    with pytest.raises(ValueError, match=r"config\.json: optimizer: learning_rate must be at least 0"):
        config_from_dict(PretrainConfig, {**content, "optimizer": optimizer}, "config.json")
    with pytest.raises(ValueError, match=r"config\.json: encoder: expected an object"):
        config_from_dict(PretrainConfig, {**content, "encoder": 3}, "config.json")
    known = EvaluateConfig(Path("run"), data=Path("packed"))
    assert config_from_dict(EvaluateConfig, config_to_dict(known), "file") == known


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("chosen", value) for value in ({}, {"head": 3})),
        *(("trials", value) for value in ([1], [{"head": "gru"}], [{"val_wcr": 0.5}])),
        *(("draws", value) for value in ([], [{}], [3], [{"seed": 0, "val_wcr": 0.5, "test_wcr": 1.5}])),
        *(("words", value) for value in ([], [1, 2], ["A"] * 9)),
        *(("confusion", value) for value in ([], "AB", [[1]], [[1, 2], [3]], [[1, 2], [3, "4"]], [[-1, 0], [0, 1]])),
        ("wcr", 5.0),
        ("row", "thawed"),
    ],
)
def test_a_row_that_no_page_could_show_is_refused_by_its_file(name: str, value: object, tmp_path: Path) -> None:
    trial, draw = {"head": "gru", "val_wcr": 0.5}, {"seed": 0, "val_wcr": 0.5, "test_wcr": 0.5}
    settings: dict[str, Any] = {"task": "av-permutative", "encoder_sha256": "0" * 64}
    counts = [[1, 0], [0, 1]]
    row = RowResult("frozen", 10, 0.5, 0.1, 0.5, trial, [trial], [draw], ["A", "B"], 2, counts, 1.0, settings)
    write_row(tmp_path, row)
    assert read_rows(tmp_path) == [row]
    path = tmp_path / "evaluation" / "frozen-10.json"
    change_json(path, **{name: value})
    with pytest.raises(ValueError, match=rf"frozen-10\.json: .*{name}"):
        read_rows(tmp_path)
    with pytest.raises(ValueError, match=rf"frozen-10\.json: .*{name}"):
        read_row(tmp_path, "frozen", 10, settings)


def test_numbers_that_no_float_holds_are_no_figures(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1{"0" * 400}}}\n{{"step": 9, "loss": 1{"0" * 400}}}\n')
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [9]
    assert np.isnan(Metrics(tmp_path, rows, {}).column("loss")).all()


def test_names_of_metrics_must_be_names(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", config_to_dict(PretrainConfig(Path("data"), Path("out"))))
    write_json(tmp_path / "task.json", {"task_accuracy": 3})
    with pytest.raises(ValueError, match=r"task\.json: task_accuracy must hold names, got 3"):
        read_record(tmp_path)


def test_a_row_of_wrong_kinds_is_refused_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "frozen-10.json").write_text('{"row": "frozen", "labels_per_word": "10"}')
    with pytest.raises(ValueError, match=r"frozen-10\.json: "):
        read_rows(tmp_path)
