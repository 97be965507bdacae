"""`avppc NAME ...`: each command is a configuration, whose fields are the flags, and a function that executes it."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.text import Text

import avppc.config
from avppc._version import __version__
from avppc.config import EvaluateConfig, PretrainConfig
from avppc.ops._library import check_variables
from avppc.printing import Console, colours_pass, drop_held_back, escaped_output, lenient_stderr, visible
from avppc.processes import Stopped, Terminated, exit_code, sigterm_interrupts
from avppc.settings import current_name

T = TypeVar("T")
_NO_MEMORY = re.compile("allocate memory|out of memory")  # torch's words on the CPU and on a GPU
_CLOSED_PIPE = 128 + 13  # as a shell reports a program that SIGPIPE ended
_FLAG = re.compile(r"^(--)([^.=]+)(?=\.)")  # of a group of settings
_GOES_ON = "; the same command goes on from what is there"


@dataclass(frozen=True)
class Command:
    """A command of the command line."""

    summary: str
    config: str
    """Name of its configuration in avppc.config."""
    module: str
    """Module whose execute(config) does the work and returns the exit code; imported when the command is given."""
    positional: str | None = None
    """Its field that may come first without the flag's name."""
    goes_on: bool = False
    """Whether the same command, started again, goes on from what it has done."""


COMMANDS = {
    "synth": Command(
        "Writes the talking mouths, a synthetic data set.", "SynthConfig", "avppc.synth.dataset", goes_on=True
    ),
    "index": Command(
        "Lists what a folder of videos holds and what is wrong.",
        "IndexConfig",
        "avppc.data.prepare.index",
        goes_on=True,
    ),
    "prepare": Command(
        "Decodes videos once into packed shards.", "PrepareConfig", "avppc.data.prepare.prepare", goes_on=True
    ),
    "check-sync": Command(
        "Finds sound that is shifted against the picture.", "CheckSyncConfig", "avppc.evaluate.diagnose.check_sync"
    ),
    "pretrain": Command(
        "Pretrains a visual encoder without labels.", "PretrainConfig", "avppc.train.loop", goes_on=True
    ),
    "evaluate": Command(
        "Measures lip reading, frozen and fine-tuned.",
        "EvaluateConfig",
        "avppc.evaluate.lipreading.evaluate",
        goes_on=True,
    ),
    "bench-train": Command(
        "Times the training step on this machine.", "BenchTrainConfig", "avppc.evaluate.lipreading.until"
    ),
    "table": Command(
        "Compares the proxy tasks, in one table.", "TableConfig", "avppc.evaluate.table.table", goes_on=True
    ),
    "diagnose": Command(
        "Looks into a run: shortcuts, retrieval, offsets.", "DiagnoseConfig", "avppc.evaluate.diagnose.diagnose"
    ),
    "report": Command("Writes one HTML page about a run.", "ReportConfig", "avppc.evaluate.report.report"),
    "read": Command("Reads the lips in a video, as a page.", "ReadConfig", "avppc.export.read", "video"),
    "export": Command(
        "Writes the encoder for other programs: safetensors, torch.export, ONNX.",
        "ExportConfig",
        "avppc.export.export",
        "run",
    ),
    "embed": Command(
        "Writes the encoder's features of a packed data set.", "EmbedConfig", "avppc.export.embed", "data"
    ),
    "features": Command(
        "Computes and draws the features of a file's sound.", "FeaturesConfig", "avppc.data.features", "source"
    ),
    "doctor": Command("Says what is installed and tests each op.", "DoctorConfig", "avppc.doctor"),
}

FORMER_NAMES = {"probe": "diagnose"}
"""Commands by names that still call them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 2 for bad arguments and unusable files, 1 where a worker died, 130 after
    Ctrl-C, 141 where nobody reads the output, 143 after SIGTERM."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _tell_of_crashes()
    with sigterm_interrupts(), lenient_stderr(), escaped_output():
        try:
            try:
                return _dispatch(given)
            finally:
                print(end="", flush=True)  # now: at the interpreter's end nothing could be done about a closed pipe
        except OSError as error:
            if _stdout_is_closed():
                return _CLOSED_PIPE
            drop_held_back(sys.stdout)
            return _fail(str(error) if isinstance(error, BrokenPipeError) else f"standard output: {error}")
        except KeyboardInterrupt as interrupt:  # also one that comes while an error is told
            return _interrupted(interrupt, COMMANDS.get(FORMER_NAMES.get(given[0], given[0])) if given else None)


def _dispatch(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"avppc {__version__}")
        return 0
    name, *flags = given
    name = FORMER_NAMES.get(name, name)
    if name not in COMMANDS:
        return _fail(f"there is no command {name!r}; the commands are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    try:
        check_variables()
        config = _parse(name, command, flags)
        execute: Callable[[Any], int] = importlib.import_module(command.module).execute
        return execute(config)
    except BrokenPipeError:
        raise  # `main` looks whether it is standard output's
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        return _fail(str(error))
    except BrokenExecutor:
        return _fail(f"a worker process died (killed, or out of memory){_GOES_ON if command.goes_on else ''}", code=1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        return _fail(f"out of memory: {(str(error) or 'none is left').splitlines()[0]}")
    except Stopped as stopped:
        return _fail(f"{stopped}; the same command goes on from there", stopped.exit_code)


def _interrupted(interrupt: KeyboardInterrupt, command: Command | None) -> int:
    advice = f"; {interrupt}" if interrupt.args else _GOES_ON if command is not None and command.goes_on else ""
    if isinstance(interrupt, Terminated):
        return _fail(f"ended by SIGTERM{advice}", exit_code(signal.SIGTERM))
    return _fail(f"interrupted{advice}", exit_code(signal.SIGINT))


def _tell_of_crashes() -> None:
    """Has Python say where it was when the process is ended by a fault, such as a mapped file that is cut short."""
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        with contextlib.suppress(OSError, ValueError):  # no file, or closed
            faulthandler.enable(sys.__stderr__)


def _stdout_is_closed() -> bool:
    """Whether nobody reads standard output any more, as behind `| head`; what is still to come is thrown away then."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, AttributeError):  # not a file, as in a notebook, or none at all
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors, such as a pipe without a reader, are always told
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def _parse(name: str, command: Command, flags: list[str]) -> Any:
    config_type = getattr(avppc.config, command.config)
    default = PRESETS[config_type](_preset(flags)) if config_type in PRESETS else None
    if command.positional is not None and flags and not flags[0].startswith("-"):
        flags = [f"--{command.positional}", *flags]
    flags = [_FLAG.sub(lambda found: found[1] + current_name(config_type, found[2]), flag) for flag in flags]
    with colours_pass():
        return tyro.cli(
            config_type,
            prog=f"avppc {name}",
            description=command.summary,
            args=flags,
            default=default,
            console_outputs=True,
        )


def _preset(flags: Sequence[str]) -> str | None:
    """The value of --preset."""
    for place, flag in enumerate(flags):
        if flag == "--preset" and place + 1 < len(flags):
            return flags[place + 1]
        if flag.startswith("--preset="):
            return flag.partition("=")[2]
    return None


def _pretrain_defaults(preset: str | None) -> PretrainConfig:
    """Those of a preset, without data and out, which have none."""
    name: Any = preset or "laptop"  # checked there
    return _without(PretrainConfig.from_preset(name, Path(), Path()), "data", "out")


def _evaluate_defaults(preset: str | None) -> EvaluateConfig:
    name: Any = preset or "few-labels"
    return _without(EvaluateConfig.from_preset(name, Path()), "run")


def _without(config: T, *names: str) -> T:
    """The defaults with these fields still to be given; a configuration itself would refuse what stands for them."""
    for name in names:
        object.__setattr__(config, name, tyro.MISSING)
    return config


PRESETS: dict[type, Callable[[str | None], Any]] = {
    PretrainConfig: _pretrain_defaults,
    EvaluateConfig: _evaluate_defaults,
}
"""What makes the defaults of a configuration with presets."""


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: avppc COMMAND [--help] ...", "", *lines])


def _fail(text: str, code: int = 2) -> int:
    lines = visible(text).replace("\n", "\n  ")  # a name with an end of line does not begin a line of its own
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("avppc:", "bold red"), " ", lines))
    return code
