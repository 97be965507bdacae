"""Texts of errors, for people."""

from __future__ import annotations

import re

_QUOTED = re.compile(r"\w*(?:Error|Exception): \S")
_SAYS_LITTLE = ("Could not load this library", "cannot open shared object file")


def one_line(error: BaseException) -> str:
    """The text of an error in one line: its first line, and where it quotes errors below it the one that tells most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    quoted = [line for line in lines[1:] if _QUOTED.match(line)]
    telling = [line for line in quoted if not any(text in line for text in _SAYS_LITTLE)]
    found = (telling or quoted or (lines[1:] if lines[0].endswith(":") else []))[:1]
    if not found:
        return lines[0]
    return f"{lines[0].removesuffix('Likely causes:').rstrip(' .:')}: {found[0]}"
