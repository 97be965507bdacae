"""Small tensors kept between calls: whoever makes them first must not spoil them for the others."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from avppc import bilinear_info_nce
from avppc.ops import modes
from avppc.ops.info_nce.problem import make_problem
from avppc.ops.info_nce.triton.forward import plan_of

PAIRS = [(0, 1), (1, 0), (0, 0)]


def loss_of(x: torch.Tensor, scale: float) -> torch.Tensor:
    return bilinear_info_nce(x, x, pairs=PAIRS, scale=scale, reduction="none").sum()


def test_a_first_call_in_inference_mode_leaves_later_ones_differentiable() -> None:
    x = torch.randn(2, 5, 4, requires_grad=True)
    with torch.inference_mode():
        first = loss_of(x.detach(), 0.7123)
    second = loss_of(x, 0.7123)
    (gradient,) = torch.autograd.grad(second, x)
    assert torch.equal(first, second.detach())
    assert gradient.abs().max() > 0


def test_tensors_without_values_neither_keep_constants_nor_get_kept_ones() -> None:
    def own_pairs(scale: float) -> torch.Tensor:
        x = torch.randn(2, 5, 4)
        return bilinear_info_nce(x, x, scale=scale)

    own_pairs(0.7124)
    with FakeTensorMode():
        fake = own_pairs(0.7124)
        own_pairs(0.7125)
        leaf = torch.randn(2, 5, 4, requires_grad=True)
        bilinear_info_nce(leaf, torch.randn(2, 5, 4), torch.randn(2, 4, 4)).backward()
    assert fake.shape == ()
    assert leaf.grad is not None
    assert leaf.grad.shape == leaf.shape
    assert torch.isfinite(own_pairs(0.7125))


def test_scales_of_many_steps_do_not_pile_up() -> None:
    x = torch.randn(2, 5, 4)
    for step in range(200):
        loss_of(x, 1 + step / 1000)
    assert len(modes._kept["scale"]) <= modes._MOST_KEPT
    torch.testing.assert_close(loss_of(x, 1.5), loss_of(x, torch.tensor(1.5)))


def test_a_plan_once_kept_stays_for_the_cuda_graphs_that_read_it() -> None:
    x = torch.randn(2, 5, 4)
    problems = [make_problem(x, x, pairs=[(0, 1)] * tasks) for tasks in range(1, 100)]
    modes._kept.pop("plan", None)
    first, *_ = [plan_of(problem) for problem in problems]
    assert plan_of(problems[0]).sorted_tasks is first.sorted_tasks
    assert len(modes._kept["plan"]) == modes._MOST_KEPT
    assert torch.equal(plan_of(problems[-1]).sorted_tasks, torch.arange(99, dtype=torch.int32))
