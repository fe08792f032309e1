"""Means over seeds and their intervals by Student's t distribution, which supposes about normal deviations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over ``seeds`` seeds.

    Attributes:
        deviation: the standard deviation of a sample, with n - 1; None for a single value.
        interval: [low, high] in which the mean lies with 95 % confidence; None for a single value.
    """

    seeds: int
    mean: float
    deviation: float | None
    interval: tuple[float, float] | None

    def excludes_zero(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(count, mean, None, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = student_quantile(count - 1) * deviation / math.sqrt(count)
    return Estimate(count, mean, deviation, (mean - half, mean + half))


def student_quantile(freedom: int, level: float = LEVEL) -> float:
    """t with P(-t < T < t) = ``level`` for Student's T with so many degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # to the last digit of the angle
        angle = (low + high) / 2
        low, high = (angle, high) if _central_probability(angle, freedom) < level else (low, angle)
    return math.tan(low) * math.sqrt(freedom)


def _central_probability(angle: float, freedom: int) -> float:
    """P(-t < T < t) for t = tan(angle) √freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for power in range(2 + odd, freedom - 1, 2):
        term *= (power - 1) / power * math.cos(angle) ** 2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
