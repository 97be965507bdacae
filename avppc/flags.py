"""The flags of a command: fields of its configuration, above a file of settings (--config) and a preset; their help."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from avppc.printing import colours_pass
from avppc.settings import config_from_dict, current_name, is_whole, overlaid, read_settings

T = TypeVar("T")
SHELLS = ("bash", "zsh", "fish")
HELP_ALL = "--help-all"
QUIET = "--quiet"

_GROUP = re.compile(r"^(--)([^.=]+)(?=[.=]|$)")  # a flag, or what is before the first dot of one of a group
_SENTENCE = re.compile(r"(?<=\.)\s+(?=[A-Z\"])")  # between one and the next
_NAME = re.compile(r"(?<![\w.-])[a-z]\w*(?:\.[a-z]\w*)*")  # of a setting, in a text

_SWITCH = Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help_behavior_hint="")]
_OF_THE_COMMAND: dict[str, tuple[Any, str]] = {
    "config": (
        Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")],
        "Settings in YAML or JSON, such as a run's config.json; flags win. What neither says has the preset's default.",
    ),
    "quiet": (_SWITCH, "Shows no progress; results, warnings and errors are still said."),
    "help_all": (_SWITCH, "Shows all settings, and what each means in full, and exits."),
}
"""Flags that every command has, which are no settings: type and text."""


class _Refused(Exception):
    """Settings that do not fit; tyro, which knows a ValueError, would put the name of a class before the text."""


def parse(config_type: type[T], flags: Sequence[str], *, prog: str, summary: str, usual: Sequence[str] | None) -> T:
    """The configuration that the flags give; prints the help, or what no flag may say, and exits.

    Args:
        config_type: a dataclass of settings; its first field without a default may come first, without its flag.
        flags: as given behind the command's name.
        prog: the command, for the help.
        summary: what it does, for the help.
        usual: names of the settings that --help shows, those of a group as GROUP.NAME; None: all.

    Raises:
        ValueError: the settings do not fit; or --config names a file that is no file of such settings.
        OSError: it cannot be read.
    """
    flags = list(flags)
    first = next(iter(_required(config_type)), None)
    if first is not None and flags and not flags[0].startswith("-"):
        flags = [f"--{first}", *flags]
    flags = [_GROUP.sub(lambda found: found[1] + current_name(config_type, found[2]), flag) for flag in flags]
    shown = usual if {"-h", "--help"} & set(flags) else None
    flags = ["--help" if flag == HELP_ALL else flag for flag in flags]
    if first is not None:
        summary += f"\n\n{first.upper()} may come first without its flag: {prog} {first.upper()} ..."
    default = defaults(config_type, flags)
    with colours_pass(), _rules([config_type], shown):
        try:
            return tyro.cli(config_type, prog=prog, description=summary, args=flags, default=default)
        except _Refused as error:
            raise ValueError(str(error)) from error


def defaults(config_type: type[T], flags: Sequence[str]) -> T:
    """The settings below the flags: those of --config, and of the preset that it or the flags name.

    Fields without a default that are not in the file are tyro.MISSING.
    """
    given, file = value_of("preset", flags), value_of("config", flags)
    values = {} if file is None else read_settings(Path(file), config_type)
    required = {name: Path(f"{name}.npz") for name in _required(config_type)}  # passes the checks
    if file is not None and is_whole(config_type, values):
        if given not in (None, values.get("preset")):
            raise ValueError(f"--preset {given} would change nothing: {file} has a value for every setting")
        config = config_from_dict(config_type, {**required, **values}, file)
    else:
        preset = values.get("preset") if given is None else given
        with _named_in_errors(file if given is None else None):
            make: Any = getattr(config_type, "from_preset", None) if preset is not None else None
            config = config_type(**required) if make is None else make(preset, **required)
        config = overlaid(config, values, str(file))
    for name in required.keys() - values.keys():
        object.__setattr__(config, name, tyro.MISSING)
    return config


def value_of(name: str, flags: Sequence[str]) -> str | None:
    """The value that a flag is given, as --NAME VALUE or --NAME=VALUE; None without the flag."""
    found = [flags[place + 1 :][:1] for place, flag in enumerate(flags) if flag == f"--{name}"]
    found += [[flag.partition("=")[2]] for flag in flags if flag.startswith(f"--{name}=")]
    if len(found) > 1:
        raise ValueError(f"--{name} is given {len(found)} times")
    if found and (not found[0] or not found[0][0] or found[0][0].startswith("-")):
        raise ValueError(f"--{name} needs a value")
    return found[0][0] if found else None


def print_completion(commands: Mapping[str, tuple[type[Any], str]], shell: str) -> None:
    """Prints the program by which a shell completes the commands, their flags and choices.

    Args:
        commands: configuration and summary by name.
        shell: one of SHELLS.
    """
    types = [config_type for config_type, _ in commands.values()]
    every: Any = None
    for name, (config_type, summary) in commands.items():
        part = tyro.conf.subcommand(name, default=defaults(config_type, []), description=summary, prefix_name=False)
        every = Annotated[config_type, part] if config_type is types[0] else every | Annotated[config_type, part]
    with _rules(types, None), contextlib.suppress(SystemExit):
        tyro.cli(every, prog="avppc", args=["--tyro-print-completion", shell])


@contextlib.contextmanager
def _named_in_errors(file: str | None) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        if file is None:
            raise
        raise ValueError(f"{file}: {error}") from error


def _required(config_type: type[Any]) -> list[str]:
    """The fields without a default."""
    return [
        field.name
        for field in dataclasses.fields(config_type)
        if field.default is field.default_factory is dataclasses.MISSING
    ]


def _rules(config_types: Sequence[type[Any]], shown: Sequence[str] | None) -> ConstructorRegistry:
    """How tyro makes flags of configurations: as of any dataclass, but with texts that are filled and name flags.

    Args:
        config_types: those of the commands.
        shown: names of the settings that the help shows; None: all.
    """
    rules = ConstructorRegistry()
    trees = [dict(_groups(config_type)) for config_type in config_types]

    @rules.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        tree = next((tree for tree in trees if info.type in tree), None)
        if tree is None:
            return None
        fields = list(_field_specs(info.type, info.default, tree, shown))
        if info.type not in config_types:
            return StructConstructorSpec(functools.partial(_make, info.type, tree[info.type]), tuple(fields))
        for name, (kind, text) in _OF_THE_COMMAND.items():
            if name != "help_all" or shown is not None:
                fields.append(StructFieldSpec(name, kind, None if name == "config" else False, text))
        return StructConstructorSpec(functools.partial(_make_command, info.type), tuple(fields))

    return rules


def _field_specs(
    cls: type[Any], default: Any, tree: Mapping[type[Any], str], shown: Sequence[str] | None
) -> Iterator[StructFieldSpec]:
    prefix, hints = tree[cls], typing.get_type_hints(cls)
    texts = field_texts(cls)  # type: ignore[arg-type]  # a class is hashable
    fields = dataclasses.fields(cls)
    if shown is not None:
        fields = tuple(sorted(fields, key=lambda field: [*shown, prefix + field.name].index(prefix + field.name)))
    for field in fields:
        hint, text = hints[field.name], _with_flags(texts[field.name], prefix, tree)
        if hint not in tree:
            hint = _with_plain_none(hint)
            if shown is not None:
                text = _SENTENCE.split(text)[0]
                hint = hint if prefix + field.name in shown else Annotated[hint, tyro.conf.Suppress]
        yield StructFieldSpec(field.name, hint, getattr(default, field.name), text)


def _with_plain_none(hint: Any) -> Any:
    """The type; where it is another one or None, the help calls it PATH|None, say."""
    parts = typing.get_args(hint)
    if len(parts) != 2 or parts[1] is not type(None):
        return hint
    choices = typing.get_args(parts[0])
    name = f"{{{','.join(map(str, choices))}}}" if choices else parts[0].__name__.upper()
    return Annotated[hint, tyro.conf.arg(metavar=f"{name}|None")]


def _groups(cls: type[Any], prefix: str = "") -> Iterator[tuple[type[Any], str]]:
    """A configuration and the groups of settings in it, with what stands before the names of their fields."""
    yield cls, prefix
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _groups(typing.cast("type[Any]", hint), f"{prefix}{name}.")


@functools.cache
def field_texts(cls: type[Any]) -> dict[str, str]:
    """The docstring of each field, filled: in one line for each paragraph."""
    texts: dict[str, str] = {}
    for kind in reversed(cls.__mro__[:-1]):
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                texts[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return texts


def _with_flags(text: str, prefix: str, tree: Mapping[type[Any], str]) -> str:
    """The text with the flags of settings in place of their names; a name of one plain word may be a word."""
    names = {group + field.name for cls, group in tree.items() for field in dataclasses.fields(cls)}

    def flag(found: re.Match[str]) -> str:
        name = next((name for name in (prefix + found[0], found[0]) if name in names), None)
        if name is None or not re.search("[._]", found[0]):
            return found[0]
        return f"--{name.replace('_', '-')}"

    return _NAME.sub(flag, text)


def _make(cls: type[T], prefix: str, **fields: Any) -> T:
    try:
        return cls(**fields)
    except (TypeError, ValueError) as error:
        raise _Refused(f"{prefix}{error}") from error


def _make_command(cls: type[T], **fields: Any) -> T:
    return _make(cls, "", **{name: value for name, value in fields.items() if name not in _OF_THE_COMMAND})
