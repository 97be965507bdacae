"""Any arguments for encoders, their files and the tasks: a right result or a refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import REFUSED, anything, call, examples, near
from hypothesis import given
from hypothesis import strategies as st

from avppc import EncoderConfig, VideoEncoder, load_encoder, load_reader
from avppc.config import PretrainConfig
from avppc.losses.subtasks import SUBTASKS, choose_subtasks
from avppc.models.encoder_file import save_encoder
from avppc.tasks.registry import TASKS, make_task

CONFIG = EncoderConfig(width=4, crop_pixels=16, input_pixels=16, features=8)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(VideoEncoder(CONFIG), path)
    return path


@examples(150)
@given(st.data())
def test_one_strange_argument_of_an_encoder_is_refused_by_name(data: st.DataObject) -> None:
    encoder = VideoEncoder(CONFIG).eval()
    arguments: dict[str, Any] = {"video": torch.rand(2, 3, 16, 16), "frame_stride": 2, "frame_phase": 1}
    name = data.draw(st.sampled_from(sorted(arguments)))
    arguments[name] = data.draw(near(arguments[name]))
    features = call(encoder, arguments)
    if features is not REFUSED:
        assert features.shape[::2] == (len(arguments["video"]), 8)
        assert features.isfinite().all()


@examples(60)
@given(value=anything())
def test_strange_paths_and_configurations_are_refused_by_name(value: Any, file: Path) -> None:
    call(VideoEncoder, {"config": value})
    call(load_encoder, {"path": value})
    call(load_reader, {"path": value})
    assert call(load_encoder, {"path": file}).config == CONFIG


@examples(60)
@given(value=anything(), name=st.sampled_from(sorted(TASKS)))
def test_strange_tasks_are_refused_by_name(value: Any, name: str) -> None:
    config = PretrainConfig(Path("data"), Path("out"), encoder=CONFIG)
    assert call(make_task, {"name": value, "config": config}, names=["task"]) is REFUSED
    assert call(make_task, {"name": name, "config": value}) is REFUSED


WORDS = st.sampled_from([*(task.name for task in SUBTASKS[:20:5]), "Vp", "1to1", "between", "x", "", " "])


@examples(100)
@given(chosen=st.lists(WORDS, max_size=5).map(",".join) | anything(), excluded=st.just("") | anything())
def test_strange_subtasks_are_refused_by_name(chosen: Any, excluded: Any) -> None:
    arguments = {"chosen": chosen, "excluded": excluded}
    found = call(lambda **given: choose_subtasks(SUBTASKS, **given), arguments, names=["subtasks", "exclude"])
    if found is not REFUSED:
        assert set(found) <= set(SUBTASKS)
        assert found
