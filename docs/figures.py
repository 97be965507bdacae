"""mkdocs hook: figures of `benchmarks/results` in the pages, from where they lie, so that links hold on GitHub too."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = "benchmarks/results"


def on_files(files: Files, config: Any) -> Files:
    """Adds every figure to the site, under the path that it has in the repository."""
    root = Path(config.config_file_path).parent
    for figure in sorted((root / RESULTS).glob("*/*.png")):
        path = str(figure.relative_to(root))
        files.append(File.generated(config, path, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to a figure as the site has it: beside the pages, not beside their folder."""
    return markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")
