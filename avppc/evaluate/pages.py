"""Templates and shell commands, as the report, the table and the model card write them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from avppc.settings import config_to_dict

PALETTE = {
    "ink": ("#1d2126", "#e4e7ea"),
    "soft": ("#5f6872", "#98a2ad"),
    "line": ("#dce0e5", "#333a42"),
    "page": ("#fefefe", "#14171b"),
    "panel": ("#f5f6f8", "#1c2026"),
    "accent": ("#2560a8", "#6fabf0"),
    "second": ("#bf6516", "#e8a15e"),
    "third": ("#2a8a6c", "#56c09c"),
    "fourth": ("#8356a5", "#bb99da"),
    "on-accent": ("#fffffe", "#0e1216"),
}
"""Colours by name, for a light and a dark page; the page defines them as CSS variables."""

_LINE_LENGTH = 100


def page_environment(folder: Path = Path(__file__).parent, *, html: bool = True) -> jinja2.Environment:
    """jinja2's environment for the templates in a folder; a value that a template names but is not given is an error.

    Templates of other folders may include the style of every page.

    Args:
        html: escapes the values for HTML; other texts, such as Markdown, get them as they are.
    """
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=html,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def changed_settings(config: Any, default: Any) -> dict[str, Any]:
    """The settings of `config` that differ from those of `default`: {dotted name: value of `config`}."""
    ours, theirs = _flat(config_to_dict(config)), _flat(config_to_dict(default))
    return {name: value for name, value in ours.items() if value != theirs[name]}


def command_line(command: str, settings: Mapping[str, Any]) -> str:
    """The shell command that runs `avppc COMMAND` with these settings; a long one goes over several lines.

    Args:
        settings: {dotted name: value}, a flag each.
    """
    lines = [f"avppc {command}"]
    for name, value in settings.items():
        flag = shlex.join(_flag(name.replace("_", "-"), value))
        if len(lines[-1]) + len(flag) > _LINE_LENGTH:
            lines.append("   ")
        lines[-1] += f" {flag}"
    return " \\\n".join(lines)


def _flag(name: str, value: Any) -> list[str]:
    """One flag as words of a command line: --name and its values, or --name / --no-name for a boolean."""
    parent, dot, leaf = name.rpartition(".")
    if isinstance(value, bool):
        return [f"--{parent}{dot}{'' if value else 'no-'}{leaf}"]
    return [f"--{name}", *map(str, value if isinstance(value, list) else [value])]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
