"""Means with intervals that cover both the choice of labelled clips and the choice of test clips."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Student's t, two-sided 95%, by degrees of freedom 1 to 10
_STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def mean_and_interval(rates: Sequence[float], tested: int) -> tuple[float, float]:
    """Mean of the draws' rates (0 to 1) and the half-width of its 95% interval.

    Two independent parts are added in quadrature: Student's interval over the draws of the labelled clips (none for one
    draw), and the binomial interval of the test clips, which all draws share.
    """
    if not rates or tested < 1:
        raise ValueError(f"rates must hold at least one draw and tested be positive, got {len(rates)} and {tested}")
    mean = sum(rates) / len(rates)
    # Agresti and Coull's: two right and two wrong answers are added, so that 100% does not count as certain
    centre = (mean * tested + 2.0) / (tested + 4.0)
    half = 1.96 * math.sqrt(centre * (1.0 - centre) / (tested + 4.0))
    return mean, limited(mean, math.hypot(half, student_interval(rates)) if len(rates) > 1 else half)


def limited(rate: float, half: float) -> float:
    """The half-width of a rate's interval, no larger than any other rate may lie away: few draws may give far more."""
    return min(half, max(rate, 1.0 - rate))


def student_interval(rates: Sequence[float]) -> float:
    """Half-width of the 95% interval of the mean of two or more independent rates, by Student's distribution."""
    if len(rates) < 2:
        raise ValueError(f"rates must hold at least two, got {len(rates)}")
    mean, freedom = sum(rates) / len(rates), len(rates) - 1
    deviation = math.sqrt(sum((rate - mean) ** 2 for rate in rates) / freedom)
    student = _STUDENT_95[freedom - 1] if freedom <= len(_STUDENT_95) else 1.96 + 2.4 / freedom
    return student * deviation / math.sqrt(len(rates))
