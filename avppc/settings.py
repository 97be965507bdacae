"""Configurations to and from JSON, every field checked on the way in."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


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

    Raises:
        ValueError: `where` (the file, say) has an unknown field, lacks one, or has a value that does not fit.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object with the fields of {cls.__name__}, got {type(values).__name__}")
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]  # any dataclass
    unknown = sorted(values.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{where}: unknown fields {unknown}; allowed are {sorted(fields)}")
    hints = typing.get_type_hints(cls)
    restored = {name: _restore(hints[name], value, f"{where}: {name}") for name, value in values.items()}
    try:
        return cls(**restored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


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
