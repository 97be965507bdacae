"""What bilinear_info_nce and BilinearInfoNCE refuse, and how they say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.ops.info_nce.op import bilinear_info_nce

C, U, N, M, DC, DZ, K = 2, 3, 4, 6, 5, 7, 3

WRONG_PAIRS: list[tuple[Any, type[Exception], str]] = [
    ([[0.5, 1.9]], TypeError, "pairs must hold integers, got 0.5"),
    ([[True, False]], TypeError, "pairs must hold integers, got True"),
    (torch.tensor([[0.5, 0.9]]), TypeError, "pairs must hold integers, got dtype float32"),
    (torch.ones(3, 2).numpy(), TypeError, "pairs must hold integers, got dtype float32"),
    ([], ValueError, r"pairs must have shape \[K, 2\].*got \[0, 2\]"),
    ([0, 0, 0], TypeError, r"pairs must hold pairs \(context index, target index\), got 0"),
    ([[0, 0, 0]], ValueError, r"pairs must hold two indices each .*got \[0, 0, 0\]"),
    ([[0, 0], [1]], ValueError, r"pairs must hold two indices each .*got \[1\]"),
    (["00", "11"], TypeError, "pairs must hold pairs .*got '00'"),
    (3, TypeError, r"pairs must be \[K, 2\] integers .*got int"),
]


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
        ({"pairs": torch.ones(3, 2, dtype=torch.bool)}, TypeError, "pairs must hold integers, got dtype bool"),
        *[({"pairs": pairs}, error, text) for pairs, error, text in WRONG_PAIRS],
        ({"pairs": torch.ones(3, 3, dtype=torch.int64)}, ValueError, r"pairs must have shape \[K, 2\].*got \[3, 3\]"),
        ({"positive_offset": 3}, ValueError, "positive_offset must be from 0 to M - N = 2 .*got 3"),
        ({"positive_offset": -1}, ValueError, "positive_offset must be from 0 to M - N = 2 .*got -1"),
        ({"positive_offset": 1.0}, TypeError, "positive_offset must be an int, got float"),
        ({"targets": torch.ones(U, N - 1, DZ)}, ValueError, "as many rows as contexts: got M = 3 < N = 4"),
        ({"symmetric": True}, ValueError, "symmetric needs as many targets as contexts: got M = 6 and N = 4"),
        ({"scale": "1"}, TypeError, "scale must be a number or a 0-d torch.Tensor, got str"),
        ({"scale": float("nan")}, ValueError, "scale must be finite in float32, got nan"),
        ({"scale": 1e39}, ValueError, r"scale must be finite in float32, got 1e\+39"),
        ({"scale": 10**400}, ValueError, "scale must be finite in float32, got 1000"),
        ({"symmetric": 1}, TypeError, "symmetric must be True or False, got 1"),
        ({"return_stats": "yes"}, TypeError, "return_stats must be True or False, got 'yes'"),
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
            "context_ids must have one of the dtypes int64, int32, int16, int8, uint8; got float32",
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
        ({"context_dim": 0}, ValueError, "context_dim must be from 1 to 1048576, got 0"),
        ({"target_dim": 2.0}, TypeError, "target_dim must be an int, got float"),
        ({"tasks": 2, "pairs": [(0, 0)] * 3}, ValueError, "tasks must be left out or equal the 3 pairs, got 2"),
        ({"tasks": 2, "task_weights": [1.0]}, ValueError, "task_weights must hold 2 weights, one a sub-task; got 1"),
        ({"scale": -1.0}, ValueError, "scale must be at least 0.0, got -1.0"),
        ({"margin": 1.0}, TypeError, "unexpected keyword argument 'margin'"),
        ({"scale": 1e39}, ValueError, "scale must be finite in float32, got 10?"),
        ({"scale": 10**400}, ValueError, "scale must be finite in float32, got 10?"),
        ({"symmetric": 1}, TypeError, "symmetric must be True or False, got 1"),
        ({"learn_scale": "no"}, TypeError, "learn_scale must be True or False, got 'no'"),
        ({"return_stats": None}, TypeError, "return_stats must be True or False, got None"),
        ({"task_weights": 3}, TypeError, "task_weights must hold one number a sub-task, got 3"),
        ({"pairs": [[-1, 0]]}, ValueError, "pairs must hold indices from 0, got -1"),
        *[({"pairs": pairs}, error, text) for pairs, error, text in WRONG_PAIRS],
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_module_settings_are_named(settings: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        BilinearInfoNCE(**{"context_dim": DC, "target_dim": DZ, **settings})


def test_normalizing_comes_after_the_checks() -> None:
    module = BilinearInfoNCE(DC, DZ, normalize="layer_norm")
    with pytest.raises(TypeError, match=r"contexts must be a torch.Tensor, got list"):
        module([[1.0]], torch.ones(N, DZ))
    with pytest.raises(TypeError, match=r"targets must have one of the dtypes .*got int64"):
        module(torch.ones(N, DC), torch.ones(N, DZ, dtype=torch.int64))
    with pytest.raises(TypeError, match="return_stats must be True or False, got 1"):
        module(torch.ones(N, DC), torch.ones(N, DZ), return_stats=1)


@pytest.mark.parametrize("autocast", [False, True])
def test_meta_tensors_give_the_shape_of_the_loss(autocast: bool) -> None:
    changes = {name: value.to("meta") for name, value in arguments().items() if isinstance(value, torch.Tensor)}
    with torch.autocast("cpu", enabled=autocast):
        loss = bilinear_info_nce(**arguments(**changes), reduction="none")
    assert (loss.device.type, loss.dtype, list(loss.shape)) == ("meta", torch.float32, [K, N])
