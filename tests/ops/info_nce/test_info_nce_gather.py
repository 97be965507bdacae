"""gather="all" and "ring": G gloo processes under DistributedDataParallel equal one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing
from gather_worker import PAIR, GatherCase, Model, all_cases, group_cases, make_model, step, work
from info_nce_cases import CPP_MISSING

BACKENDS = ["reference"] if CPP_MISSING else ["reference", "cpp"]
CASES = all_cases(BACKENDS)


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda count: f"{count}-processes")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process computed."""
    folder = tmp_path_factory.mktemp(f"gather-{request.param}")
    torch.multiprocessing.spawn(work, (request.param, str(folder), BACKENDS), request.param)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_processes_equal_one_with_the_whole_batch(results: list[dict[str, Any]], case: GatherCase) -> None:
    check([result[str(case)] for result in results], case)


def check(got: list[dict[str, Any]], case: GatherCase) -> None:
    """Fails unless processes have the loss and the gradients of one with their whole batch."""
    expected = step(make_model(case, "none"), case, len(got))
    tolerances: dict[str, Any] = {torch.bfloat16: {"rtol": 3e-2, "atol": 3e-3}}.get(case.dtype, {})
    loss = torch.cat([one["loss"] for one in got], 1) if case.reduction == "none" else mean([g["loss"] for g in got])
    torch.testing.assert_close(loss, expected["loss"], **tolerances)
    for name in ("task_loss", "accuracy"):
        torch.testing.assert_close(mean([one[name] for one in got]), expected[name], **tolerances)
    for name in set(expected) - {"loss", "task_loss", "accuracy"}:
        for rank, one in enumerate(got):  # averaged by DistributedDataParallel: the same everywhere
            torch.testing.assert_close(one[name], expected[name], **tolerances, msg=f"rank {rank}: {name}")


@pytest.mark.parametrize("case", group_cases(BACKENDS), ids=str)
def test_a_group_equals_one_process_with_its_batch(results: list[dict[str, Any]], case: GatherCase) -> None:
    if len(results) == 3:
        check([results[rank]["groups"][str(case)] for rank in PAIR], case)
        check([results[1]["groups"][str(case)]], case)


def test_errors_in_a_group_name_the_ranks_of_all(results: list[dict[str, Any]]) -> None:
    if len(results) == 3:
        for rank in PAIR:
            assert "but N is 3 on rank 0 and 4 on rank 2;" in results[rank]["groups"]["uneven"]


def mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).mean(0)


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_uneven_batches_are_refused_on_every_rank(results: list[dict[str, Any]], gather: str) -> None:
    if len(results) == 1:
        assert f"uneven {gather}" not in results[0]
        return
    sizes = " and ".join(f"{3 + rank} on rank {rank}" for rank in range(len(results)))
    for result in results:
        message = f"gather={gather!r} needs the same call on every rank, but N is {sizes}; M is {sizes}"
        assert result[f"uneven {gather}"] == message


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_without_processes_it_is_the_plain_loss(gather: str) -> None:
    case = GatherCase(gather, "reference", torch.float64, symmetric=True)
    plain, gathered = (step(Model(case, how), case, 1) for how in ("none", gather))
    torch.testing.assert_close(gathered, plain, rtol=0, atol=0)
