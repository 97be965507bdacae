"""A picture of the crops of a packed data set, to be looked at before anything is trained on them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from avppc.clip import SAMPLES_PER_FRAME
from avppc.data.packed.dataset import PackedDataset
from avppc.files import write_atomically

_GAP_PIXELS = 2
_TITLE_PIXELS = 14
_SOUND_PIXELS = 16  # height of the strip below each row


def write_contact_sheet(dataset: PackedDataset, path: Path, *, rows: int = 12, columns: int = 10) -> None:
    """Writes a PNG: for some clips where they come from, and a row of their frames; below each frame how loud it is."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).round().astype(np.int64))
    frames = np.unique(np.linspace(0, dataset.shape.frames - 1, min(columns, dataset.shape.frames)).round().astype(int))
    strips = []
    for row in chosen:
        clip = dataset.batch(torch.tensor([int(row)]))
        video: NDArray[np.uint8] = clip.video[0].numpy()
        power = clip.audio[0].double().view(-1, SAMPLES_PER_FRAME).square().mean(1).sqrt().numpy()
        loudness = power / max(power.max(), 1.0)
        strip = np.concatenate([_with_sound(video[n], float(loudness[n])) for n in frames], axis=1)
        strips += [_title(dataset.sources[int(row)], strip.shape[1]), strip]
    sheet = np.concatenate(strips, axis=0)
    content = io.BytesIO()  # the library does not say why a file could not be written
    Image.fromarray(sheet).save(content, format="PNG")
    write_atomically(path, content.getvalue())


def _title(text: str, width: int) -> NDArray[np.uint8]:
    """A line of text, [_TITLE_PIXELS, width]; of a long one the end, which tells most."""
    plain = text.encode("ascii", "replace").decode()  # the font at hand may have no others
    known = "".join(letter if letter.isprintable() else "?" for letter in plain)
    image = Image.new("L", (width, _TITLE_PIXELS))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    while draw.textlength(known, font=font) > width - 4 and len(known) > 4:
        known = "..." + known[4:]
    draw.text((2, 1), known, fill=255, font=font)
    return np.asarray(image)


def _with_sound(
    image: NDArray[np.uint8],  # [H, W]
    loudness: float,  # 0 to 1
) -> NDArray[np.uint8]:
    """The picture above a bar as long as the sound is loud."""
    height, width = image.shape
    cell = np.zeros((height + _SOUND_PIXELS + _GAP_PIXELS, width + _GAP_PIXELS), np.uint8)
    cell[:height, :width] = image
    cell[height + 4 : height + 12, : round(loudness * width)] = 200
    return cell
