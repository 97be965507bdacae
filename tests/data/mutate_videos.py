"""Decodes many damaged copies of videos; run by test_mutations in a process of its own, which may crash or hang."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from avppc.data.decode import DecodeError, decode_clip, decode_clips


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Flips bits, overwrites or removes a span, or cuts the end off."""
    data = bytearray(content)
    kind = rng.integers(5)
    place = int(rng.integers(len(data)))
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        del data[place : place + int(rng.integers(1, 500))]
    elif kind == 2:
        span = int(rng.integers(1, 500))
        data[place : place + span] = rng.integers(0, 256, span, dtype=np.uint8).tobytes()
    else:
        # Half of the flips go into the headers, where they do most harm.
        header = data.find(b"moov") if rng.integers(2) else 0
        for _ in range(int(rng.integers(1, 8))):
            position = max(header, 0) + int(rng.integers(2_500)) if kind == 3 else int(rng.integers(len(data)))
            if position < len(data):
                data[position] ^= 1 << int(rng.integers(8))
    return bytes(data)


def main(paths: list[str], count: int) -> None:
    rng = np.random.default_rng(0)
    contents = [Path(path).read_bytes() for path in paths]
    outcomes: Counter[str] = Counter()
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
            outcomes["used"] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[2:], int(sys.argv[1]))
