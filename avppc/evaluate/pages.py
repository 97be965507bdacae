"""What all pages share: their templates, and the command line that reproduces a configuration."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from avppc.settings import config_to_dict

_LINE_LENGTH = 100


def page_environment() -> jinja2.Environment:
    """Where templates are looked up. Values put into them are escaped, and a missing one is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def changed_settings(config: Any, default: Any) -> dict[str, Any]:
    """The settings that differ from the default's, by dotted name."""
    ours, theirs = _flat(config_to_dict(config)), _flat(config_to_dict(default))
    return {name: value for name, value in ours.items() if value != theirs[name]}


def command_line(command: str, settings: Mapping[str, Any]) -> str:
    """`avppc COMMAND` for the shell, with a flag for each setting by its dotted name, over several lines if long."""
    lines = [f"avppc {command}"]
    for name, value in settings.items():
        flag = shlex.join(_flag(name.replace("_", "-"), value))
        if len(lines[-1]) + len(flag) > _LINE_LENGTH:
            lines.append("   ")
        lines[-1] += f" {flag}"
    return " \\\n".join(lines)


def _flag(name: str, value: Any) -> list[str]:
    """The words of one flag; a boolean is given by the flag alone."""
    parent, dot, leaf = name.rpartition(".")
    if isinstance(value, bool):
        return [f"--{parent}{dot}{'' if value else 'no-'}{leaf}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
