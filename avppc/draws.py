"""Random draws tied to clips: pure functions of (seed, number of the draw, place of the clip in the whole batch).

So a clip is varied alike however the batch is dealt out over processes or cut into parts, and on every device: the
numbers are made by splitmix64 in integer arithmetic where they are used, without a copy from the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from avppc.checks import MAX_SEED, check_integer

_MASK = (1 << 64) - 1
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BYTES = 0x00FF00FF00FF00FF
_PLACES = 1 << 40  # of one element; the next element of the same clip comes after them


class ClipGenerator(torch.Generator):
    """A generator for clips `first` to `first + count - 1` of a batch, which gets the same numbers however it is split.

    It is a torch.Generator, too: what is drawn from it by torch's own functions is the same for every part of a batch.
    """

    def __new__(cls, seed: int, first: int, count: int) -> ClipGenerator:
        return super().__new__(cls)

    def __init__(self, seed: int, first: int, count: int) -> None:
        check_integer("seed", seed, 0, MAX_SEED)
        check_integer("first", first, 0, _PLACES - 1)
        check_integer("count", count, 1, _PLACES - first)
        self.manual_seed(seed)
        self.seed_number = seed
        self.first = first
        self.count = count
        self.draws = 0
        """Calls so far; each call gives other numbers."""

    def of(self, rows: slice) -> ClipGenerator:
        """A new generator for these of the clips, with the draws that they have here from the first call on."""
        start, stop, _ = rows.indices(self.count)
        return ClipGenerator(self.seed_number, self.first + start, stop - start)


def uniform(count: int, low: float, high: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """[count] float32 from low (included) to high.

    Args:
        count: rows; with a ClipGenerator one or several times its clips, one block of all clips after the other.
    """
    words = keys(count, generator, device)
    return (words.bitwise_right_shift(40) & 0xFFFFFF).to(torch.float32) * ((high - low) / (1 << 24)) + low


def integers(count: int, low: int, high: Tensor | int, generator: torch.Generator, device: torch.device) -> Tensor:
    """[count] int64 from low to high, both included; high may be [count], one for each row."""
    return ((high - low + 1) * uniform(count, 0.0, 1.0, generator, device)).long() + low


def noise(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """[count, ...] float32 of mean 0 and variance 1; a row's values depend on its own clip alone."""
    return noise_of(keys(shape[0], generator, device), shape)


def noise_of(key: Tensor, shape: Sequence[int]) -> Tensor:
    """Noise of mean 0 and variance 1, a row for each key [count]: sums of four random bytes, nearly normal."""
    count, size = shape[0], math.prod(shape[1:])
    words = -(-size // 2)
    numbers = torch.arange(words, device=key.device).mul_(_signed(_GOLDEN))
    word = _splitmix64(key[:, None] + numbers)
    # Sums of two bytes in four lanes of 16 bits, then of four bytes in the lower two.
    pairs = (word & _BYTES).add_(word.bitwise_right_shift_(8).bitwise_and_(_BYTES))
    sums = pairs.add_(pairs.bitwise_right_shift(32)).view(torch.int16).view(count, words, 4)[..., :2]
    mean, deviation = 4 * 127.5, math.sqrt(4 * (256**2 - 1) / 12)
    return sums.reshape(count, 2 * words)[:, :size].to(torch.float32).sub_(mean).div_(deviation).view(*shape)


def keys(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """[count] int64: 64 random bits for each row, new ones at each call."""
    if not isinstance(generator, ClipGenerator):
        seed = int(torch.randint(0, 1 << 62, (), generator=generator))
        generator = ClipGenerator(seed, 0, count)
    blocks, rest = divmod(count, generator.count)
    if rest or not blocks:
        raise ValueError(f"count must be a multiple of the generator's {generator.count} clips, got {count}")
    start = splitmix64(splitmix64(generator.seed_number) ^ generator.draws)
    generator.draws += 1
    places = torch.arange(generator.first, generator.first + generator.count, device=device)
    if blocks > 1:
        places = (torch.arange(blocks, device=device).mul_(_PLACES)[:, None] + places).flatten()
    return bits_of(start, places)


def bits_of(start: int, numbers: Tensor) -> Tensor:
    """64 random bits for each of the numbers (int64, which they replace): splitmix64 that many steps after `start`."""
    return _splitmix64(numbers.mul_(_signed(_GOLDEN)).add_(_signed(start)))


def splitmix64(state: int) -> int:
    """One step of the generator splitmix64: 64 random bits out of a state of 64 bits."""
    mixed = (state + _GOLDEN) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * _MIX1) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * _MIX2) & _MASK
    return mixed ^ (mixed >> 31)


def _splitmix64(state: Tensor) -> Tensor:
    """The same for int64 tensors, in place: they wrap round, but their right shift keeps the sign."""
    state += _signed(_GOLDEN)
    for shift, factor in ((30, _MIX1), (27, _MIX2), (31, None)):
        state ^= state.bitwise_right_shift(shift).bitwise_and_((1 << (64 - shift)) - 1)
        if factor is not None:
            state *= _signed(factor)
    return state


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
