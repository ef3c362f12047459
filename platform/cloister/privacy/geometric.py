"""Two-sided geometric noise for counts, drawn exactly.

Guarantees: P[Z = z] is proportional to exp(-epsilon·|z|/sensitivity), with no rounding: all is done in whole numbers,
from the operating system's generator. Counts of which one unit changes no more than `sensitivity`, all changes added
up, are epsilon-DP for it with such noise on each (Ghosh, Roughgarden and Sundararajan, "Universally Utility-Maximizing
Privacy Mechanisms", STOC 2009). The sampler is that of Canonne, Kamath and Steinke (arXiv 2004.00010, algorithms 1
and 2).
"""

from __future__ import annotations

import math
import secrets
from fractions import Fraction
from typing import Protocol


class RandomNumbers(Protocol):
    """`secrets.SystemRandom` and, in tests, `random.Random`."""

    def randrange(self, stop: int, /) -> int: ...


def noise(epsilon: float, sensitivity: int, source: RandomNumbers | None = None) -> int:
    """One draw.

    Raises:
        ValueError: a parameter outside its range.
    """
    if not 0.0 < epsilon < math.inf or sensitivity < 1:
        raise ValueError("epsilon is positive and finite, and the sensitivity at least 1")
    random = source or secrets.SystemRandom()
    rate = Fraction(epsilon) / sensitivity  # exactly what the float says
    while True:
        size = random.randrange(rate.denominator)
        if not _happens(size, rate.denominator, random):  # with probability exp(-size/denominator)
            continue
        while _happens(1, 1, random):
            size += rate.denominator
        size //= rate.numerator
        negative = random.randrange(2) == 1
        if size or not negative:  # zero has one sign
            return -size if negative else size


def standard_deviation(epsilon: float, sensitivity: int) -> float:
    """Of one draw; and no less for small ones than for the Laplace distribution that it is near to."""
    return math.sqrt(2.0) * sensitivity / epsilon


def _happens(numerator: int, denominator: int, random: RandomNumbers) -> bool:
    """True with probability exp(-numerator/denominator), of a fraction between 0 and 1."""
    tries = 1
    while random.randrange(denominator * tries) < numerator:
        tries += 1
    return tries % 2 == 1
