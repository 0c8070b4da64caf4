"""Run phases one after another within a budget of seconds, and end with a verdict a line."""

from __future__ import annotations

import faulthandler
import importlib
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping

import torch

from benchmarks import record
from benchmarks.on_gpu.phase import Phase, Verdict, missing

GRACE = 30  # seconds after the budget; what hangs longer is ended
LEAST = 60  # seconds that are worth a new process
_FAILED = "FIRST_GPU_FAILED"  # set for the process that goes on after a failure


def run(seconds: Mapping[str, float], budget: float, began: float) -> int:
    """The exit code: 1 if something was wrong.

    Args:
        seconds: of each phase, in proportion; what one does not use is the later ones'.
        budget: seconds of the process.
        began: when the process did, by `time.monotonic`; imports have taken time since.
    """
    sys.stdout.reconfigure(line_buffering=True)
    started, verdicts = time.monotonic(), []
    budget = max(budget - (started - began), 0.0)
    faulthandler.dump_traceback_later(budget + GRACE, exit=True)
    torch.manual_seed(record.SEED)
    print("  ".join(f"{name} {value}" for name, value in record.where().items()))
    needed = [0.0 if missing(name) else share for name, share in seconds.items()]
    ends = itertools.accumulate(needed)
    for name, end in zip(seconds, ends, strict=True):
        phase = Phase(name, started + budget * end / (sum(needed) or 1))
        if names := missing(name):
            phase.skip("packages", f"needs {' and '.join(names)}, not installed")
        else:
            phase.attempt(name, lambda phase=phase: _module(phase.name).run(phase))
        verdicts += phase.verdicts
        if not record.gpu_answers():
            left = budget - (time.monotonic() - started)
            _go_on_in_a_new_process(name, list(seconds), left, verdicts)
            break
    faulthandler.cancel_dump_traceback_later()
    print(table(verdicts))
    cut = [verdict.phase for verdict in verdicts if verdict.status == "cut"]
    if cut:
        print(f"continue with --from {cut[0]}")
    failed = any(verdict.status == "FAILED" for verdict in verdicts)
    return int(failed or _FAILED in os.environ)


def _go_on_in_a_new_process(
    name: str, names: list[str], left: float, verdicts: list[Verdict]
) -> None:
    """Replace this process: after an illegal access nothing more runs on the GPU in it."""
    later = names[names.index(name) + 1 :]
    if not later or left < LEAST:
        return
    print(table(verdicts), f"\nthe GPU does not answer any more: {later[0]} begins a new process")
    os.environ[_FAILED] = "1"
    again = ["--from", later[0], "--budget", str(left)]  # of a repeated option the last one counts
    os.execv(sys.executable, [sys.executable, *sys.argv, *again])


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
