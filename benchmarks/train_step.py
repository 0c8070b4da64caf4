"""What a step's gradient costs: ABFT, eager attention matrices, the pass without loss, E2E.

    pytest benchmarks/train_step.py [-k builtin] [--rounds 3]

Contenders are in step_contenders.py. Before anything is timed, those with the same loss must have
the same gradient. The floor is the time of the matrix products that no packed pass can leave out,
as far back as a gradient goes; a speed-up is over eager attention one prompt at a time,
the original's way. Most memory is beyond model and prompts.
"""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks import stored
from benchmarks.paired import compare
from benchmarks.peak_memory import in_fresh_process
from benchmarks.record import GPU, append, quick_first
from benchmarks.step_contenders import contenders, floor_of
from benchmarks.steps import Case, Step

CASES = (
    [
        Case("llama3-8b", 32, 150),
        Case("llama3-8b", 1, 2048, 64),
        Case("llama3-8b", 16, 600, 16),
        Case("qwen2.5-0.5b", 32, 150),
    ]
    if GPU
    else [
        Case("builtin"),
        Case("6x512", 32, 150),
        Case("6x512", 1, 4096),
        Case("6x512", 8, 600, 16),
        Case("24x512", 8, 150),
        Case("6x512", 8, 150),
        *(Case(model, 8) for model in stored.REAL),
    ]
)
QUICK = CASES if GPU else CASES[:2]
SAME = {  # contenders with one loss, the first the one compared with
    "eager, one by one": ("ABFT, full", "eager, padded"),
    "packed, no loss": ("padded, no loss",),
    "E2E, packed": ("E2E, padded", "E2E, TRL"),
}


def check(step: Step, ways: dict) -> float:
    """The largest error of gradients that should be the same.

    Padding tokens have hidden states too, so a pass without loss is only held against its packed
    twin where all prompts are of one length.
    """
    errors = []
    for reference, others in SAME.items():
        held = [
            name
            for name in others
            if name in ways and ("no loss" not in name or len(set(step.lengths)) == 1)
        ]
        if held:
            errors.append(step.check(ways[reference], {name: ways[name] for name in held}))
    return max(errors)


def peaks(case: Case) -> dict[str, int]:
    """Bytes of every contender; for a fresh process."""
    step = Step(case)
    return step.peaks(contenders(step))


@pytest.mark.parametrize("case", quick_first(CASES, QUICK))
def bench_train_step(case, benchmark, rounds):
    stored.skip_if_missing(case.model)
    step = Step(case)
    ways = contenders(step)
    error = check(step, ways)
    found = compare(
        benchmark,
        {name: partial(step.run, way) for name, way in ways.items()},
        floor={name: floor_of(name) for name in ways},
        baseline="eager, one by one",
        rounds=rounds(10 if GPU else 3),
        setups={name: partial(step.set_up, way) for name, way in ways.items()},
    )
    tokens, dtype = sum(step.lengths), next(step.model.parameters()).dtype
    prompts = len(step.prompts)
    if GPU:
        most = step.peaks(ways)
    else:
        del step, ways  # two copies of a large model may not fit
        most = in_fresh_process(peaks, case)
    for name, timing in found.items():
        row = {
            "model": case.model,
            "prompts": prompts,
            "tokens": tokens,
            "k": case.k,
            "dtype": str(dtype).removeprefix("torch."),
            "contender": name,
            **timing.columns(),
            "tokens_a_second": round(tokens / timing.seconds.p50),
            "peak_bytes": most[name],
            "gradient_error": f"{error:.1e}",
        }
        append("train_step", row)
        print(
            f"{case} {name:32} {timing.seconds.p50:7.3f} s, {timing.to_floor.p50:5.2f} x floor, "
            f"{timing.speedup.p50:5.2f} x as fast as eager, {most[name] / 2**20:6.0f} MiB"
        )
