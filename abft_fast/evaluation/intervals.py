"""Confidence intervals of shares."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054  # 97.5 % of a normal distribution lie below


def wilson(successes: int, count: int) -> tuple[float, float] | None:
    """Return the 95 % interval of a share (Wilson 1927); None where nothing was counted."""
    if not count:
        return None
    share, z2 = successes / count, Z_95**2
    center = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    half = Z_95 * spread / (1 + z2 / count)
    return max(center - half, 0.0), min(center + half, 1.0)
