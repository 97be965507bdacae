"""Loads the compiled libraries. This module alone knows whether C++, CUDA and Triton kernels are there, and why not.

Nothing here fails at import: `missing_reason` says what is missing, and `require` raises it at the first use.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

BUILD_COMMAND = "pip install -e . --no-build-isolation"
COMPILED_PARTS = ("cpp", "cuda", "triton")  # what an op's backend may need
_logger = logging.getLogger("avppc.ops")
_LIBRARY_FOLDER = Path(__file__).parent.parent / "lib"

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiled(function: _Function) -> _Function:
    """Lets torch.compile call the function while it traces and keep the answer, instead of tracing into the loading.

    This is torch.compiler.assume_constant_result without its import of the whole compiler, which would cost seconds at
    `import avppc`.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what torch's decorator sets
    return function


@functools.cache
def _load(name: str) -> str | None:
    """Loads lib/lib<name>.so once; returns why it could not be loaded, or None when it is loaded."""
    path = _LIBRARY_FOLDER / f"lib{name}.so"
    if not path.exists():
        return f"{path.name} was not built: run `{BUILD_COMMAND}` in the source tree"
    try:
        load_library: Callable[[str], None] = torch.ops.load_library
        load_library(str(path))
    except OSError as error:
        return f"{path} does not load with torch {torch.__version__} ({error}): build again with `{BUILD_COMMAND}`"
    return None


@functools.cache
def _find(part: str) -> str | None:
    if part == "cpp":
        return _load("avppc_cpu")
    if part == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device is available to torch"
        return _load("avppc_cpu") or _load("avppc_cuda")  # the operators' schemas are in the first
    if part == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"Triton cannot be imported ({error}): run `pip install triton`"
        return None
    raise ValueError(f"part must be one of {', '.join(map(repr, COMPILED_PARTS))}; got {part!r}")


@constant_when_compiled
def missing_reason(part: str) -> str | None:
    """Why "cpp", "cuda" or "triton" kernels cannot be used here, with what to do about it; None when they can."""
    return _find(part)


@constant_when_compiled
def has_cpp_ops() -> bool:
    """Whether the C++ kernels for CPU tensors are there."""
    return _find("cpp") is None


@constant_when_compiled
def triton_interprets() -> bool:
    """Whether TRITON_INTERPRET=1 makes Triton's interpreter run its kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@constant_when_compiled
def triton_missing_reason(device_type: str, index: int | None) -> str | None:
    """Why Triton kernels cannot run on tensors of a device; None when they can."""
    return _triton_missing_reason(device_type, index)


@functools.cache
def _triton_missing_reason(device_type: str, index: int | None) -> str | None:
    if _find("triton") is not None:
        return _find("triton")
    if triton_interprets():
        return None if device_type == "cpu" else "TRITON_INTERPRET=1 runs the kernels on the CPU"
    if device_type != "cuda":
        return f"they run on CUDA devices, not on {device_type}, unless TRITON_INTERPRET=1 lets Triton interpret them"
    if torch.version.hip is not None:
        return "they have not been tried on AMD GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        name = torch.cuda.get_device_name(index)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; they need 8.0"
    return None


def require(backend: str, op: str) -> None:
    """Raises RuntimeError when the backend's kernels are missing; the text names the op and what to run."""
    reason = missing_reason(backend)
    if reason is not None:
        what = {"cpp": "the compiled extension", "cuda": "the compiled CUDA library", "triton": "Triton"}[backend]
        raise RuntimeError(f"{op}(backend={backend!r}) needs {what}: {reason}")


@constant_when_compiled
def log_plain_torch(op: str, device_type: str, backend: str, reason: str) -> None:
    """Logs, once in a process, that an op runs in plain torch without the backend's kernels, and why."""
    # on the CPU plain torch is what many ask for; on a GPU it costs many times the time
    level = logging.INFO if device_type == "cpu" else logging.WARNING
    _log_once(level, f"{op} runs in plain torch on {device_type}, without the {backend!r} kernels: {reason}")


@functools.cache
def _log_once(level: int, text: str) -> None:
    _logger.log(level, text)


def build_info() -> dict[str, Any] | None:
    """Facts about the compiled extension; None without it.

    Keys: compiler, flags, torch (built against), cuda (version or None), cuda_architectures, cpu_levels (vector
    extensions compiled), cpu_level (the one in use on this machine).

    Raises:
        ValueError: AVPPC_CPU_LEVEL names a level that there is not, or that this machine does not have.
    """
    try:
        module = importlib.import_module("avppc._C")
    except ImportError:
        return None
    try:
        info: dict[str, Any] = module.build_info()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    return info


def check_variables() -> None:
    """ValueError where a variable of the environment that an op would only meet later has a value that it cannot."""
    is_switched_on("AVPPC_TUNE")
    if os.environ.get("AVPPC_CPU_LEVEL"):
        build_info()


def is_switched_on(name: str) -> bool:
    """Whether a variable of the environment is 1, not 0, empty or absent; ValueError where it is anything else."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} must be 1 or 0, got {value!r}")
    return value == "1"
