"""Confidence intervals of shares."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(share: float, trials: float) -> Interval:
    """Return Wilson's score interval of a share (Wilson 1927).

    Args:
        share: part of the trials that succeeded, 0 to 1.
        trials: how many independent trials there were, more than 0.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    spread = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    middle, scale = share + z**2 / (2 * trials), 1 + z**2 / trials
    # Rounding must not put a share of 0 or 1 outside its own interval.
    low, high = min((middle - spread) / scale, share), max((middle + spread) / scale, share)
    return Interval(share, max(low, 0.0), min(high, 1.0))
