"""Contact sheets: a strip of frames of each of some clips, to see at a glance what a data set holds."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from avppc.files import write_atomically

_TITLE_PIXELS = 14

Picture = NDArray[np.uint8]
"""[H, W] gray or [H, W, 3] red, green, blue; 0 to 255."""


def spread(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the numbers 0 to count - 1, evenly spread, with the first and the last; for count >= 1."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64))


def strip(frames: Sequence[Picture]) -> Picture:
    """Pictures of one height side by side."""
    return np.concatenate(frames, axis=1)


def write_contact_sheet(path: Path, strips: Iterable[tuple[str, Picture]]) -> None:
    """Writes a PNG of strips of one width, one below the other, each under its title."""
    parts = [part for title, picture in strips for part in (_title(title, picture), picture)]
    write_atomically(path, png_bytes(np.concatenate(parts)))


def png_bytes(picture: Picture) -> bytes:
    """The content of a PNG file."""
    content = io.BytesIO()  # given a path, the library would not say why a file could not be written
    Image.fromarray(picture).save(content, format="PNG", optimize=True)
    return content.getvalue()


def _title(text: str, picture: Picture) -> Picture:
    """A line of text as wide as the picture, and of its colours; of a long text the end, which tells most."""
    plain = text.encode("ascii", "replace").decode()  # the font at hand may have no others
    known = "".join(letter if letter.isprintable() else "?" for letter in plain)
    width = picture.shape[1]
    image = Image.new("L" if picture.ndim == 2 else "RGB", (width, _TITLE_PIXELS))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    while draw.textlength(known, font=font) > width - 4 and len(known) > 4:
        known = "..." + known[4:]
    draw.text((2, 1), known, fill="white", font=font)
    return np.asarray(image)
