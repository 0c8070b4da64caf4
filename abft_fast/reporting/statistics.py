"""Intervals of accuracies and of their difference, confusion and calibration.

A test asks each query twice, with other demonstrations. The two answers are not independent, so
intervals count queries, not prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from abft_fast.evaluation.intervals import LEVEL, Interval

_RESAMPLES = 10_000


class Bin(NamedTuple):
    """Prompts of similar confidence: how many, their mean confidence, and their accuracy."""

    prompts: int
    confidence: float
    accuracy: float


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], queries: Sequence[int]
) -> Interval:
    """Return how much the accuracy rose on the same prompts, by a paired bootstrap over queries.

    A resample draws queries with replacement, and each brings all its prompts, before and after. So
    queries that both sides answer alike add no spread.

    Args:
        before: whether each prompt was answered rightly before.
        after: the same after.
        queries: the query of each prompt.
    """
    gain = np.asarray(after, float) - np.asarray(before, float)
    _, owner = np.unique(np.asarray(queries), return_inverse=True)
    gains, prompts = np.bincount(owner, gain), np.bincount(owner)
    generator = np.random.default_rng(0)  # a report is the same each time
    means = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        drawn = generator.integers(len(gains), size=len(gains))
        means[i] = gains[drawn].sum() / prompts[drawn].sum()
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(gain.mean()), float(low), float(high))


def confusion(labels: Sequence[int], answers: Sequence[int], count: int) -> list[list[int]]:
    """Return how often each label, a row, was answered by each label, a column."""
    table = [[0] * count for _ in range(count)]
    for label, answer in zip(labels, answers, strict=True):
        table[label][answer] += 1
    return table


def calibration(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[Bin]:
    """Return the prompts by confidence, in bins of equal width; empty bins are left out."""
    filled = []
    places = [min(int(value * bins), bins - 1) for value in confidences]
    for place in sorted(set(places)):
        own = [i for i, where in enumerate(places) if where == place]
        confidence = sum(confidences[i] for i in own) / len(own)
        filled.append(Bin(len(own), confidence, sum(right[i] for i in own) / len(own)))
    return filled
