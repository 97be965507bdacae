"""Any value in any field of any configuration: it is understood, or refused by the field's name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hostile import REFUSED, anything, call, examples
from hypothesis import given
from hypothesis import strategies as st

import avppc.config
from avppc.settings import config_from_dict, config_to_dict

CONFIGS = [value for value in vars(avppc.config).values() if dataclasses.is_dataclass(value)]
PATHS = ("data", "encoder", "out", "run", "source", "video")


def needed(cls: Any) -> dict[str, Any]:
    """Values for the fields without a default."""
    fields = [field for field in dataclasses.fields(cls) if field.default is field.default_factory]
    suffix = ".npz" if cls is avppc.config.EmbedConfig else ".wav"
    return {field.name: Path(f"{field.name}{suffix}") for field in fields}


def values() -> st.SearchStrategy[Any]:
    """Anything, alone and several in a tuple or a list."""
    return anything() | st.lists(anything(), max_size=4).map(tuple) | st.lists(anything(), max_size=2)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
@examples(40)
@given(data=st.data())
def test_any_value_is_understood_or_refused_by_name(cls: Any, data: st.DataObject) -> None:
    fields = [field.name for field in dataclasses.fields(cls)]
    assert set(needed(cls)) <= set(PATHS)
    name = data.draw(st.sampled_from(fields))
    others = {key: value for key, value in needed(cls).items() if key != name}
    config = call(lambda **own: cls(**others, **own), {name: data.draw(values())}, names=fields)
    if config is REFUSED:
        return
    # What is accepted survives the way to a file and back.
    try:
        text = json.dumps(config_to_dict(config))
    except (TypeError, UnicodeEncodeError):  # values that no file can hold
        return
    assert config_from_dict(cls, json.loads(text), "file") == config


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, 0.5, 1e308])
    | st.floats()
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
@examples(40)
@given(data=st.data())
def test_any_value_in_a_file_is_understood_or_refused_by_the_files_name(cls: Any, data: st.DataObject) -> None:
    content = config_to_dict(cls(**needed(cls)))
    place = content
    while True:
        name = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[name], dict) or data.draw(st.booleans()):
            break
        place = place[name]
    place[name] = data.draw(JSON_VALUES)
    config = call(lambda content: config_from_dict(cls, content, "config.json"), {"content": content}, names=["config"])
    assert config is REFUSED or dataclasses.is_dataclass(config)


@examples(40)
@given(JSON_VALUES)
def test_what_is_no_configuration_at_all_is_refused(content: Any) -> None:
    assert call(lambda content: config_from_dict(avppc.config.PretrainConfig, content, "config.json"),
                {"content": content}, names=["config"]) is REFUSED  # fmt: skip
