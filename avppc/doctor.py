"""`avppc doctor`: what is installed, which backend each op uses and why, and whether the ops compute rightly.

The self-test compares each op on this machine with its definition in float64.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from avppc._version import __version__
from avppc.checks import check_choice, check_types
from avppc.data.on_the_fly import nvdec
from avppc.ops import _library
from avppc.ops.info_nce.op import bilinear_info_nce, pick_backend
from avppc.ops.info_nce.problem import make_problem
from avppc.ops.log_mel.config import PRESETS, LogMelConfig
from avppc.ops.log_mel.op import log_mel
from avppc.ops.log_mel.reference import log_mel_reference
from avppc.printing import Console, one_line
from avppc.processes import count_cores
from avppc.train.hardware import cpu_model, package_versions

_PACKAGES = ("numpy", "safetensors", "av", "torchcodec", "nvidia-dali-cuda130", "triton", "tyro", "matplotlib")

REQUIRABLE = ("cpp", "cuda", "triton", "pyav", "torchcodec", "dali", "nvdec")

# In units of the features; the transform of plain torch is in float32.
LOG_MEL_ALLOWED = {"cpp": 1e-4, "cuda": 1e-4, "reference": 5e-3}
INFO_NCE_ALLOWED = 1e-4  # of the norm of what is compared


def execute(config: DoctorConfig) -> int:
    """Prints the findings; 1 if a self-test failed or a required part is missing, else 0."""
    findings = examine()
    tests = list(self_tests()) if config.self_test else []
    problems = [f"{name} is required: {findings['missing'][name]}" for name in config.require
                if findings["missing"][name] is not None]  # fmt: skip
    problems += [_complaint(test) for test in tests if not test.ok]
    findings["self_test"] = [{**dataclasses.asdict(test), "ok": test.ok} for test in tests]
    findings["problems"] = problems
    if config.json:
        # A NaN is no JSON.
        print(json.dumps(_without_nan(findings), indent=2))
    else:
        _print(findings, tests)
    return 1 if problems else 0


def examine() -> dict[str, Any]:
    """Versions, build, devices, backends, and what is missing (part: None where it is there, else the reason)."""
    build = _library.build_info()
    return {
        "versions": {
            "avppc": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "torch": torch.__version__,  # its package's version does not say which build it is
            **package_versions(_PACKAGES),
        },
        "build": build,
        "devices": _devices(),
        "missing": {
            **{name: _library.missing_reason(name) for name in _library.COMPILED_PARTS},
            "pyav": _import_problem("av"),
            "torchcodec": _import_problem("torchcodec.decoders"),
            "dali": _import_problem("nvidia.dali"),
            "nvdec": _nvdec_problem(),
        },
        "backends": _backends(build),
    }


def _devices() -> dict[str, Any]:
    cores = count_cores()
    gpus = [
        {
            "name": torch.cuda.get_device_name(number),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(number))),
        }
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "torch_cuda": torch.version.cuda,
    }


def _import_problem(module: str) -> str | None:
    """Why a module cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"not installed ({error})"
    except Exception as error:  # a package whose libraries are missing may raise anything
        return f"does not import: {one_line(error)}"
    return None


def _nvdec_problem() -> str | None:
    """Why the GPU's video decoder cannot be used; None if the driver's library is there."""
    if not torch.cuda.is_available():
        return "no CUDA device is available to torch"
    try:
        ctypes.CDLL(nvdec.LIBRARY)
    except OSError as error:
        return f"the driver's {nvdec.LIBRARY} does not load ({error}): in a container, ask for the capability 'video'"
    return None


def _backends(build: dict[str, Any] | None) -> list[dict[str, str | None]]:
    """What backend="auto" means for float32 on each device."""
    rows: list[dict[str, str | None]] = []
    for op, backend_of, compiled in (
        ("log_mel", log_mel_backend, {"cpu": "cpp", "cuda": "cuda"}),
        ("bilinear_info_nce", info_nce_backend, {"cpu": "cpp", "cuda": "triton"}),
    ):
        for device in ("cpu", "cuda"):
            if device == "cuda" and not torch.cuda.is_available():
                rows.append(
                    {"op": op, "device": device, "backend": None, "why": "no CUDA device is available to torch"}
                )
                continue
            backend = backend_of(device)
            if backend == "reference":
                why = _library.missing_reason(compiled[device]) or f"there are no {compiled[device]} kernels for it"
            elif backend == "cpp":
                why = f"compiled, {build['cpu_level']}" if build else "compiled"
            else:
                why = "compiled" if backend == "cuda" else "its kernels are compiled when they are first used"
            rows.append({"op": op, "device": device, "backend": backend, "why": why})
    return rows


def _complaint(test: SelfTest) -> str:
    what = test.problem or f"errs by {test.error:.2g}, {test.allowed:.2g} are allowed"
    return f"{test.op} ({test.case}) on {test.device} with backend {test.backend!r}: {what}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value


def _print(findings: dict[str, Any], tests: list[SelfTest]) -> None:
    console = Console(soft_wrap=True)
    versions, devices, build = findings["versions"], findings["devices"], findings["build"]
    _print_rows(console, "versions", [(name, version or "-") for name, version in versions.items()])
    gpus = ", ".join(f"{gpu['name']} ({gpu['capability']})" for gpu in devices["gpus"]) or "none"
    cpu = f"{devices['cpu']}, {devices['cores']} cores, torch uses {devices['threads']} threads"
    _print_rows(console, "devices", [("CPU", cpu), ("GPU", gpus), ("CUDA of torch", devices["torch_cuda"] or "none")])
    if build is None:
        _print_rows(console, "build", [("extension", f"not built: run `{_library.BUILD_COMMAND}` in the source tree")])
    else:
        cuda = f"{build['cuda']} for sm_{', sm_'.join(build['cuda_architectures'])}" if build["cuda"] else "none"
        levels = f"{build['cpu_level']} in use, of {', '.join(build['cpu_levels'])}"
        _print_rows(
            console, "build",
            [("compiler", build["compiler"]), ("torch", build["torch"]), ("CUDA", cuda), ("vectors", levels)],
        )  # fmt: skip
    _print_rows(console, "parts", [(name, reason or "there") for name, reason in findings["missing"].items()])
    rows = [
        (f"{row['op']}, {row['device']}", f"{row['backend'] or 'none'}: {row['why']}") for row in findings["backends"]
    ]
    _print_rows(console, "backend='auto', float32", rows)
    marks = [
        (f"{test.op}, {test.device}, {test.case}",
         f"{'ok' if test.ok else 'FAILED'}: {test.problem or f'errs by {test.error:.1e} of {test.allowed:.0e}'}")
        for test in tests
    ]  # fmt: skip
    _print_rows(console, "self-test against the definition in float64", marks or [("", "not run")])
    for problem in findings["problems"]:
        console.print("problem: ", end="", style="bold red")
        console.print(problem)
    if not findings["problems"]:
        console.print("all is well", style="bold green")


def _print_rows(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """A line a row, whatever the width: a terminal wraps it, a file keeps it whole."""
    width = max(len(name) for name, _ in rows)
    console.print(title, style="bold")
    for name, value in rows:
        console.print(Text.assemble((f"  {name.ljust(width)}", "dim"), f"  {value}"))
    console.print()


@dataclass(frozen=True)
class DoctorConfig:
    """What this installation has, which backend each op uses and why, and whether the ops compute rightly.

    The exit code is 0 if all is well, 1 if a self-test fails or something that is required is missing.
    """

    json: bool = False
    """Prints one JSON object instead of text."""
    self_test: bool = True
    """Compares each op with its definition in float64, which takes some seconds."""
    require: tuple[str, ...] = ()
    """What must be there: cpp, cuda, triton, pyav, torchcodec, dali, nvdec."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in self.require:
            check_choice("require", name, REQUIRABLE)


@dataclass(frozen=True)
class SelfTest:
    """The result of one op's test on one device."""

    op: str
    device: str
    backend: str
    case: str
    error: float
    """Largest deviation from the definition in float64; NaN where the op failed."""
    allowed: float
    seconds: float
    problem: str | None = None
    """What the op raised; None if it gave a result."""

    @property
    def ok(self) -> bool:
        """Whether the op gave a result, and a right one."""
        return self.problem is None and self.error <= self.allowed


def self_tests() -> Iterator[SelfTest]:
    """Runs every op on every device of this machine, by the backend that "auto" picks there."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for preset in PRESETS:
            config = LogMelConfig.preset(preset)
            backend = log_mel_backend(device)
            yield _timed(
                "log_mel", device, backend, preset, LOG_MEL_ALLOWED[backend], partial(_log_mel_error, config, device)
            )
        backend = info_nce_backend(device)
        for symmetric in (False, True):
            case = "loss and gradients" + (", symmetric" if symmetric else "")
            yield _timed(
                "bilinear_info_nce", device, backend, case, INFO_NCE_ALLOWED,
                partial(_info_nce_error, symmetric, device),
            )  # fmt: skip


def log_mel_backend(device: str) -> str:
    """The backend that "auto" means for float32 on this device."""
    compiled = {"cpu": "cpp", "cuda": "cuda"}[device]
    return "reference" if _library.missing_reason(compiled) else compiled


def info_nce_backend(device: str) -> str:
    """The backend that "auto" means for float32 on this device."""
    contexts = torch.zeros(2, 16, 32, device=device)
    problem = make_problem(contexts, contexts, torch.zeros(2, 32, 32, device=device), None)
    return pick_backend(problem, "auto")


def _timed(op: str, device: str, backend: str, case: str, allowed: float, error_of: Callable[[], float]) -> SelfTest:
    start, problem, error = time.perf_counter(), None, math.nan
    try:
        error = error_of()
    except Exception as raised:  # a broken installation raises anything: the others are still to be tested
        problem = f"{type(raised).__name__}: {raised}"
    return SelfTest(op, device, backend, case, error, allowed, time.perf_counter() - start, problem)


def _log_mel_error(config: LogMelConfig, device: str) -> float:
    """The largest error of log_mel on two clips: a rising tone with noise, and a shorter, softer one."""
    generator = torch.Generator().manual_seed(0)
    seconds = torch.arange(16_000, dtype=torch.float64) / 16_000
    tone = torch.sin(2 * math.pi * (200 + 1500 * seconds) * seconds)
    waveform = torch.stack([0.5 * tone, 0.1 * tone.flip(0)])
    waveform = (waveform + 0.01 * torch.randn(waveform.shape, generator=generator, dtype=torch.float64)).float()
    lengths = torch.tensor([16_000, 9_000])
    expected = log_mel_reference(waveform.double(), config, lengths)
    features = log_mel(waveform.to(device), config, lengths=lengths.to(device))
    return float((features.cpu().double() - expected).abs().max())


def _info_nce_error(symmetric: bool, device: str) -> float:
    """The largest error of a loss of four sub-tasks and of its gradients, each relative to the true norm."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 48, 40), (3, 48, 32), (4, 32, 40))  # contexts, targets, weights
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 for shape in shapes]
    pairs = [(0, 1), (1, 2), (2, 0), (0, 2)]

    def solve(tensors: list[Tensor], backend: str) -> list[Tensor]:
        contexts, targets, weights = leaves = [tensor.requires_grad_() for tensor in tensors]
        loss = bilinear_info_nce(contexts, targets, weights, pairs, scale=1.5, symmetric=symmetric, backend=backend)
        return [loss, *torch.autograd.grad(loss, leaves)]

    found = solve([tensor.float().to(device) for tensor in exact], "auto")
    expected = solve(exact, "reference")
    return max(
        float((a.detach().cpu().double() - b).norm() / b.norm())
        for a, b in zip(found, (value.detach() for value in expected), strict=True)
    )
