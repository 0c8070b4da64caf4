"""Contenders timed in turns: pytest-benchmark drives the rounds, each runs every contender once.

What disturbs a machine for seconds then disturbs all of them alike, so ratios within a round say
more than times. The order changes from round to round.
"""

from __future__ import annotations

import math
import random
import statistics
import time
import weakref
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


class Turns:
    """Contenders that take turns: every call is a round.

    Attributes:
        seconds: of each round, by contender.
    """

    def __init__(
        self,
        contenders: Mapping[str, Callable[[], object]],
        setups: Mapping[str, Callable[[], object]] | None = None,
        clock: Callable[[Callable[[], object]], float] | None = None,
    ):
        self.contenders, self.setups = contenders, setups or {}
        self.clock = clock or wall_seconds
        self.seconds: dict[str, list[float]] = {name: [] for name in contenders}
        self._order = list(contenders)
        self._random = random.Random(SEED)

    def __call__(self) -> None:
        self._random.shuffle(self._order)
        for name in self._order:
            if name in self.setups:
                self.setups[name]()
            self.seconds[name].append(self.clock(self.contenders[name]))

    def forget(self, rounds: int) -> None:
        """Leave out the first rounds, which warmed up."""
        self.seconds = {name: values[rounds:] for name, values in self.seconds.items()}

    def timings(
        self, floor: str | Mapping[str, str], baseline: str | None = None
    ) -> dict[str, Timing]:
        """By contender; `floor` and `baseline` as in `compare`."""
        found = {}
        for name, values in self.seconds.items():
            below = floor if isinstance(floor, str) else floor[name]
            found[name] = Timing(
                Spread.of(values),
                below,
                Spread.of(_ratios(values, self.seconds[below])),
                Spread.of(_ratios(self.seconds[baseline], values)) if baseline else UNKNOWN,
            )
        return found


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
    turns = Turns(contenders, setups, clock)
    benchmark.pedantic(turns, rounds=rounds, warmup_rounds=warmup_rounds, iterations=1)
    turns.forget(warmup_rounds)
    benchmark.extra_info["seconds"] = turns.seconds
    return turns.timings(floor, baseline)


def _ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(values, others, strict=True)]


def wall_seconds(run: Callable[[], object]) -> float:
    """Seconds until a call's work is done, the host's part included."""
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - started


def host_seconds(run: Callable[[], object], calls: int = 3) -> float:
    """Seconds until a call returns, its work on a GPU perhaps not done: the least of some calls."""
    found = []
    for _ in range(calls):
        _wait()
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)


def host_part(run: Callable[[], object]) -> str:
    """Say the host's part beside a GPU's time; nothing on a CPU, where there is no other time."""
    return f", host {host_seconds(run) * 1e6:.0f} us" if GPU else ""


def device_seconds(run: Callable[[], object]) -> float:
    """Seconds that a GPU works on a call; on a CPU the call's own.

    The GPU sleeps while the host queues the call's kernels, else the host would be timed. A call
    that waits for the GPU itself cannot be queued: its time has the host's part.
    """
    if not GPU:
        return wall_seconds(run)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for cycles in SLEEPS[:1] if run in _WAITING else SLEEPS:
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        begin.record()
        run()
        end.record()
        queued_in_time = not begin.query()
        torch.cuda.synchronize()
        if queued_in_time:
            break
    else:
        _WAITING.add(run)
    return begin.elapsed_time(end) / 1e3


SLEEPS = (1 << 22, 1 << 25, 1 << 28)  # cycles: at 1.7 GHz 2.5, 20 and 160 ms
_WAITING = weakref.WeakSet[Callable[[], object]]()  # calls for which no sleep was long enough


def _wait() -> None:
    if GPU:
        torch.cuda.synchronize()
