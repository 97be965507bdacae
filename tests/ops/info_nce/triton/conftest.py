"""What every test in Triton's interpreter has: memory full of NaN, and products that are rounded once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=INTERPRETED)
def _nan_filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=INTERPRETED)
def multiplications(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many each tl.dot has done. It is summed in float64 and rounded once.

    The interpreter leaves it to numpy's BLAS, some of whose float32 kernels round the same row differently in blocks of
    different shapes: then the backward's logits are not the forward's, as they are on a GPU.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    counts: list[int] = []

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        counts.append(a.data.size * b.data.shape[1])
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    return counts
