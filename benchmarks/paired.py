"""Contenders timed in turns: pytest-benchmark drives the rounds, each runs every contender once.

What disturbs a machine for seconds then disturbs all of them alike, so ratios within a round say
more than times. The order changes from round to round.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.record import GPU, SEED


class Spread(NamedTuple):
    """20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of any number of values; of one, itself thrice."""
        if len(values) == 1:
            return cls(*values * 3)
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(deciles[1], deciles[4], deciles[7])

    def columns(self, name: str) -> dict[str, str]:
        """Cells of a row, to four digits; those of a NaN are empty."""
        cells = (
            (key, "" if math.isnan(value) else f"{value:.4g}")
            for key, value in self._asdict().items()
        )
        return {f"{name}_{key}": cell for key, cell in cells}


UNKNOWN = Spread(math.nan, math.nan, math.nan)


class Timing(NamedTuple):
    """A contender's seconds, and its time over another's, round by round.

    Attributes:
        seconds: of one call.
        floor: the contender that does what cannot be left out.
        to_floor: time over the floor's; at least 1 if it is one.
        speedup: the baseline's time over this one's; NaN without a baseline.
    """

    seconds: Spread
    floor: str
    to_floor: Spread
    speedup: Spread

    @classmethod
    def alone(cls, seconds: Sequence[float]) -> Timing:
        """Of what took no turns with others."""
        return cls(Spread.of(seconds), "", UNKNOWN, UNKNOWN)

    def over_part(self, name: str, times: float) -> Timing:
        """Held against a floor of another name: the contender's, divided by a known number."""
        return self._replace(floor=name, to_floor=Spread(*(times * r for r in self.to_floor)))

    def columns(self) -> dict[str, object]:
        """Cells of a row."""
        return {
            **self.seconds.columns("seconds"),
            "floor": self.floor,
            **self.to_floor.columns("to_floor"),
            **self.speedup.columns("speedup"),
        }


NOT_TIMED = Timing(UNKNOWN, "", UNKNOWN, UNKNOWN)


def compare(
    benchmark,
    contenders: Mapping[str, Callable[[], object]],
    *,
    floor: str | Mapping[str, str],
    baseline: str | None = None,
    rounds: int,
    warmup_rounds: int = 1,
    setups: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Timing]:
    """Time contenders in turns.

    Args:
        benchmark: pytest-benchmark's fixture; its JSON keeps every round of every contender.
        contenders: functions by name.
        floor: a contender's name, or for each contender that of its own.
        baseline: contender whose time over each other's is a speed-up.
        rounds: how often each runs.
        warmup_rounds: how often each runs before, untimed; 0 where a check has run them all.
        setups: what to do before a contender, untimed.
        clock: seconds that a function takes; by default `wall_seconds`.
    """
    seconds = {name: [] for name in contenders}
    order = list(contenders)
    shuffle = random.Random(SEED).shuffle

    def one_round() -> None:
        shuffle(order)
        for name in order:
            if setups and name in setups:
                setups[name]()
            seconds[name].append((clock or wall_seconds)(contenders[name]))

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=warmup_rounds, iterations=1)
    seconds = {name: values[warmup_rounds:] for name, values in seconds.items()}
    benchmark.extra_info["seconds"] = seconds
    found = {}
    for name, values in seconds.items():
        below = floor if isinstance(floor, str) else floor[name]
        found[name] = Timing(
            Spread.of(values),
            below,
            Spread.of(_ratios(values, seconds[below])),
            Spread.of(_ratios(seconds[baseline], values)) if baseline else UNKNOWN,
        )
    return found


def _ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(values, others, strict=True)]


def wall_seconds(run: Callable[[], object]) -> float:
    """Seconds of a call; on a GPU between events around what it launches."""
    if not GPU:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
