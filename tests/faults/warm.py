"""A process that has imported everything, and runs each command of avppc in a fork of itself.

Reads one JSON object a line, {"arguments": [...], "output": path, "stderr": path}, and answers each with the exit code
of the command, negative for a signal, once all its processes are gone; null if they had to be ended. With "stay": true
the command runs in this process: later ones find loaded, compiled and remembered what it needed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any

_SECONDS = 120.0
_PR_SET_CHILD_SUBREAPER = 36
_MODULES = ("cv2", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "matplotlib.figure")
_MODULES += ("pyarrow.compute", "pyarrow.parquet", "onnx", "onnxscript", "torch.export", "torch.onnx")
_MODULES += ("networkx", "numpy.fft", "torch._dynamo", "torch.utils.tensorboard", "typeguard")
_MODULES += ("avppc.synth.worker", "avppc.data.prepare.worker")
_FIRST = ("torch.export.export", "torch.export.load", "torch.onnx.export")
"""Slow functions that give what they gave first: they write nothing, and a command has to get the same each time."""


def main() -> None:
    """Serves commands until standard input ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import PIL.Image
        import torch

        torch.set_num_threads(1)  # threads do not survive a fork
        from avppc import cli

        for command in cli.COMMANDS.values():
            importlib.import_module(command.module)
        for name in _MODULES:
            importlib.import_module(name)
        PIL.Image.preinit()
    for name in _FIRST:
        _replace(name, _first)
    _replace("avppc.cli._parse", _by_arguments)
    _replace("avppc.evaluate.lipreading.fits.fit_classifier", _fit_by_arguments)
    _replace("avppc.evaluate.report.plots._draw", _by_arguments)
    _replace("matplotlib.figure.Figure.savefig", _draw_by_figure)
    save = PIL.Image.Image.save
    quick = {"optimize": False, "compress_level": 1}  # the smallest PNG takes longer than all else that a command does
    PIL.Image.Image.save = lambda *given, **settings: save(*given, **settings | quick)
    # Workers are forks, too: a fresh process would import torch once more.
    context = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: context  # type: ignore[assignment]
    # Workers that outlive the command become children of this process.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    gc.freeze()
    print("ready", flush=True)
    while line := sys.stdin.readline():
        order = json.loads(line)
        if order["stay"]:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                code = cli.main(order["arguments"])
            gc.freeze()
            print(json.dumps(code), flush=True)
            continue
        child = os.fork()
        if child == 0:
            _become(order)
            _run(cli.main, order["arguments"])
        print(json.dumps(_wait(child)), flush=True)


def _replace(name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, function_name = name.rpartition(".")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:  # a method
        outer, _, class_name = module.rpartition(".")
        owner = getattr(importlib.import_module(outer), class_name)
    setattr(owner, function_name, wrapper(getattr(owner, function_name)))


def _first(function: Callable[..., Any]) -> Callable[..., Any]:
    kept = []

    def remembered(*given: object, **settings: object) -> object:
        if not kept:
            kept.append(function(*given, **settings))
        return kept[0]

    return remembered


def _by_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that writes nothing: what it gave for the same arguments, it gives again."""
    kept: dict[bytes, object] = {}

    def remembered(*given: object, **settings: object) -> object:
        key = _digest(given, settings)
        if key not in kept:
            kept[key] = function(*given, **settings)
        return kept[key]

    return remembered


def _fit_by_arguments(function: Callable[..., float]) -> Callable[..., float]:
    """As _by_arguments, for a function that trains the module that comes first."""
    kept: dict[bytes, tuple[float, Any]] = {}

    def remembered(model: Any, groups: Any, *given: object) -> float:
        rates = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        key = _digest(model, rates, given)
        if key not in kept:
            rate = function(model, groups, *given)
            kept[key] = rate, {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(kept[key][1])
        return kept[key][0]

    return remembered


def _draw_by_figure(function: Callable[..., None]) -> Callable[..., None]:
    """Remembers the files of matplotlib's figures, by what is to be drawn."""
    kept: dict[bytes, bytes] = {}

    def remembered(figure: Any, buffer: io.BytesIO, **settings: object) -> None:
        key = _digest(figure, settings)
        if key not in kept:
            function(figure, buffer, **settings)
            kept[key] = buffer.getvalue()
        else:
            buffer.write(kept[key])

    return remembered


def _digest(*given: object) -> bytes:
    content = io.BytesIO()
    _Content(content).dump(given)
    return hashlib.sha256(content.getbuffer()).digest()


class _Content(pickle.Pickler):
    """What objects hold, the same for the same content: without addresses in memory."""

    def reducer_override(self, value: object) -> Any:
        import torch
        from matplotlib.transforms import TransformNode

        if isinstance(value, torch.Tensor):
            array = value.detach().numpy()
            return str, (f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}",)
        if isinstance(value, TransformNode):
            parts = {name: part for name, part in vars(value).items() if name != "_parents"}
            return str, (type(value).__name__,), parts
        if isinstance(value, FunctionType):
            return str, (value.__qualname__,), [cell.cell_contents for cell in value.__closure__ or ()]
        return NotImplemented


def _become(order: dict[str, object]) -> None:
    os.setsid()
    for descriptor, path in ((0, os.devnull), (1, order["output"]), (2, order["stderr"])):
        file = os.open(str(path), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)


def _run(command: Callable[[list[str]], int], arguments: list[str]) -> None:
    """Ends this process as the interpreter does, without taking apart all that was imported: that takes a second."""
    code = 1
    try:
        code = command(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    gc.collect()  # what is still open says now that it cannot be closed
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _wait(child: int) -> int | None:
    """The child's exit code, once it and all that it has started are gone."""
    deadline, code, late = time.monotonic() + _SECONDS, None, False
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return None if late else code
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
        if pid == 0:
            if time.monotonic() > deadline:
                late = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            time.sleep(0.002)


if __name__ == "__main__":
    main()
