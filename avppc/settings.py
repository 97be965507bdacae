"""Configurations and records as JSON: every field is checked on the way in.

Files that decide what is done next hold a checksum of their own content, which a flipped bit betrays.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from avppc.files import parse_json, read_bytes, write_json

T = TypeVar("T")

CHECKSUM = "checksum"
"""The member that holds the checksum; nothing else in such a file may have its name."""
_KIND = "sha256:"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values; paths become strings."""
    return typing.cast("dict[str, Any]", _plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def config_from_dict(cls: type[T], values: Any, where: str) -> T:
    """A configuration of type `cls` from JSON values.

    A field that is missing has its default or, where it came later with another one, what it was before: cls.BEFORE.

    Raises:
        ValueError: `where` (the file, say) has an unknown field, lacks one, or has a value that does not fit.
    """
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]  # any dataclass
    before: Mapping[str, Any] = getattr(cls, "BEFORE", {})
    values = {**before, **_current_names(cls, values, where)}
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, 1)
        guess = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{where}: unknown fields {unknown}{guess}; allowed are {sorted(fields)}")
    hints = typing.get_type_hints(cls)
    restored = {name: _restore(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    try:
        return cls(**restored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def overlaid(config: T, values: Any, where: str) -> T:
    """The configuration with these JSON values in place of its own; those of a group may be some of its fields.

    Raises:
        ValueError: as config_from_dict.
    """
    return config_from_dict(type(config), _overlay(type(config), config_to_dict(config), values, where), where)


def _overlay(cls: type, below: dict[str, Any], values: Any, where: str) -> dict[str, Any]:
    hints, both = typing.get_type_hints(cls), dict(below)
    for name, value in _current_names(cls, values, where).items():
        is_group = dataclasses.is_dataclass(hints.get(name))
        both[name] = _overlay(hints[name], below[name], value, f"{where}: {name}") if is_group else value
    return both


def is_whole(cls: type, values: Mapping[str, Any]) -> bool:
    """Whether JSON values are a whole configuration as `config_to_dict` gives it, perhaps one of an earlier version.

    That one lacks the fields that came later; what somebody has written by hand has few.
    """
    fields = dataclasses.fields(cls)
    return 4 * sum(field.name in values for field in fields) >= 3 * len(fields)


def _current_names(cls: type, values: Any, where: str) -> dict[str, Any]:
    """The values by their fields' names of today; ValueError where there are two of a field, or it is no object."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object with the fields of {cls.__name__}, got {type(values).__name__}")
    renamed = {current_name(cls, name): value for name, value in values.items()}
    if len(renamed) < len(values):
        raise ValueError(f"{where}: a field is given twice, by its name and a former one: {sorted(values)}")
    return renamed


def current_name(cls: type, name: str) -> str:
    """The name of a configuration's field, which may be given by a former name: `cls.FORMER_NAMES` has those."""
    former: Mapping[str, str] = getattr(cls, "FORMER_NAMES", {})
    return former.get(name, name)


def _restore(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return config_from_dict(typing.cast("type[Any]", hint), value, where)
    # What does not fit stays as it is, for the configuration's own checks to refuse.
    if isinstance(value, str) and Path in (hint, *typing.get_args(hint)):
        return Path(value)
    if isinstance(value, list) and any(typing.get_origin(part) is tuple for part in (hint, *typing.get_args(hint))):
        return tuple(value)
    if hint is float and type(value) is int and abs(value) <= 1 << 53:  # a float may not hold a larger one
        return float(value)
    return value


def write_checked_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically, with the checksum of the rest as its last member."""
    write_json(path, with_checksum(content))


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object with one more member: the checksum of the others."""
    read_back = parse_json(json.dumps(content, allow_nan=False))  # where keys are texts and tuples are lists
    return {**read_back, CHECKSUM: _checksum(read_back)}


def read_checked_json(path: Path) -> Any:
    """The JSON value in a file, without its checksum; one that has none was written by an earlier version.

    Raises:
        ValueError: the file is not JSON, or its checksum is not that of its content; the text names the file.
        OSError: it cannot be read.
    """
    try:
        return parse_checked_json(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}{error}") from error


def parse_checked_json(data: bytes) -> Any:
    """As read_checked_json, of a file's content; the text of its ValueError is for putting behind the file's name."""
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ValueError(f" is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        return value
    found = value.pop(CHECKSUM, None)
    # The flipped bit may lie in the member's name: its value is then found under another one.
    renamed = any(isinstance(item, str) and item.startswith(_KIND) for item in value.values())
    if renamed or (found is not None and found != _checksum(value)):
        raise ValueError(
            ": its checksum is not that of its content: the file is damaged, or was changed by hand (then take its "
            f'member "{CHECKSUM}" out)'
        )
    return value


def read_settings(path: Path, cls: type) -> dict[str, Any]:
    """The settings in a file, NAME.json or NAME.yaml, by their fields' names; their values are not checked yet.

    Raises:
        ValueError: the file is neither, or is no object of settings; the text names it.
        OSError: it cannot be read.
    """
    if path.suffix == ".json":
        return _current_names(cls, read_checked_json(path), str(path))
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"a file of settings must end in .yaml, .yml or .json, got {path}")
    return _current_names(cls, _read_yaml(path), str(path))


def _read_yaml(path: Path) -> Any:
    """The value in a YAML file of JSON's kinds; 4e-3 is a number, as in YAML 1.2."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # it has no annotations
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few of them can stand for gigabytes
                raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            for (key, _), name in zip(node.value, names, strict=True):
                if key.tag != "tag:yaml.org,2002:str" or names.count(name) > 1:
                    wrong = "a name must be a text" if names.count(name) == 1 else f"{name!r} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, wrong, key.start_mark)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("+-.0123456789"))
    try:
        return yaml.load(read_bytes(path), Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ValueError(f"{path}: {error.context or ''} {error.problem}{line}".replace(":  ", ": ")) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def is_version(found: Any, version: int) -> bool:
    """Whether a file's "version" is that number; JSON's true, which equals 1 in Python, is not."""
    return type(found) is int and found == version


def _checksum(content: Mapping[str, Any]) -> str:
    return _KIND + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
