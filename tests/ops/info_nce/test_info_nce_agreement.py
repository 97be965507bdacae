"""gather="all" and "ring" where processes differ: one error that names it, on all of them. And second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing
from agreement_worker import DISAGREEMENTS, second_derivatives, work


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes was told."""
    folder = tmp_path_factory.mktemp("agreement")
    torch.multiprocessing.spawn(work, (str(folder),), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_processes_that_differ_are_told_in_what(results: list[dict[str, Any]], name: str, gather: str) -> None:
    for rank, result in enumerate(results):
        own_gather = ("all", "ring")[rank] if name == "gather" else gather
        start = f"ValueError: gather={own_gather!r} needs the same call on every rank, but "
        assert result[f"{name} {gather}"].startswith(start)
        assert DISAGREEMENTS[name] in result[f"{name} {gather}"]


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("refused", "ValueError: weights must have shape "), ("refused element", "ValueError: v_future must have shape ")],
)
def test_nobody_waits_for_a_process_that_refuses_its_arguments(
    results: list[dict[str, Any]], name: str, text: str, gather: str
) -> None:
    waiting, refusing = (result[f"{name} {gather}"] for result in results)
    assert refusing.startswith(text)
    assert waiting == f"ValueError: gather={gather!r}: rank 1 refused its arguments, and says why"


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_those_who_promise_even_calls_are_asked_once(results: list[dict[str, Any]], gather: str) -> None:
    for result in results:
        assert "dtype is bfloat16 on rank 0 and float32 on rank 1" in result[f"first call {gather}"]
        assert result[f"second call {gather}"] == "nothing"


def test_second_derivatives_over_processes_are_those_of_one(results: list[dict[str, Any]]) -> None:
    expected = second_derivatives("none", "reference", None)
    got = [torch.cat(parts) for parts in zip(*[result["second derivatives"] for result in results], strict=True)]
    # each process's loss is the mean over its own half of the rows, so gradients are twice as large
    torch.testing.assert_close(got, [4 * value for value in expected])


@pytest.mark.parametrize(
    ("name", "text"), [("ring", "gather='ring'"), ("batch norm", "a batch norm over several processes")]
)
def test_second_derivatives_are_refused_where_there_are_none(
    results: list[dict[str, Any]], name: str, text: str
) -> None:
    for result in results:
        assert result[f"second derivatives {name}"].startswith(f"RuntimeError: {text} has no second derivative; ")


@pytest.mark.parametrize("gather", ["all", "ring"])
def test_transforms_do_not_pass_through_messages(results: list[dict[str, Any]], gather: str) -> None:
    for result in results:
        assert result[f"torch.func {gather}"].startswith(
            f"RuntimeError: gather={gather!r} has no torch.func transforms"
        )
