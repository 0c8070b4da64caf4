"""The plane through a base and two solutions, in weights (paper, Eq. 2 and Figs 7 and 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

Coefficients = tuple[float, float]
"""Of solution E and of solution A: the base is (0, 0), the solutions are (1, 0) and (0, 1)."""


class Score(NamedTuple):
    """Accuracy, from 0 to 1, and the mean of -log p of the right label among the labels."""

    accuracy: float
    loss: float


def combined(
    coefficients: Coefficients, e: Mapping[str, Tensor], a: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what is added to the base's weights: coefficient times change, of both solutions."""
    total: dict[str, Tensor] = {}
    for coefficient, changes in zip(coefficients, (e, a), strict=True):
        if not coefficient:
            continue
        for name, change in changes.items():
            part = coefficient * change
            total[name] = total[name] + part if name in total else part
    return total


def path_points(count: int) -> list[Coefficients]:
    """Return points on the straight path from E to A, both ends among them."""
    steps = [i / (count - 1) for i in range(count)]
    return [(round(1 - step, 9), round(step, 9)) for step in steps]


def ray_points(count: int, last: float = 2.0) -> list[Coefficients]:
    """Return points on the ray from the base through A and beyond it."""
    return [(0.0, round(last * i / (count - 1), 9)) for i in range(count)]


def barrier(path: Sequence[Score]) -> Score:
    """Return how far the path is worse than the line between the scores of its ends, at most.

    An accuracy of 0.1 means that a point has 10 points less than the line; a loss of 0.1, that a
    point has 0.1 more. A path without a barrier has 0.
    """
    last = len(path) - 1

    def line(name: str, i: int) -> float:
        first, final = getattr(path[0], name), getattr(path[-1], name)
        return first + (final - first) * i / last

    accuracy = max(line("accuracy", i) - score.accuracy for i, score in enumerate(path))
    loss = max(score.loss - line("loss", i) for i, score in enumerate(path))
    return Score(accuracy, loss)
