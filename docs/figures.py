"""mkdocs hook: figures and tables of results in the pages, from where they lie: the links hold on GitHub, too."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
SHOWN = (f"{RESULTS}/*/*.png", "results/*/table.html")


def on_files(files: Files, config: Any) -> Files:
    """Adds every figure and table to the site, under the path that it has in the repository."""
    for pattern in SHOWN:
        for shown in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, shown.relative_to(ROOT).as_posix(), abs_src_path=str(shown)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as the site has them: figures beside the pages; of a folder of results its table, or no link."""
    markdown = markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")
    return re.sub(r"\[([^]]*)\]\(\.\./(results/[\w-]+)\)", _to_table, markdown)


def _to_table(link: re.Match[str]) -> str:
    table = f"{link[2]}/table.html"
    return f"[{link[1]}]({table})" if (ROOT / table).exists() else link[1]
