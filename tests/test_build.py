"""The compiled parts: what was built, that it loads, what the build refuses, and life without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avppc import _C, log_mel
from avppc.ops import _library

ROOT = Path(__file__).parents[1]
INFO = _C.build_info()
CUDA_LIBRARY = ROOT / "avppc" / "lib" / "libavppc_cuda.so"
needs_cuda_build = pytest.mark.skipif(
    INFO["cuda"] is None, reason="this build has no CUDA library (no nvcc, or AVPPC_CUDA=0)"
)
COMPILER = shutil.which("c++") or shutil.which("g++") or "c++"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_build_facts() -> None:
    assert INFO["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")
    assert "-Werror" in INFO["flags"]
    assert INFO["cpu_level"] in INFO["cpu_levels"]
    assert INFO["cpu_levels"][0] == "baseline"
    assert tuple(map(int, INFO["torch"].split("+")[0].split(".")[:2])) >= (2, 10)
    assert _library.build_info() == INFO
    assert (INFO["cuda"] is not None) == bool(INFO["cuda_architectures"]) == CUDA_LIBRARY.exists()


@pytest.mark.parametrize(("level", "text"), [("sse9", "AVPPC_CPU_LEVEL must be baseline, avx2 or avx512; got 'sse9'")])
def test_unknown_vector_extensions_are_refused(level: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVPPC_CPU_LEVEL", level)
    with pytest.raises(RuntimeError, match=text):
        _C.build_info()
    with pytest.raises(RuntimeError, match=text):
        log_mel(torch.zeros(1600), backend="cpp")


def test_a_vector_extension_that_was_asked_for_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVPPC_CPU_LEVEL", "baseline")
    assert _C.build_info()["cpu_level"] == "baseline"


def test_missing_reasons() -> None:
    assert _library.missing_reason("cpp") is None
    assert _library.has_cpp_ops()
    with pytest.raises(ValueError, match="part must be one of 'cpp', 'cuda', 'triton'; got 'metal'"):
        _library.missing_reason("metal")


def test_works_without_the_extension(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "avppc", tmp_path / "avppc", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    program = (
        "import sys, torch, avppc\n"
        "from avppc.ops import _library\n"
        "sys.modules['avppc._C'] = None\n"  # an editable install would find that of the source tree
        f"assert avppc.__file__.startswith({str(tmp_path)!r}), avppc.__file__\n"
        "assert _library.build_info() is None and not _library.has_cpp_ops()\n"
        "print(tuple(avppc.log_mel(torch.zeros(1600)).shape))\n"
        "avppc.log_mel(torch.zeros(1600), backend='cpp')\n"
    )
    (tmp_path / "program.py").write_text(program)  # a script finds the package beside it before any other
    result = run(sys.executable, "-W", "error", tmp_path / "program.py")
    assert result.stdout == "(10, 80)\n", result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last == (
        "RuntimeError: log_mel(backend='cpp') needs the compiled extension: libavppc_cpu.so was not built: "
        "run `pip install -e . --no-build-isolation` in the source tree"
    )


def test_an_unknown_choice_for_cuda_is_refused() -> None:
    result = run(sys.executable, ROOT / "setup.py", "build_ext", "--quiet", AVPPC_CUDA="yes")
    assert result.returncode != 0
    assert "AVPPC_CUDA must be auto, 0 or 1; got 'yes'" in result.stderr


def test_cuda_without_nvcc_fails_loudly_when_it_is_demanded(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=Path(sys.executable).parent) or shutil.which("cmake")
    assert cmake, "the tests need cmake, as the build does"
    options = {
        "AVPPC_CUDA": "1",
        "AVPPC_NVCC": "OFF",  # as if it had been looked for in vain
        "AVPPC_TORCH_DIR": Path(torch.__file__).parent,
        "AVPPC_TORCH_VERSION": torch.__version__,
        "AVPPC_PYTHON_INCLUDE": "/",
        "AVPPC_PYBIND11_INCLUDE": "/",
        "AVPPC_EXTENSION_SUFFIX": ".so",
    }
    result = run(cmake, "-S", ROOT, "-B", tmp_path, *(f"-D{name}={value}" for name, value in options.items()))
    assert result.returncode != 0
    assert "AVPPC_CUDA=1 needs nvcc" in result.stderr


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("#include <vector>\nvoid fill(std::vector<float>& x) { x.push_back(1.0f); }", True),
        (
            "namespace cpu_avx2 { template <typename T> T twice(T x) { return x + x; } template float twice(float); }",
            False,
        ),
        ("namespace { float twice(float x) { return x + x; } } float call(float x) { return twice(x); }", False),
    ],
)
def test_kernels_must_not_hold_inline_functions_of_others(tmp_path: Path, source: str, refused: bool) -> None:
    """The linker might keep the copy with AVX-512 for a machine that has none."""
    (tmp_path / "kernel.cpp").write_text(source)
    subprocess.run([COMPILER, "-O0", "-c", tmp_path / "kernel.cpp", "-o", tmp_path / "kernel.o"], check=True)
    cmake = shutil.which("cmake", path=Path(sys.executable).parent) or "cmake"
    script = ROOT / "cmake" / "check_kernel_objects.cmake"
    definitions = {"NM": "nm", "OBJECTS": tmp_path / "kernel.o", "OWN": "cpu_avx2", "STAMP": tmp_path / "stamp"}
    result = run(cmake, *(f"-D{name}={value}" for name, value in definitions.items()), "-P", script)
    assert (result.returncode != 0) == refused
    assert (tmp_path / "stamp").exists() != refused
    if refused:
        text = " ".join(result.stderr.split())  # CMake breaks its lines where the path ends them
        assert "holds inline functions that other code shares" in text
        assert "push_back" in text


@needs_cuda_build
def test_cuda_library_loads_beside_a_torch_with_cuda(tmp_path: Path) -> None:
    """A library with the one symbol that a CPU-only torch lacks stands in for libtorch_cuda.so."""
    (tmp_path / "stand_in.c").write_text(
        "int aoti_torch_get_current_cuda_stream(int d, void** s) { return *s = 0, d; }"
    )
    stand_in = tmp_path / "libtorch_cuda.so"
    subprocess.run(
        [COMPILER, "-xc", "-shared", "-fPIC", tmp_path / "stand_in.c", "-Wl,-soname,libtorch_cuda.so", "-o", stand_in],
        check=True,
    )
    program = (
        "import ctypes, os, torch, avppc\n"
        "if not torch.cuda.is_available():\n"
        f"    ctypes.CDLL({str(stand_in)!r}, mode=os.RTLD_NOW | os.RTLD_GLOBAL)\n"
        f"torch.ops.load_library({str(CUDA_LIBRARY)!r})\n"
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('avppc::log_mel', 'CUDA'))\n"
    )
    result = run(sys.executable, "-c", program)
    assert result.stdout == "True\n", result.stderr


@needs_cuda_build
def test_the_cuda_library_holds_the_architectures_it_names() -> None:
    """Machine code for each, and PTX of the newest alone, which later GPUs compile for themselves."""
    triton = pytest.importorskip("triton", reason="brings cuobjdump")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listings = [run(cuobjdump, option, CUDA_LIBRARY) for option in ("--list-elf", "--list-ptx")]
    assert [listing.returncode for listing in listings] == [0, 0]
    machine, portable = (set(re.findall(r"\.sm_(\d+)a?\.", listing.stdout)) for listing in listings)
    assert machine == set(INFO["cuda_architectures"])
    assert portable == {INFO["cuda_architectures"][-1]}


def test_cuda_work_is_ordered_in_the_callers_stream() -> None:
    """torch's own streams do not wait for the legacy one, in which the runtime's calls without a stream work."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.cu"))
    launches = re.findall(r"<<<(.*?)>>>", sources)
    assert launches
    assert all(re.search(r", stream$", launch) for launch in launches)
    copies = re.findall(r"(cudaMem(?:cpy|set)\w*)\((.*)\)", sources)
    assert copies
    for function, arguments in copies:
        assert function.endswith("Async"), function
        assert arguments.rstrip(")").endswith(", stream"), arguments


@needs_cuda_build
@pytest.mark.parametrize("architecture", INFO["cuda_architectures"])
def test_cuda_kernels_spill_no_registers(architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc, which built the CUDA library, is not on PATH")
    torch_include = Path(torch.__file__).parent / "include"
    result = run(
        nvcc, "-cubin", f"-arch=sm_{architecture}", "-std=c++20", "-O3", "-DUSE_CUDA=1", "-Xptxas=-v",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", torch_include, "-isystem",
        torch_include / "torch/csrc/api/include", ROOT / "csrc" / "log_mel.cu", "-o", tmp_path / "log_mel.cubin",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    kernels = [line for line in result.stderr.splitlines() if "spill stores" in line]
    assert len(kernels) == 3  # the transform in float and in double, and what needs the whole clip
    for line in kernels:
        assert line.strip() == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
