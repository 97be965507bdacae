"""The matrix products of the C++ losses, against float64: ragged shapes, both layouts of each factor, wide strides."""

from __future__ import annotations

import pytest
import torch
from info_nce_cases import CPP_MISSING
from torch import Tensor

pytestmark = pytest.mark.skipif(CPP_MISSING is not None, reason=f"no C++ kernels: {CPP_MISSING}")

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = [  # m, k, n: less than a tile of 6 x 64, whole tiles, one more, several blocks of k, of rows and of columns
    (1, 1, 1),
    (5, 2, 15),
    (6, 3, 64),
    (7, 31, 65),
    (48, 32, 17),
    (50, 33, 130),
    (241, 16, 63),
    (11, 513, 80),
    (300, 1100, 40),
    (13, 300, 1700),
]


def make_factor(rows: int, columns: int, dtype: torch.dtype, transposed: bool, seed: int) -> Tensor:
    """Normal numbers inside a wider matrix of NaN, row-major or column-major."""
    outer, inner = (columns, rows) if transposed else (rows, columns)
    wide = torch.full((outer + 1, inner + 3), torch.nan, dtype=dtype)
    wide[:outer, :inner] = torch.randn(outer, inner, generator=torch.Generator().manual_seed(seed))
    view = wide[:outer, :inner]
    return view.T if transposed else view


def skip_without_products(dtype: torch.dtype) -> None:
    if dtype == BF16 and not torch.ops.avppc.has_bfloat16_products():
        pytest.skip("this machine has no fast bfloat16 products (AMX or AVX512-BF16)")


def multiply(a: Tensor, b: Tensor, out: Tensor, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    torch.ops.avppc.product_cpu(a, b, out, alpha, beta)
    return out


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("layouts", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_products_are_exact_to_float32_sums(
    shape: tuple[int, int, int], layouts: tuple[bool, bool], dtype: torch.dtype
) -> None:
    skip_without_products(dtype)
    m, k, n = shape
    a, b = make_factor(m, k, dtype, layouts[0], 0), make_factor(k, n, dtype, layouts[1], 1)
    truth, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    for alpha, beta in ((1.0, 0.0), (0.7, 1.0), (-2.0, 0.25)):
        wide = torch.full((m, n + 5), torch.nan if beta == 0 else 3.0)  # beta == 0 reads nothing of it
        multiply(a, b, wide[:, :n], alpha, beta)
        error = (wide[:, :n].double() - (alpha * truth + (3.0 * beta if beta else 0.0))).abs()
        assert (error <= 2e-6 * (abs(alpha) * terms + 3.0 * beta)).all()
        expected_rest = torch.full((m, 5), torch.nan if beta == 0 else 3.0)
        torch.testing.assert_close(wide[:, n:], expected_rest, equal_nan=True)  # nothing behind a row is written


def test_bfloat16_products_keep_infinities_and_nan_to_their_rows() -> None:
    skip_without_products(BF16)
    a, b = torch.ones(9, 5, dtype=BF16), torch.ones(5, 70, dtype=BF16)
    a[2, 4], a[7, 0] = torch.inf, torch.nan
    expected = torch.full((9, 70), 5.0)
    expected[2], expected[7] = torch.inf, torch.nan
    for left, right in ((a, b), (a.T.contiguous().T, b.T.contiguous().T)):
        got = multiply(left, right, torch.empty(9, 70))
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_a_lower_level_has_no_bfloat16_products(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the losses multiply in float32 then, which the tests of each level rely on."""
    monkeypatch.setenv("AVPPC_CPU_LEVEL", level)
    try:
        assert not torch.ops.avppc.has_bfloat16_products()
    except RuntimeError as error:
        pytest.skip(str(error))
    with pytest.raises(RuntimeError, match="a must be float32, or bfloat16 where this machine multiplies it"):
        multiply(torch.ones(2, 2, dtype=BF16), torch.ones(2, 2, dtype=BF16), torch.empty(2, 2))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"a": torch.ones(4, 6, dtype=torch.float64)}, "a must be float32"),
        ({"b": torch.ones(6, 3, dtype=BF16)}, "b must be Float, got BFloat16"),
        ({"a": torch.ones(8, 12)[::2, ::2]}, "a must have a stride of 1, got 24 and 2"),
        ({"b": torch.ones(5, 3)}, r"a, b and out must have shapes \[m, k\], \[k, n\] and \[m, n\]"),
        ({"out": torch.ones(3, 4).T}, "out must be row-major"),
    ],
)
def test_what_it_cannot_multiply_is_refused(change: dict[str, Tensor], text: str) -> None:
    arguments = {"a": torch.ones(4, 6), "b": torch.ones(6, 3), "out": torch.empty(4, 3), **change}
    with pytest.raises(RuntimeError, match=text):
        multiply(**arguments)


@pytest.mark.parametrize("layouts", [(False, True), (True, False)], ids=str)
def test_the_sums_do_not_depend_on_the_threads(layouts: tuple[bool, bool]) -> None:
    a, b = make_factor(250, 600, F32, layouts[0], 0), make_factor(600, 700, F32, layouts[1], 1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(multiply(a, b, torch.empty(250, 700)))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[1:], [found[0], found[0]], rtol=0, atol=0)
