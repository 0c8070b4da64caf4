"""What large models take: the plan against the memory of a step, its time, and E2E's beside it.

    pytest benchmarks/large_models.py [-k 70b] [--rounds 2]

Random weights of a known shape at true size, in NF4 unless said otherwise, LoRA on W_Q and W_K. On
a GPU the process is limited to `cap_gb` of it and each gradient packs as many tokens as its plan
says will fit; on a CPU all are packed, and high-water marks are those of a fresh process. `eager`
is the original's way, one prompt at a time, and the baseline; E2E is the same packed pass to the
label's cross-entropy (paper, Table 2). Before anything is timed, eager, full and checkpointed
gradients must agree. What does not fit is a row too.
"""

from __future__ import annotations

from functools import partial

import pytest

from abft_fast.memory.measure import static_memory
from benchmarks.capped import (
    ARITHMETIC,
    EAGER,
    Capped,
    Planned,
    check,
    configuration,
    eager,
    limit_memory,
    loaded,
    plans,
    runs,
)
from benchmarks.paired import NOT_TIMED, Timing, compare
from benchmarks.peak_memory import in_fresh_process
from benchmarks.record import GPU, append, quick_first
from benchmarks.steps import Contender


def on_gpu(model: str, cap_gb: int, prompts: int = 16) -> Capped:
    return Capped(model, prompts, 150, bits=4, cap_gb=cap_gb)


CASES = (
    [
        on_gpu("llama3-70b", 48),
        on_gpu("qwen2.5-32b", 48),
        on_gpu("llama3-8b", 24, 32),
        on_gpu("llama3-56b", 48),
        on_gpu("qwen2.5-14b", 24, 32),
        on_gpu("qwen2.5-32b", 24),
        on_gpu("llama3-70b", 80),
        on_gpu("qwen2.5-32b", 80),
    ]
    if GPU
    else [
        Capped("qwen2.5-0.5b", 4, 150, layers=4, bits=4),
        Capped("qwen2.5-0.5b", 8, 150, layers=6, bits=4),
        Capped("qwen2.5-0.5b", 8, 150, bits=4),
        Capped("qwen2.5-0.5b", 8, 150, layers=6),
        Capped("qwen2.5-0.5b", 8, 150, layers=6, bits=8),
        Capped("gpt2-l", 8, 150, layers=8),
    ]
)
QUICK = CASES[:3] if GPU else CASES[:1]


def memory(case: Capped, ways: dict[str, Contender]) -> tuple[int, dict[str, int]]:
    """Bytes of the model, and of each way's step; for a fresh process."""
    step, static = loaded(case)
    return static, step.peaks(ways)


@pytest.mark.parametrize("case", quick_first(CASES, QUICK))
def bench_large_models(case, benchmark, rounds):
    # E2E needs the LM head that ABFT alone would not keep, and both run on one model.
    static = static_memory(case.config, configuration(case, "E2E"), ARITHMETIC)
    planned = plans(case, static.total)
    ways = {name: plan.contender for name, plan in planned.items() if plan} | {EAGER: eager}
    limit_memory(case.cap_gb)
    step, static_measured = loaded(case)
    running = {name: way for name, way in ways.items() if step and (not GPU or runs(step, way))}
    peaks, timings = {}, {}
    if running:
        check(step, running)
        if GPU:
            peaks = step.peaks(running)
        else:
            static_measured, peaks = in_fresh_process(memory, case, running)
        timings = compare(
            benchmark,
            {name: partial(step.run, way) for name, way in running.items()},
            floor="ABFT, local" if "ABFT, local" in running else next(iter(running)),
            baseline=EAGER if EAGER in running else None,
            rounds=rounds(2),
            setups={name: partial(step.set_up, way) for name, way in running.items()},
        )
    for name in [*planned, EAGER]:
        plan, timing = planned.get(name), timings.get(name)
        row = {
            "shape": case.model,
            "layers": case.config.num_hidden_layers,
            "bits": case.bits,
            "cap_gb": case.cap_gb or "",
            "prompts": case.prompts,
            "n": case.length,
            "contender": name,
            "fits": timing is not None,
            "tokens_at_once": ways[name].tokens if name in ways else 0,
            "static_planned": static.total - static.optimizer - static.gradients,
            "static_measured": static_measured if step else "",
            "step_planned": plan.step if plan else "",
            "step_measured": peaks.get(name, ""),
            **(timing or NOT_TIMED).columns(),
            "prompts_a_second": round(case.prompts / timing.seconds.p50, 3) if timing else "",
        }
        append("large_models", row)
        print(f"{case} {name:28} {said(plan, timing, peaks.get(name))}")


def said(plan: Planned | None, timing: Timing | None, peak: int | None) -> str:
    """A row in words."""
    if timing is None:
        return "does not fit"
    ratio = f", planned / measured {plan.step / peak:.2f}" if plan else ""
    return (
        f"{timing.seconds.p50:7.3f} s a step, {timing.speedup.p50:.2f} x as fast as eager, "
        f"{peak / 2**20:7.0f} MiB{ratio}"
    )
