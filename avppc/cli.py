"""`avppc NAME ...`: each command is a configuration, whose fields are the flags, and a function that executes it."""

from __future__ import annotations

import contextlib
import difflib
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
from typing import Any, TypeVar

from rich.text import Text

import avppc.config
from avppc import flags
from avppc._version import __version__
from avppc.ops._library import check_variables
from avppc.printing import Console, drop_held_back, escaped_output, lenient_stderr, quiet, visible
from avppc.processes import Stopped, Terminated, exit_code, sigterm_interrupts

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
    usual: tuple[str, ...] | None = None
    """The settings that --help shows; None: all."""
    goes_on: bool = False
    """Whether the same command, started again, goes on from what it has done."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COMMANDS = {
    "synth": Command(
        "Writes the talking mouths, a synthetic data set.",
        "SynthConfig",
        "avppc.synth.dataset",
        _names("out words clips_per_word val_clips_per_word test_clips_per_word extra_clips difficulty seed overwrite"),
        goes_on=True,
    ),
    "index": Command(
        "Lists what a folder of videos holds and what is wrong.",
        "IndexConfig",
        "avppc.data.prepare.index",
        _names("data out paths layout words workers shard"),
        goes_on=True,
    ),
    "prepare": Command(
        "Decodes videos once into packed shards.",
        "PrepareConfig",
        "avppc.data.prepare.prepare",
        _names("data out crop words split_by stride workers shard overwrite"),
        goes_on=True,
    ),
    "check-sync": Command(
        "Finds sound that is shifted against the picture.", "CheckSyncConfig", "avppc.evaluate.diagnose.check_sync"
    ),
    "pretrain": Command(
        "Pretrains a visual encoder without labels.",
        "PretrainConfig",
        "avppc.train.loop",
        _names("data out loader preset task steps batch_size seed device optimizer.learning_rate"),
        goes_on=True,
    ),
    "evaluate": Command(
        "Measures lip reading, frozen and fine-tuned.",
        "EvaluateConfig",
        "avppc.evaluate.lipreading.evaluate",
        _names("run data loader trajectories rows labels_per_word draws heads device"),
        goes_on=True,
    ),
    "bench-train": Command(
        "Times the training step on this machine.",
        "BenchTrainConfig",
        "avppc.evaluate.bench_train",
        _names("data loader preset batch_size steps device threads batch_slices beside until"),
    ),
    "table": Command(
        "Compares the proxy tasks, in one table.",
        "TableConfig",
        "avppc.evaluate.table.table",
        _names("data out preset tasks labels seeds heads steps only_finished part device"),
        goes_on=True,
    ),
    "diagnose": Command(
        "Looks into a run: shortcuts, retrieval, offsets.", "DiagnoseConfig", "avppc.evaluate.diagnose.diagnose"
    ),
    "report": Command("Writes one HTML page about a run.", "ReportConfig", "avppc.evaluate.report.report"),
    "read": Command(
        "Reads the lips in a video, as a page.",
        "ReadConfig",
        "avppc.export.read",
        _names("video run out json words crop stride_frames device"),
    ),
    "export": Command(
        "Writes the encoder for other programs: safetensors, torch.export, ONNX.",
        "ExportConfig",
        "avppc.export.export",
    ),
    "embed": Command(
        "Writes the encoder's features of a packed data set.",
        "EmbedConfig",
        "avppc.export.embed",
        _names("data encoder out loader splits per batch_size device"),
    ),
    "features": Command(
        "Computes and draws the features of a file's sound.",
        "FeaturesConfig",
        "avppc.data.features",
        _names("source preset mfcc plot out"),
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
    if not given or given in (["-h"], ["--help"], ["help"]):
        print(_usage())
        return 0 if given else 2
    if given[0] in ("-V", "--version"):
        print(f"avppc {__version__}")
        return 0
    if given[0] == "--print-completion":
        return _print_completion(given[1:])
    if given[0] == "help":
        given = [given[1], "--help"]
    name, *rest = given
    name = FORMER_NAMES.get(name, name)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.7)
        guess = f"did you mean {near[0]!r}? The" if near else "the"
        return _fail(f"there is no command {name!r}; {guess} commands are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    try:
        check_variables()
        config = _parse(name, command, rest)
        execute: Callable[[Any], int] = importlib.import_module(command.module).execute
        with quiet(flags.QUIET in rest):
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


def _parse(name: str, command: Command, given: list[str]) -> Any:
    config_type = getattr(avppc.config, command.config)
    return flags.parse(config_type, given, prog=f"avppc {name}", summary=command.summary, usual=command.usual)


def _print_completion(given: list[str]) -> int:
    if len(given) != 1 or given[0] not in flags.SHELLS:
        return _fail(f"--print-completion needs one of {', '.join(flags.SHELLS)}")
    flags.print_completion(
        {name: (getattr(avppc.config, command.config), command.summary) for name, command in COMMANDS.items()}, given[0]
    )
    return 0


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    more = "avppc COMMAND --help shows the usual settings of a command, --help-all all of them."
    return "\n".join(["usage: avppc COMMAND [--help] ...", "", *lines, "", more])


def _fail(text: str, code: int = 2) -> int:
    lines = visible(text).replace("\n", "\n  ")  # a name with an end of line does not begin a line of its own
    Console(stderr=True, quiet=False, soft_wrap=True).print(Text.assemble(("avppc:", "bold red"), " ", lines))
    return code
