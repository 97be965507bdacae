"""Damaged and hostile files made from whole ones: bytes at random, and values inside JSON and safetensors headers."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

NUMBERS = (0, 1, -1, 2, 28, 29, 2**16, 2**31, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308)
TEXTS = (
    "",
    "x",
    "..",
    ".",
    "/",
    "a/../../b",
    "/etc/passwd",
    "\0",
    "\ud800",
    "ä" * 300,
    "1",
    "F32",
    "F4",
    "BF16",
    "F64",
)
OTHERS = (None, True, False, [], {}, [[]], [0, 8], [8, 0], [2**63, 2**64], {"a": 1}, float("nan"), float("inf"))
RAW = (
    b"[" * 60_000,
    b'{"a":' * 60_000,
    b"9" * 5_000,
    b"\xff\xfe\x00",
    b"\x00" * 64,
    b"\xef\xbb\xbf{}",
    b"1e999",
    b"nul",
    b'"\\ud800"',
    b"\n\n\r",
)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flips bits, overwrites, removes, repeats or inserts a span, or cuts the end off."""
    data = bytearray(content)
    place = rng.randrange(len(data) + 1)
    kind = rng.randrange(6)
    if kind == 0:
        del data[place:]
    elif kind == 1:
        del data[place : place + rng.randrange(1, 64)]
    elif kind == 2:
        data[place:place] = rng.choice(RAW)
    elif kind == 3:
        data[place:place] = data[place : place + rng.randrange(1, 200)]
    elif kind == 4:
        data[place : place + 8] = rng.randbytes(rng.randrange(9))
    else:
        for _ in range(rng.randrange(1, 5)):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def mutate_value(value: Any, rng: random.Random) -> Any:
    """The same JSON value with some of it replaced, removed, doubled or renamed."""
    changed = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        changed = _mutate_once(changed, rng)
    return changed


def _mutate_once(value: Any, rng: random.Random) -> Any:
    children = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not children or rng.random() < 0.1:
        return _replacement(value, rng)
    key = rng.choice(children)
    kind = rng.random()
    if kind < 0.7:
        value[key] = _mutate_once(value[key], rng)
    elif kind < 0.8:
        del value[key]
    elif isinstance(value, list):
        value.insert(rng.randrange(len(value)), copy.deepcopy(value[key]))
    else:
        value[rng.choice((*TEXTS, *map(str, children)))] = value.pop(key)
    return value


def _replacement(value: Any, rng: random.Random) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 8, -8, 640, 2**32))
    return copy.deepcopy(rng.choice((*NUMBERS, *TEXTS, *OTHERS)))


def dump(value: Any) -> bytes:
    """JSON as Python writes it, NaN, lone surrogates and all."""
    return json.dumps(value).encode()


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON file with hostile values, or with damaged bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(content, rng)
    return dump(mutate_value(json.loads(content), rng))


def mutate_lines(content: bytes, rng: random.Random) -> bytes:
    """A file of a JSON value a line, or of a text a line."""
    lines = content.splitlines()
    number = rng.randrange(len(lines))
    try:
        lines[number] = mutate_json(lines[number], rng)
    except ValueError:
        lines[number] = rng.choice(
            (mutate_bytes(lines[number], rng), *(text.encode("utf-8", "replace") for text in TEXTS))
        )
    return b"\n".join(lines) + b"\n"


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Length, JSON header or data of a safetensors file changed; a changed header keeps its length right, mostly."""
    kind = rng.random()
    if kind < 0.15:
        return mutate_bytes(content, rng)
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if kind < 0.25:
        return (
            rng.choice((*NUMBERS[:13], length + 1, len(content))).to_bytes(16, "little", signed=True)[:8]
            + header
            + data
        )
    value = json.loads(header)
    texts = value.get("__metadata__", {})
    inner = texts.get("avppc", "")
    if kind < 0.5 and inner.startswith("{"):
        texts["avppc"] = dump(mutate_value(json.loads(inner), rng)).decode()
    else:
        value = mutate_value(value, rng)
    if rng.random() < 0.1:
        data = mutate_bytes(data, rng)
    header = dump(value)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data
