"""A phase of a run with little time: its deadline, its rows, its findings against its goals."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity

from abft_fast.errors import RunError
from benchmarks import record
from benchmarks.paired import Timing, Turns

MOST_KERNELS = 15  # of a call, in kernels.csv
NEEDS = {
    "large": ("bitsandbytes", "pydantic"),  # the weights, and the options that a plan is made for
    "streamed": ("bitsandbytes", "pydantic", "StaICC"),
}
"""Packages that a phase needs besides those of the models."""


def missing(phase: str) -> list[str]:
    """The packages that a phase needs and that are not installed."""
    return [name for name in NEEDS.get(phase, ()) if importlib.util.find_spec(name) is None]


class Verdict(NamedTuple):
    """A line of the last table.

    Attributes:
        phase: by name.
        what: was asked.
        found: in words.
        goal: in words.
        status: `met`, `missed`, `no goal`, `cut` for want of time or of a GPU that answers,
            `skipped` for want of a package or of memory, or `FAILED`, where something is wrong. On
            a CPU what is not wrong has `dry run`: its figures say nothing.
    """

    phase: str
    what: str
    found: str
    goal: str
    status: str


@dataclass
class Phase:
    """What a phase is given.

    Attributes:
        name: of the phase, and of its CSV.
        deadline: when it must begin nothing more, by `time.monotonic`.
        verdicts: what it has found.
        rounds: of the last contenders that were timed.
    """

    name: str
    deadline: float
    verdicts: list[Verdict] = field(default_factory=list)
    rounds: int = 0

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.deadline

    def row(self, cells: Mapping[str, object]) -> None:
        """Write a row, at once."""
        record.append(self.name, dict(cells))

    def say(self, what: str, found: str, goal: str = "", met: bool | None = None) -> None:
        """Hold a figure against its goal, if it has one."""
        status = {True: "met", False: "missed", None: "no goal"}[met]
        self._add(what, found, goal, status if record.GPU else "dry run")

    def skip(self, what: str, why: str) -> None:
        self._add(what, why, "", "skipped")

    def attempt(self, what: str, run: Callable[[], object]) -> None:
        """Run a part of the phase, unless time is over; what fails stops no other part."""
        if self.is_over:
            self._add(what, "not begun: no time was left", "", "cut")
            return
        if not record.gpu_answers():
            self._add(what, "not begun: the GPU does not answer any more", "", "cut")
            return
        try:
            run()
            if record.GPU:
                torch.cuda.synchronize()  # errors of kernels come late
        except (torch.OutOfMemoryError, RunError) as error:
            self.skip(what, str(error).strip().split("\n")[0][:200])
        except Exception as error:  # whatever a GPU nobody has met does
            traceback.print_exc()
            line = str(error).strip().split("\n")[0]
            self._add(what, f"{type(error).__name__}: {line}"[:200], "", "FAILED")
        gc.collect()  # outside the handlers: a traceback keeps tensors
        if record.GPU:
            with contextlib.suppress(RuntimeError):  # of a device that has failed, as said above
                torch.cuda.empty_cache()

    def profile(self, what: str, run: Callable[[], object]) -> None:
        """Write a row to kernels.csv for each of the kernels that take most of a call's time."""
        kind = "device" if record.GPU else "cpu"
        activity = ProfilerActivity.CUDA if record.GPU else ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            run()
            if record.GPU:
                torch.cuda.synchronize()
        micros = {e.key: getattr(e, f"self_{kind}_time_total") for e in profile.key_averages()}
        calls = {event.key: event.count for event in profile.key_averages()}
        for key in sorted(micros, key=lambda key: -micros[key])[:MOST_KERNELS]:
            record.append("kernels", {
                "phase": self.name, "what": what, "kernel": key[:80], "calls": calls[key],
                "us": round(micros[key]), "us_of_all": round(sum(micros.values())),
            })  # fmt: skip

    def timed(
        self,
        contenders: Mapping[str, Callable[[], object]],
        *,
        floor: str,
        baseline: str | None = None,
        rounds: int,
        setups: Mapping[str, Callable[[], object]] | None = None,
        clock: Callable[[Callable[[], object]], float] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> dict[str, Timing]:
        """Time contenders in turns after one untimed round; once at least, else until the deadline.

        Args:
            contenders: as the others, of `benchmarks.paired.compare`.
            scales: factors of the seconds of contenders that do a part of the work.
        """
        turns = Turns(contenders, setups, clock)
        for done in range(1 + rounds):
            if done >= 2 and self.is_over:
                break
            turns()
        turns.forget(1)
        self.rounds = min(map(len, turns.seconds.values()))
        for name, factor in (scales or {}).items():
            turns.seconds[name] = [factor * seconds for seconds in turns.seconds[name]]
        return turns.timings(floor, baseline)

    def _add(self, *cells: str) -> None:
        self.verdicts.append(Verdict(self.name, *cells))
        print("  ".join(filter(None, (self.name, *cells))))
