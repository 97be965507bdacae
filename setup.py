"""Builds the compiled parts with CMake (CMakeLists.txt has the source list) and puts them into the package.

AVPPC_CUDA=auto|0|1 (auto: where nvcc is found) and AVPPC_CUDA_ARCHS="80;90;100" choose what is built. AVPPC_SANITIZE=1
builds with AddressSanitizer and UndefinedBehaviorSanitizer; such a library loads only where theirs are preloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_tool(name: str) -> str | None:
    """Path of a program: the one installed beside this Python first, then the one on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


class CMakeBuild(build_ext):
    """Configures, builds (only what changed) and copies the products into the package."""

    def run(self) -> None:
        package = ROOT / "avppc" if self.inplace else Path(self.build_lib).resolve() / "avppc"
        sanitized = "-sanitized" if is_sanitized() else ""
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{sanitized}"
        cmake = find_tool("cmake")
        if cmake is None:
            raise RuntimeError("building avppc needs cmake >= 3.25: pip install cmake")
        subprocess.run([cmake, "-S", ROOT, "-B", build_dir, *configure_options()], check=True)
        subprocess.run([cmake, "--build", build_dir], check=True)
        for stale in (*package.glob("_C*.so"), *(package / "lib").glob("libavppc_*.so")):  # of another build
            stale.unlink()
        subprocess.run([cmake, "--install", build_dir, "--prefix", package], check=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "avppc"
        return [str(path) for path in (*package.glob("_C*.so"), *package.glob("lib/*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def is_sanitized() -> bool:
    """Whether the sanitizers are asked for."""
    value = os.environ.get("AVPPC_SANITIZE", "0")
    if value not in ("0", "1"):
        raise ValueError(f"AVPPC_SANITIZE must be 0 or 1; got {value!r}")
    return value == "1"


def configure_options() -> list[str]:
    """What CMake cannot know by itself."""
    cuda = os.environ.get("AVPPC_CUDA", "auto")
    if cuda not in ("auto", "0", "1"):
        raise ValueError(f"AVPPC_CUDA must be auto, 0 or 1; got {cuda!r}")
    options = {
        "AVPPC_TORCH_DIR": str(Path(torch.__file__).parent),
        "AVPPC_TORCH_VERSION": torch.__version__,
        "AVPPC_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "AVPPC_PYBIND11_INCLUDE": pybind11.get_include(),
        "AVPPC_EXTENSION_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        "AVPPC_CUDA": cuda,
        "AVPPC_CUDA_ARCHS": os.environ.get("AVPPC_CUDA_ARCHS", "80;90;100"),
        "AVPPC_SANITIZE": str(int(is_sanitized())),
    }
    ninja = find_tool("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    return generator + [f"-D{name}={value}" for name, value in options.items()]


setup(ext_modules=[Extension("avppc._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
