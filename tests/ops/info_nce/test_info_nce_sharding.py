"""The loss modules under FSDP: sharded by two gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing
from sharding_worker import D, embeddings, work

from avppc.losses.bilinear_info_nce import BilinearInfoNCE
from avppc.losses.permutative_info_nce import PermutativeInfoNCE


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("sharding")
    torch.multiprocessing.spawn(work, (str(folder),), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("tasks", "dim"), [(1, 0), (3, 0), (2, 1)])
def test_parameters_made_on_the_meta_device_are_initialised_as_any(
    results: list[dict[str, Any]], tasks: int, dim: int
) -> None:
    expected = BilinearInfoNCE(D, D + 2, tasks=tasks, learn_scale=True, scale=2.0).state_dict()
    for result in results:
        torch.testing.assert_close(result[f"{tasks} tasks along {dim}"], dict(expected), rtol=0, atol=0)


def test_mixed_precision_of_parts_that_are_sharded_one_by_one(results: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    module = PermutativeInfoNCE(D).bfloat16()
    for rank, result in enumerate(results):
        expected = module(*[value.bfloat16() for value in embeddings(rank, 4)])
        assert result["bfloat16"] == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("how", ["fully_shard", "FullyShardedDataParallel"])
def test_a_learned_scale_is_sharded_and_its_gradient_averaged(results: list[dict[str, Any]], how: str) -> None:
    gradients = []
    for rank in range(2):
        module = BilinearInfoNCE(D, D, learn_scale=True)
        module(*embeddings(rank, 2)).backward()
        gradients.append(float(module.log_scale.grad))
    for result in results:
        assert result[how] == pytest.approx(sum(gradients) / 2, rel=1e-5)
