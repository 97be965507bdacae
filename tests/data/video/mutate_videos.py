"""Decodes many damaged copies of videos; run by test_mutations in a process of its own, which may crash or hang."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from avppc.data.video.decode import decode_clip, decode_clips
from avppc.data.video.reader import DecodedClip
from avppc.data.video.source import DecodeError


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Flips bits, overwrites or removes a span, swaps boxes, or cuts the end off."""
    data = bytearray(content)
    kind = rng.integers(6)
    place = int(rng.integers(len(data)))
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        del data[place : place + int(rng.integers(1, 500))]
    elif kind == 2:
        span = int(rng.integers(1, 500))
        data[place : place + span] = rng.integers(0, 256, span, dtype=np.uint8).tobytes()
    elif kind == 5 and (swapped := swap_boxes(content, rng)) is not None:
        return swapped
    else:
        # Half of the flips go into the headers, where they do most harm.
        header = data.find(b"moov") if rng.integers(2) else 0
        for _ in range(int(rng.integers(1, 8))):
            position = max(header, 0) + int(rng.integers(2_500)) if kind == 3 else int(rng.integers(len(data)))
            if position < len(data):
                data[position] ^= 1 << int(rng.integers(8))
    return bytes(data)


def swap_boxes(content: bytes, rng: np.random.Generator) -> bytes | None:
    """Swaps two neighbouring boxes of an mp4 on one level, or only their names; None where there are none."""
    found: list[list[tuple[int, int]]] = []

    def collect(start: int, end: int) -> None:
        level = []
        while start + 8 <= end:
            size = int.from_bytes(content[start : start + 4], "big")
            if size < 8 or start + size > end:
                return
            level.append((start, start + size))
            if content[start + 4 : start + 8] in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts"):
                collect(start + 8, start + size)
            start += size
        found.append(level)

    if content[4:8] != b"ftyp":
        return None
    collect(0, len(content))
    level = found[int(rng.integers(len(found)))]
    if len(level) < 2:
        return None
    first = int(rng.integers(len(level) - 1))
    (a, b), (c, d) = level[first], level[first + 1]
    if rng.integers(2):
        return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]
    names = content[a + 4 : a + 8], content[c + 4 : c + 8]
    return content[: a + 4] + names[1] + content[a + 8 : c + 4] + names[0] + content[c + 8 :]


def is_the_same(clip: DecodedClip, whole: DecodedClip) -> bool:
    """Whether a clip of a damaged file shows and sounds like that of the whole one."""
    video = np.abs(clip.video.numpy().astype(int) - whole.video.numpy())
    audio = np.abs(clip.audio.numpy().astype(int) - whole.audio.numpy())
    return float(video.mean((1, 2)).max()) < 2 and float(np.quantile(audio, 0.99)) < 500


def main(paths: list[str], count: int) -> None:
    rng = np.random.default_rng(0)
    contents = [Path(path).read_bytes() for path in paths]
    wholes = [{clip.start_frame: clip for clip in decode_clips(content)} for content in contents]
    outcomes: Counter[str] = Counter()
    kept: list[int] = []
    for number in range(count):
        damaged = mutate(contents[number % len(contents)], rng)
        print(f"mutation {number}", file=sys.stderr, flush=True)
        try:
            clips = list(decode_clips(damaged)) if number % 3 == 0 else [decode_clip(damaged)]
        except DecodeError:
            outcomes["refused"] += 1
        else:
            assert clips
            for clip in clips:
                assert clip.video.shape == (29, 96, 96)
                assert clip.audio.shape == (18_560,)
            whole = wholes[number % len(contents)]
            same = all(is_the_same(clip, whole[clip.start_frame]) for clip in clips if clip.start_frame in whole)
            outcomes["used" if same else "altered"] += 1
            if not same:
                kept.append(number)
    print(f"altered: {kept}", file=sys.stderr)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[2:], int(sys.argv[1]))
