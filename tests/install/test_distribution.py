"""What an sdist and a wheel hold: everything that is tracked and belongs there, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

import avppc

ROOT = Path(__file__).parents[2]
# What a user of the sources has no use for: settings of the place where they are kept, and tables that were made.
LEFT_OUT = re.compile(r"\.[^/]+(/.*)?|results/.*")


@dataclass(frozen=True)
class Distribution:
    """What setuptools made of the tracked files, in a folder without anything else."""

    tracked: set[str]
    sdist: set[str]
    """Files of the sdist, below its one folder."""
    metadata: str
    """Its PKG-INFO."""
    wheel: set[str]
    """Files of the package as a wheel gets them, but for what is compiled."""


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("which files are tracked is known in a clone alone")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    place = tmp_path_factory.mktemp("distribution")
    source = place / "source"
    for name in tracked:
        if not LEFT_OUT.fullmatch(name):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    # What a working tree may hold besides.
    for name in ("avppc/lib/libavppc_cpu.so", "avppc/__pycache__/cli.cpython-311.pyc", "csrc/old.o", "tests/a.so"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"")
    command = ["setup.py", "-q", "build_py", "--build-lib", place / "wheel", "sdist", "--dist-dir", place / "dist"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *command], cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (archive,) = (place / "dist").iterdir()
    with tarfile.open(archive) as file:
        names = {member.name.partition("/")[2] for member in file if member.isfile()}
        metadata = file.extractfile(f"avppc-{avppc.__version__}/PKG-INFO")
        assert metadata is not None
        text = metadata.read().decode()
    wheel = {path.relative_to(place / "wheel").as_posix() for path in (place / "wheel").rglob("*") if path.is_file()}
    return Distribution(tracked, names, text, wheel)


def test_the_sdist_holds_what_is_tracked(distribution: Distribution) -> None:
    wanted = {name for name in distribution.tracked if not LEFT_OUT.fullmatch(name)}
    assert {"setup.py", "csrc/module.cpp", "avppc/py.typed", "tests/install/smoke.py"} <= wanted
    made = {"PKG-INFO", "setup.cfg"}
    extra = {name for name in distribution.sdist - wanted - made if not name.startswith("avppc.egg-info/")}
    assert wanted - distribution.sdist == set()
    assert extra == set()


def test_the_wheel_holds_the_whole_package_and_nothing_else(distribution: Distribution) -> None:
    package = {name for name in distribution.tracked if name.startswith("avppc/")}
    assert {"avppc/export/card.md.jinja", "avppc/evaluate/report/report.html.jinja", "avppc/py.typed"} <= package
    assert distribution.wheel - {"avppc/lib/libavppc_cpu.so"} == package


def test_the_version_has_one_place(distribution: Distribution) -> None:
    metadata = Parser().parsestr(distribution.metadata)
    assert metadata["Version"] == avppc.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    places = [
        name
        for name in distribution.tracked
        if name.endswith((".py", ".toml", ".txt", ".cfg", ".cpp", ".h"))
        and re.search(rf"version.{{0,12}}['\"]{re.escape(avppc.__version__)}['\"]", (ROOT / name).read_text(), re.I)
    ]
    assert places == ["avppc/_version.py"]


def test_extras_name_each_other_rightly(distribution: Distribution) -> None:
    metadata = Parser().parsestr(distribution.metadata)
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert {"crop", "export", "parquet", "dali", "codec", "synth", "bench", "dev"} <= extras
    requirements = metadata.get_all("Requires-Dist") or []
    for requirement in requirements:
        for named in re.findall(r"^avppc\[([^]]*)\]", requirement):
            assert set(named.split(",")) <= extras, requirement
    # An error of the program that says what to install says something that exists.
    for name in distribution.tracked:
        if name.startswith("avppc/") and name.endswith(".py"):
            for named in re.findall(r"avppc\[([a-z-]+)\]", (ROOT / name).read_text()):
                assert named in extras, (name, named)
