"""Nothing that is loaded can run code, and the packages that are installed are the ones that were tried."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from avppc.data.video.mesh import MODELS_PACKAGE

ROOT = Path(__file__).parents[1]
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__"}


def dangers(source: str) -> Iterator[str]:
    """What in a Python source can make code out of data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            yield from _dangers_of_call(node)


def _dangers_of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    options = {option.arg: ast.unparse(option.value) for option in node.keywords}
    if name in CALLS or name in ("os.system", "os.popen"):
        yield name
    if name in ("torch.load", "torch.save", "torch.jit.load", "torch.package.PackageImporter"):
        yield name
    if name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
        yield f"{name} without allow_pickle=False"
    if options.get("allow_pickle", "False") != "False" or options.get("shell", "False") != "False":
        yield f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", True),
        ("from pickle import loads", True),
        ("import torch\ntorch.load(path, weights_only=True)", True),
        ("np.load(path)", True),
        ("np.load(path, allow_pickle=True)", True),
        ("np.lib.format.open_memmap(path, allow_pickle=flag)", True),
        ("eval(text)", True),
        ("subprocess.run(text, shell=True)", True),
        ("model.eval(), ast.literal_eval(text), re.compile(text), np.load(path, allow_pickle=False)", False),
    ],
)
def test_dangers_are_seen(source: str, found: bool) -> None:
    assert bool(list(dangers(source))) == found


@pytest.mark.parametrize("folder", ["avppc", "examples", "benchmarks"])
def test_nothing_makes_code_out_of_data(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {str(path.relative_to(ROOT)): list(dangers(path.read_text(encoding="utf-8"))) for path in files}
    # settings in YAML are read by a SafeLoader, which makes plain values alone
    known = {"avppc/settings.py": ["yaml"]} if folder == "avppc" else {}
    assert {path: what for path, what in found.items() if what} == known
    assert "yaml.SafeLoader" in (ROOT / "avppc/settings.py").read_text(encoding="utf-8")


def pins(name: str) -> dict[str, str]:
    """Version of each package in a file of requirements; fails for a line that pins none."""
    found = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+_-]+)(?:\s*;.*)?", text)
        assert match is not None, f"{name}: {line!r} does not pin one version"
        assert canonicalize_name(match[1]) not in found, f"{name}: {match[1]} comes twice"
        found[canonicalize_name(match[1])] = match[2]
    return found


def test_every_package_that_the_tests_need_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in ("dev", "synth", "mesh"):
        needed += project["project"]["optional-dependencies"][extra]
    pinned = pins("requirements.txt")
    heads = next(name for name in project["project"]["optional-dependencies"]["heads"] if name.startswith("anny"))
    assert pins("requirements-mesh.txt") == dict(tuple(name.split("==")) for name in (MODELS_PACKAGE, heads))
    for requirement in map(Requirement, needed):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"requirements.txt lacks {requirement}"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{requirement}, pinned {pinned[name]}"


def test_the_packages_of_the_pages_are_pinned_and_no_other_versions_of_the_same() -> None:
    code, pages = pins("requirements.txt"), pins("requirements-docs.txt")
    assert pages
    assert {name: (code[name], pages[name]) for name in code.keys() & pages.keys() if code[name] != pages[name]} == {}
