"""Which words are taken for which, and the order in which a picture shows them."""

from __future__ import annotations

import numpy as np
import pytest

from avppc.evaluate.lipreading.results import confusion_rates, most_confused, order_by_confusion


def test_words_taken_for_each_other_stand_side_by_side() -> None:
    generator = np.random.default_rng(0)
    groups = generator.permutation(np.repeat(np.arange(4), 3))
    counts = np.where(groups[:, None] == groups, generator.integers(20, 40, (12, 12)), 1)
    order = order_by_confusion(confusion_rates(counts.tolist()))
    assert sorted(order) == list(range(12))
    assert np.count_nonzero(np.diff(groups[order])) == 3


def test_closest_ends_of_groups_meet() -> None:
    rates = np.eye(4)
    for first, second, share in ((0, 1, 0.4), (2, 3, 0.3), (1, 3, 0.1)):
        rates[first, second] = rates[second, first] = share
    assert order_by_confusion(rates) == [0, 1, 3, 2]


def test_words_never_confused_keep_their_order() -> None:
    assert order_by_confusion(np.eye(6)) == list(range(6))


def test_confusion_rates_and_pairs() -> None:
    rates = confusion_rates([[6, 2, 0], [0, 0, 0], [5, 0, 5]])
    np.testing.assert_array_equal(rates, [[0.75, 0.25, 0], [0, 0, 0], [0.5, 0, 0.5]])
    pairs = most_confused(rates, ["a", "b", "c"], 5)
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "c"), ("a", "b")]
    assert (pairs[0].first_as_second, pairs[0].second_as_first) == (0.0, 0.5)
    with pytest.raises(ValueError, match=r"square table, got shape \(1, 2\)"):
        confusion_rates([[1, 2]])
