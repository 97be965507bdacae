"""The templates of the HTML pages, in the folders beside this file."""

from __future__ import annotations

from pathlib import Path

import jinja2


def page_environment() -> jinja2.Environment:
    """Where templates are looked up. Values put into them are escaped, and a missing one is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
