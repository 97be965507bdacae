"""What bilinear_info_nce and BilinearInfoNCE refuse, and how they say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from avppc.ops.info_nce import bilinear_info_nce
from avppc.ops.info_nce_module import BilinearInfoNCE

C, U, N, M, DC, DZ, K = 2, 3, 4, 6, 5, 7, 3


def arguments(**changes: Any) -> dict[str, Any]:
    """Valid arguments with some changed."""
    valid = {
        "contexts": torch.ones(C, N, DC),
        "targets": torch.ones(U, M, DZ),
        "weights": torch.ones(K, DZ, DC),
        "pairs": [(0, 0), (1, 1), (1, 2)],
        "positive_offset": 2,
    }
    return {**valid, **changes}


def test_the_unchanged_arguments_are_valid() -> None:
    assert bilinear_info_nce(**arguments()).shape == ()


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"contexts": [[1.0]]}, TypeError, "contexts must be a torch.Tensor, got list"),
        ({"contexts": torch.ones(DC)}, ValueError, r"contexts must have shape \[C, N, Dc\] or \[N, Dc\], got \[5\]"),
        ({"contexts": torch.ones(C, 0, DC)}, ValueError, r"contexts must not be empty: .*got \[2, 0, 5\]"),
        ({"targets": torch.ones(U, 0, DZ)}, ValueError, r"targets must not be empty: .*got \[3, 0, 7\]"),
        ({"contexts": torch.ones(C, N, DC, dtype=torch.int64)}, TypeError, "contexts must have one of .*got int64"),
        ({"targets": torch.ones(U, M, DZ).double()}, TypeError, "targets must have dtype float32 .*got float64"),
        ({"targets": torch.ones(U, M, DZ, device="meta")}, ValueError, "targets must be on cpu .*got meta"),
        ({"weights": torch.ones(K, DC, DZ)}, ValueError, r"weights must have shape \[K, 7, 5\].*got \[3, 5, 7\]"),
        ({"weights": torch.ones(2, DZ, DC)}, ValueError, "3 pairs need 3 matrices, got 2"),
        ({"weights": torch.ones(K, DZ, DC).half()}, TypeError, "weights must have dtype float32 .*got float16"),
        ({"weights": None}, ValueError, "weights may be None only where .*widths 5 and 7"),
        ({"pairs": None}, ValueError, "pairs may be None only .*2 contexts, 3 targets and 3 weights"),
        ({"pairs": [(0, 0), (1, 1), (2, 2)]}, ValueError, "pairs must hold context indices from 0 to 1, got 2"),
        ({"pairs": [(0, 0), (1, -1), (1, 2)]}, ValueError, "pairs must hold target indices from 0 to 2, got -1"),
        ({"pairs": torch.ones(3, 2)}, TypeError, "pairs must hold integers, got dtype float32"),
        ({"pairs": torch.ones(3, 3, dtype=torch.int64)}, ValueError, r"pairs must have shape \[K, 2\].*got \[3, 3\]"),
        ({"positive_offset": 3}, ValueError, "positive_offset must be from 0 to M - N = 2 .*got 3"),
        ({"positive_offset": -1}, ValueError, "positive_offset must be from 0 to M - N = 2 .*got -1"),
        ({"positive_offset": 1.0}, TypeError, "positive_offset must be an int, got float"),
        ({"targets": torch.ones(U, N - 1, DZ)}, ValueError, "as many rows as contexts: got M = 3 < N = 4"),
        ({"symmetric": True}, ValueError, "symmetric needs as many targets as contexts: got M = 6 and N = 4"),
        ({"scale": "1"}, TypeError, "scale must be a number or a 0-d torch.Tensor, got str"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"scale": torch.ones(1)}, ValueError, r"scale must be a number or a 0-d tensor, got shape \[1\]"),
        ({"scale": torch.tensor(1)}, TypeError, "scale must have one of .*got int64"),
        ({"context_ids": torch.arange(N)}, ValueError, "must be given together; target_ids is None"),
        ({"target_ids": torch.arange(M)}, ValueError, "must be given together; context_ids is None"),
        (
            {"context_ids": torch.arange(N), "target_ids": torch.arange(N)},
            ValueError,
            r"target_ids must have shape \[6\], one id a row; got \[4\]",
        ),
        (
            {"context_ids": torch.ones(N), "target_ids": torch.arange(M)},
            TypeError,
            "context_ids must hold integers, got dtype float32",
        ),
        ({"reduction": "sum"}, ValueError, "reduction must be one of 'mean', 'task', 'none'; got 'sum'"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', .*; got 'cuda'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        bilinear_info_nce(**arguments(**changes))


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"context_dim": 0}, ValueError, "context_dim must be at least 1, got 0"),
        ({"target_dim": 2.0}, TypeError, "target_dim must be an int, got float"),
        ({"tasks": 2, "pairs": [(0, 0)] * 3}, ValueError, "tasks must be left out or equal the 3 pairs, got 2"),
        ({"tasks": 2, "task_weights": [1.0]}, ValueError, "task_weights must hold 2 weights, one a sub-task; got 1"),
        ({"scale": -1.0}, ValueError, "scale must be at least 0.0, got -1.0"),
        ({"margin": 1.0}, TypeError, "margin"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_module_settings_are_named(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        BilinearInfoNCE(**{"context_dim": DC, "target_dim": DZ, **settings})
