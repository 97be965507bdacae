"""The pages: their Python runs from top to bottom, their commands exist, their links lead somewhere.

A comment `<!-- setup ... -->` in a page holds Python that runs but is not shown.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from avppc import cli
from avppc.config import PretrainConfig
from avppc.files import write_json
from avppc.settings import config_to_dict

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "results").glob("**/README.md")),
    *sorted((ROOT / "benchmarks").glob("**/README.md")),
]
_BLOCK = re.compile(r"^```python\n(.*?)^```$|^<!-- setup\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
_SHELL = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_YAML = re.compile(r"^```yaml\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def python_of(page: Path, *, shown_alone: bool = False) -> str:
    """The page's Python, or what is shown of it, each line at its own number, so that an error names it."""
    text = page.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for match in _BLOCK.finditer(text):
        if shown_alone and match[1] is None:
            continue
        code = match[1] if match[1] is not None else match[2]
        first = text[: match.start()].count("\n") + 1
        lines[first : first + code.count("\n")] = code.splitlines()
    return "\n".join(lines)


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words of each `avppc ...` of the page, under torchrun too; not where `...` stands for some of them."""
    for block in _SHELL.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "torchrun" in words:
                words = words[words.index("-m") + 1 :]
            if words[:1] == ["avppc"] and len(words) > 2 and "..." not in words and not words[1].startswith("-"):
                yield words[1:]


def anchors_of(page: Path) -> set[str]:
    """What a link may name after #: the headings, as MkDocs makes anchors of them for docs/, and GitHub elsewhere."""
    headings = _HEADING.findall(_FENCED.sub("", page.read_text(encoding="utf-8")))
    kept = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+" if page.parent.name == "docs" else r"\s", "-", heading) for heading in kept}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_of_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(python_of(page), str(page), "exec")
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "__main__"})


def undefined_names(code: str) -> set[str]:
    """Names that the code reads and defines nowhere."""
    read, defined = set(), set(dir(builtins))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
    return read - defined


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_of_the_page_is_understood_without_what_is_hidden(page: Path) -> None:
    assert undefined_names(python_of(page, shown_alone=True)) == set()


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent in (ROOT, ROOT / "docs")], ids=name_of)
def test_code_of_the_page_fits_its_column(page: Path) -> None:
    """The site's column has 90 characters of code (assets/extra.css), GitHub's 103."""
    width = 90 if page.parent.name == "docs" else 103
    code = re.findall(r"^```(?:python|bash)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert [line for block in code for line in block.splitlines() if len(line) > width] == []


def write_settings(page: Path, folder: Path) -> None:
    """Writes the files of settings that the page shows or names into a folder."""
    for name, content in _YAML.findall(page.read_text(encoding="utf-8")):
        (folder / name).write_text(content, encoding="utf-8")
    for words in commands_of(page):
        for flag, value in itertools.pairwise(words):
            if flag == "--config" and value.endswith("/config.json"):
                (folder / value).parent.mkdir(parents=True)
                write_json(folder / value, config_to_dict(PretrainConfig(Path("data"), Path("out"))))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_the_page_are_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_settings(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, *flags in commands_of(page):
        assert name in cli.COMMANDS, name
        cli._parse(name, cli.COMMANDS[name], flags)  # raises SystemExit for a flag that is not there


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_the_page_lead_somewhere(page: Path) -> None:
    for target, anchor in _LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            linked = page.parent / target if target else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors_of(linked), f"{target}#{anchor}"


def test_the_pages_hold_what_is_tested() -> None:
    """The patterns above find what a reader sees."""
    readme = ROOT / "README.md"
    assert "bilinear_info_nce(contexts, targets, weights, pairs)" in python_of(readme)
    first = next(match for match in _BLOCK.finditer(readme.read_text(encoding="utf-8")) if match[1])
    assert "PermutativeInfoNCE(dim=128)(" in first[1]
    assert first.start() < 1000  # on the first screen
    assert undefined_names("import a\nb = a + c\ndef d(e): return e, len(f)") == {"c", "f"}
    assert {"prepare", "pretrain", "evaluate"} <= {name for name, *_ in commands_of(readme)}
    assert [name for name, *_ in commands_of(ROOT / "docs" / "scaling.md")].count("pretrain") >= 2  # under torchrun
    assert "where-is-the-mouth" in anchors_of(ROOT / "docs" / "your-data.md")
