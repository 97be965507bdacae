"""The templates of the HTML pages beside this file."""

from __future__ import annotations

from pathlib import Path

import jinja2


def page_environment() -> jinja2.Environment:
    """Where templates are looked up; what is put into them is escaped, and what is missing is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
