"""Batch norm and ReLU as one operator: nearer to float64 than torch, on every instruction set, whatever the threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from avppc.ops import _library
from avppc.ops.batch_norm import MOST_CHANNELS, batch_norm_relu, batch_norm_relu_reference, has_fused_form

pytestmark = pytest.mark.skipif(
    not _library.has_cpp_ops(), reason=f"compiled operators: {_library.missing_reason('cpp')}"
)
SHAPES = [(1, 1, 1, 2), (5, 3, 7, 9), (40, 16, 5, 5), (9, 64, 4, 4), (7, 97, 6, 11), (2, 1024, 3, 3), (600, 2, 2, 1)]


def make_arguments(
    shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the upstream gradient."""
    numbers = torch.Generator().manual_seed(sum(shape))
    x, upstream = (torch.randn(shape, generator=numbers).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[1], generator=numbers) for _ in range(2))
    x = (x + mean).contiguous(memory_format=torch.channels_last)
    return x, weight, bias, upstream


def gradients(function, x: Tensor, weight: Tensor, bias: Tensor, upstream: Tensor) -> list[Tensor]:
    """y, mean, variance and the gradients of x, weight and bias."""
    leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
    results = function(*leaves)
    results[0].backward(upstream)
    return [*(value.detach() for value in results), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(level: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = make_arguments(shape, dtype)
    assert has_fused_form(*arguments[:3])
    got = gradients(batch_norm_relu, *arguments)
    expected = gradients(batch_norm_relu_reference, *(value.double() for value in arguments))
    names = ("y", "mean", "variance", "dx", "dweight", "dbias")
    for name, value, truth in zip(names, got, expected, strict=True):
        rough = dtype == torch.bfloat16 and name in ("y", "dx")  # written in bfloat16: half a unit of its 8 bits
        tolerance = {"rtol": 2**-8, "atol": 1e-5} if rough else {"rtol": 2e-5, "atol": 2e-5}
        torch.testing.assert_close(value.double(), truth, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(4, 1, 1, 1)  # mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5
    y, mean, variance = batch_norm_relu(x, torch.tensor([2.0]), torch.tensor([1.0]), 0.5)
    assert (mean.item(), variance.item()) == (3.0, 3.5)
    assert y.flatten().tolist() == [0.0, 0.0, 1.0, 4.0]  # 2 (x - 3) / 2 + 1


def test_a_large_mean_costs_no_digits() -> None:
    x, weight, bias, upstream = make_arguments((64, 16, 8, 8), torch.float32, mean=5000.0)
    _, mean, variance, *_ = gradients(batch_norm_relu, x, weight, bias, upstream)
    exact = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(variance.double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), exact[1], rtol=1e-7, atol=0)


def test_the_bits_do_not_depend_on_the_threads() -> None:
    arguments = make_arguments((300, 16, 9, 9), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(gradients(batch_norm_relu, *arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(value, same) for value, same in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float, dtype: torch.dtype) -> None:
    x, weight, bias, upstream = make_arguments((5, 3, 7, 9), dtype)
    x[2, 1, 3, 4] = bad
    y, mean, variance, dx, *_ = gradients(batch_norm_relu, x, weight, bias, upstream)
    for value in (y[:, 1], variance[1], dx[:, 1]):
        assert value.isnan().all()
    assert not mean[1].isfinite()
    for value in (y[:, ::2], mean[::2], variance[::2], dx[:, ::2]):  # the other channels are as they were
        assert value.isfinite().all()


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 3, 4, 5).double().contiguous(memory_format=torch.channels_last),
        torch.zeros(2, 3, 4, 5),
        torch.zeros(2, 3, 4),
        torch.zeros(1, 3, 1, 1).contiguous(memory_format=torch.channels_last),
        torch.zeros(2, MOST_CHANNELS + 1, 1, 2).contiguous(memory_format=torch.channels_last),
    ],
    ids=["float64", "channels first", "three dimensions", "one number a channel", "channels"],
)
def test_what_torch_takes(x: Tensor) -> None:
    assert not has_fused_form(x, torch.ones(x.shape[1]), torch.zeros(x.shape[1]))


def test_plain_torch_takes_what_is_transformed() -> None:
    x, weight, bias, _ = make_arguments((5, 3, 7, 9), torch.float32)

    def total(x: Tensor) -> Tensor:
        return batch_norm_relu(x, weight, bias)[0].square().sum()

    x.requires_grad_()
    (expected,) = torch.autograd.grad(total(x), x)
    torch.testing.assert_close(torch.func.grad(total)(x.detach()), expected, rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused() -> None:
    x, weight, bias, _ = make_arguments((5, 3, 7, 9), torch.float32)
    y, *_ = batch_norm_relu(x.requires_grad_(), weight, bias)
    with pytest.raises(RuntimeError, match="batch_norm_relu has no second derivative; take batch_norm_relu_reference"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_torch_agrees() -> None:
    x, weight, bias, upstream = make_arguments((40, 16, 5, 5), torch.float32)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (functional.relu(functional.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)),)

    y, *expected = gradients(plain, x, weight, bias, upstream)
    got = gradients(batch_norm_relu, x, weight, bias, upstream)
    torch.testing.assert_close([got[0], *got[3:]], [y, *expected], rtol=1e-4, atol=1e-4)
    assert got[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(4, 3).double()}, "x must be Float, got Double"),
        ({"x": torch.zeros(3)}, "x must have at least 2 dimensions and not be empty"),
        ({"x": torch.zeros(0, 3)}, "x must have at least 2 dimensions and not be empty"),
        ({"x": torch.zeros(3, 4).T}, "x must be contiguous"),
        ({"x": torch.zeros(2, 1025)}, "x must have at most 1024 channels, got 1025"),
        ({"weight": torch.ones(4)}, r"weight must have shape \[3\]"),
        ({"bias": torch.ones(3).double()}, "bias must be Float, got Double"),
    ],
    ids=["dtype", "dimensions", "empty", "strides", "channels", "weight", "bias"],
)
def test_the_operator_looks_before_it_reads(change: dict[str, Tensor], text: str) -> None:
    arguments = {"x": torch.zeros(4, 3), "weight": torch.ones(3), "bias": torch.zeros(3)} | change
    with pytest.raises(RuntimeError, match=text):
        torch.ops.avppc.batch_norm_relu(*arguments.values(), 1e-5)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dy": torch.zeros(4, 3).bfloat16()}, "dy must be Float, got BFloat16"),
        ({"dy": torch.zeros(3, 3)}, "dy must have as many numbers as x"),
        ({"variance": torch.ones(2)}, r"variance must have shape \[3\]"),
    ],
    ids=["dtype", "size", "variance"],
)
def test_the_backward_operator_looks_before_it_reads(change: dict[str, Tensor], text: str) -> None:
    arguments = {name: torch.zeros(4, 3) for name in ("dy", "x")}
    arguments |= {name: torch.ones(3) for name in ("weight", "bias", "mean", "variance")}
    with pytest.raises(RuntimeError, match=text):
        torch.ops.avppc.batch_norm_relu_backward(*(arguments | change).values(), 1e-5)


def test_opcheck() -> None:
    x, weight, bias, dy = make_arguments((5, 3, 7, 9), torch.float32)
    rows, dy_rows = (value.permute(0, 2, 3, 1).contiguous() for value in (x, dy))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.avppc.batch_norm_relu.default, (rows, weight, bias, 1e-5), test_utils=tests)
    backward = (dy_rows, rows, weight, bias, torch.zeros(3), torch.ones(3), 1e-5)
    torch.library.opcheck(torch.ops.avppc.batch_norm_relu_backward.default, backward, test_utils=tests)
