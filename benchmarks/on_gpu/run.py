"""Run phases one after another within a budget of seconds, and end with a verdict a line."""

from __future__ import annotations

import faulthandler
import importlib
import itertools
import sys
import time
from collections import Counter
from collections.abc import Mapping

import torch

from benchmarks import record
from benchmarks.on_gpu.phase import Phase, Verdict

GRACE = 60  # seconds after the budget; what hangs longer is ended


def run(seconds: Mapping[str, float], budget: float) -> int:
    """The exit code: 1 if something was wrong.

    Args:
        seconds: of each phase, in proportion; what one does not use is the later ones'.
        budget: seconds of all phases together.
    """
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.dump_traceback_later(budget + GRACE, exit=True)
    torch.manual_seed(record.SEED)
    print("  ".join(f"{name} {value}" for name, value in record.where().items()))
    started, verdicts = time.monotonic(), []
    ends = itertools.accumulate(seconds.values())
    for name, end in zip(seconds, ends, strict=True):
        phase = Phase(name, started + budget * end / sum(seconds.values()))
        phase.attempt(name, lambda phase=phase: _module(phase.name).run(phase))
        verdicts += phase.verdicts
    faulthandler.cancel_dump_traceback_later()
    print(table(verdicts))
    cut = [verdict.phase for verdict in verdicts if verdict.status == "cut"]
    if cut:
        print(f"continue with --from {cut[0]}")
    return int(any(verdict.status == "FAILED" for verdict in verdicts))


def _module(name: str):
    """A phase's module, imported with the phase: one that cannot be imported fails alone."""
    return importlib.import_module(f"benchmarks.on_gpu.{name}")


def table(verdicts: list[Verdict]) -> str:
    """A line each, in columns, and how many of each status."""
    rows = [Verdict(*(field for field in Verdict._fields)), *verdicts]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    counts = Counter(verdict.status for verdict in verdicts)
    return "\n".join(["", *lines, "", ", ".join(f"{n} {name}" for name, n in counts.items())])
