"""How time and memory of a gradient grow with prompts, their length and the model's depth.

    pytest benchmarks/scaling.py [-k depth] [--rounds 3]

Random Llamas; all sizes of an axis, in every mode, take turns in one process. `inference` is the
packed pass without gradient or loss, the floor of each size. Before anything is timed, the modes
that follow the whole gradient must agree, and those of blocks must in the model's last layer, which
only its own loss reaches. Slopes are of log-log fits. Memory is counted, not timed, so claims
about it are checked: linear in tokens in every mode, and flat in depth in `local` and in N.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from abft_fast.core.attention import NAME
from benchmarks.exactness import relative_difference
from benchmarks.paired import compare
from benchmarks.peak_memory import in_fresh_process
from benchmarks.record import GPU, append
from benchmarks.rows import slope
from benchmarks.step_contenders import ours, packed_pass
from benchmarks.steps import Case, Contender, Step

WIDTH = 2048 if GPU else 256
PROMPTS, LENGTH, DEPTH = (64, 128, 8) if GPU else (8, 128, 8)  # where they are no axis
SIZES = {
    "prompts": [512, 256, 128, 64] if GPU else [32, 16, 8],
    "depth": [32, 16, 8, 4] if GPU else [16, 8, 4],
    "length": [16_384, 4096, 1024, 256] if GPU else [1024, 512, 256],
}
TOLERANCE = 5e-2 if GPU else 1e-4


def case_of(axis: str, size: int) -> Case:
    """An axis's case of one size."""
    depth = size if axis == "depth" else DEPTH
    prompts = {"prompts": size, "length": 4}.get(axis, PROMPTS)
    return Case(f"{depth}x{WIDTH}", prompts, size if axis == "length" else LENGTH)


def inference(step: Step) -> None:
    """The packed pass alone, without gradients."""
    with torch.no_grad():
        packed_pass(step)


MODES = {
    "inference": Contender(NAME, inference),
    "local": ours("local"),
    "N = 2": ours(2),
    "N = 4": ours(4),
    "full": ours("full"),
    "full, checkpointed": ours("full", checkpointing=True),
}


def check(step: Step) -> None:
    """Nothing is timed unless gradients are right."""
    full = step.gradient(MODES["full"])
    assert full.norm() > 0
    error = relative_difference(step.gradient(MODES["full, checkpointed"]), full)
    assert error <= TOLERANCE, f"checkpointed gradient differs by {error:.1e}"
    last = len(full) - len(full) // step.case.config.num_hidden_layers
    for mode in ("local", "N = 2", "N = 4"):
        error = relative_difference(step.gradient(MODES[mode])[last:], full[last:])
        assert error <= TOLERANCE, f"{mode}: the last layer's gradient differs by {error:.1e}"


def peaks(case: Case) -> dict[str, int]:
    """Bytes of each mode; for a fresh process."""
    return Step(case).peaks(MODES)


@pytest.mark.parametrize("axis", SIZES)
def bench_scaling(axis, benchmark, rounds):
    cases = {size: case_of(axis, size) for size in SIZES[axis]}
    steps = {size: Step(case) for size, case in cases.items()}
    check(steps[min(cases)])
    ways = {f"{size}, {name}": (steps[size], MODES[name]) for size in cases for name in MODES}
    timings = compare(
        benchmark,
        {key: partial(step.run, mode) for key, (step, mode) in ways.items()},
        floor={key: key.partition(", ")[0] + ", inference" for key in ways},
        rounds=rounds(5 if GPU else 3),
        setups={key: partial(step.set_up, mode) for key, (step, mode) in ways.items()},
    )
    found = {
        (size, name): timings[f"{size}, {name}"]._replace(floor="inference")
        for size in cases
        for name in MODES
    }
    memory = {
        size: steps[size].peaks(MODES) if GPU else in_fresh_process(peaks, case)
        for size, case in cases.items()
    }
    for (size, name), timing in found.items():
        case = cases[size]
        row = {
            "axis": axis, "size": size, "model": case.model, "prompts": case.prompts,
            "n": case.length, "contender": name, **timing.columns(),
            "peak_bytes": memory[size][name],
        }  # fmt: skip
        append("scaling", row)
    sizes = list(cases)
    for name in MODES:
        seconds = slope(sizes, [found[size, name].seconds.p50 for size in sizes])
        held = slope(sizes, [memory[size][name] for size in sizes])
        print(f"{axis}: {name:20} time ~ {axis}^{seconds:.2f}, memory ~ {axis}^{held:.2f}")
        if axis != "depth":
            assert 0.8 <= held <= 1.1, f"{name}: memory ~ {axis}^{held:.2f}, not linear"
        elif not name.startswith("full"):
            assert held <= 0.1, f"{name}: memory ~ depth^{held:.2f}, not flat"
