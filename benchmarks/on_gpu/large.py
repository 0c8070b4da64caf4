"""A model of 32B in NF4 under a cap of 48 GB: the plan against what a step takes, and its speed."""

from __future__ import annotations

from functools import partial

from benchmarks.on_gpu.phase import Phase
from benchmarks.on_gpu.steps import most_tokens
from benchmarks.record import GPU

CAP_GB = 48


def run(phase: Phase) -> None:
    phase.attempt("NF4", partial(measure, phase))


def measure(phase: Phase) -> None:
    from abft_fast.memory.measure import static_memory
    from abft_fast.memory.types import Flow
    from benchmarks.capped import (
        ARITHMETIC,
        EAGER,
        Capped,
        check,
        configuration,
        eager,
        limit_memory,
        loaded,
        plan,
    )

    case = Capped("qwen2.5-32b", 32, 150, bits=4, cap_gb=CAP_GB)
    if not GPU:
        case = Capped("5x128", 4, 30, bits=4)
    flows = {"ABFT, local": Flow("local"), "ABFT, full, checkpointing": Flow("full", True)}
    static = static_memory(case.config, configuration(case, "ABFT"), ARITHMETIC)
    # The LM head stays on this model; a run would cut it to the label words' rows.
    plans = {name: plan(case, static.total, "ABFT", flow) for name, flow in flows.items()}
    limit_memory(case.cap_gb)
    try:
        step, static_measured = loaded(case)
        if step is None:
            phase.say("model", f"does not fit in {case.cap_gb} GB", "fits", met=False)
            return
        prompts, step.prompts = step.prompts, step.prompts[:1]
        check(step, {name: p.contender for name, p in plans.items() if p} | {EAGER: eager})
        step.prompts = prompts
        for name, planned in plans.items():
            if planned is None:
                phase.say(name, "not one prompt fits, by its plan", "fits", met=False)
                continue
            phase.attempt(
                name, partial(one_way, phase, step, name, planned, static, static_measured)
            )
    finally:
        limit_memory(0)


def one_way(phase, step, name, planned, static, static_measured) -> None:
    """Time and most memory of a way at the tokens that its plan allows."""
    tokens = most_tokens(step, planned.contender, planned.contender.tokens)
    way = planned.contender._replace(tokens=tokens)
    step.set_up(way)
    timing = phase.timed({name: partial(step.run, way)}, floor=name, rounds=3 if GPU else 1)[name]
    peak = step.peaks({name: way})[name]
    a_second = len(step.prompts) / timing.seconds.p50
    case = step.case
    phase.row({
        "shape": case.model, "bits": case.bits, "cap_gb": case.cap_gb, "prompts": case.prompts,
        "n": case.length, "contender": name, "tokens_planned": planned.contender.tokens,
        "tokens_at_once": tokens,
        "static_planned": static.total - static.optimizer - static.gradients,
        "static_measured": static_measured, "step_planned": planned.step, "step_measured": peak,
        **timing.columns(), "prompts_a_second": round(a_second, 3),
    })  # fmt: skip
    fits = tokens == planned.contender.tokens
    words = f"{a_second:.2f} prompts/s, {tokens} tokens at once, a step of {peak / 1e9:.2f} GB"
    phase.say(
        f"{case.model} in {case.cap_gb or 'all'} GB, {name}", words,
        f"at most the {planned.step / 1e9:.2f} GB planned", fits and peak <= planned.step,
    )  # fmt: skip
