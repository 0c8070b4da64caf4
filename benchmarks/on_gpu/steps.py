"""What a step takes: ABFT by gradient, end to end, and eager attention one prompt at a time.

A step is timed by the wall: a small model waits for its host, and a user does too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from abft_fast.core.attention import NAME
from abft_fast.runtime.token_budget import TokenBudget
from benchmarks.exactness import relative_difference
from benchmarks.on_gpu.phase import Phase
from benchmarks.paired import host_seconds
from benchmarks.record import GPU
from benchmarks.step_contenders import one_by_one, ours, packed_end_to_end
from benchmarks.steps import Case, Contender, Step

CASES = (
    [
        Case("qwen2.5-0.5b", 32, 150),  # the quickest first
        Case("llama3-8b", 32, 150),
        Case("llama3-8b", 32, 600),
        Case("qwen2.5-0.5b", 32, 600),
        Case("qwen2.5-0.5b", 32, 150, full=True),
    ]
    if GPU
    else [Case("5x128", 6, 30), Case("5x128", 6, 30, full=True)]
)
FEW = 4  # prompts of what is slow, whose time is scaled
MOST_ERROR = 0.1 if GPU else 1e-4  # of a gradient in bfloat16, on a CPU in float32
EAGER = "eager, one by one"
WAYS = {
    "ABFT, local": ours("local"),
    "ABFT, N = 4": ours(4),
    "ABFT, full": ours("full"),
    "ABFT, full, checkpointing": ours("full", checkpointing=True),
    "E2E": Contender(NAME, packed_end_to_end),
    EAGER: Contender("eager", one_by_one),
}


PROFILED = ("ABFT, local", "ABFT, full", "E2E")


def run(phase: Phase) -> None:
    for case in CASES:
        phase.attempt(str(case), partial(measure, phase, case))


def measure(phase: Phase, case: Case) -> None:
    step = Step(case)
    prompts = step.prompts

    def set_up(name: str, way: Contender) -> None:
        step.prompts = prompts[:FEW] if name == EAGER else prompts
        step.set_up(way)

    step.prompts = prompts[:FEW]
    errors: list[float] = []
    phase.attempt(f"{case}, gradients", lambda: errors.extend(check(phase, step)))
    step.prompts = prompts
    ways = dict(fitting(step))
    found = phase.timed(
        {name: partial(step.run, way) for name, way in ways.items()},
        floor="ABFT, local", baseline=EAGER, rounds=5 if GPU else 1,
        setups={name: partial(set_up, name, way) for name, way in ways.items()},
        scales={EAGER: len(prompts) / FEW},
    )  # fmt: skip
    step.prompts = prompts
    peaks, host_us = {}, {}
    if not phase.is_over:
        peaks = step.peaks({name: way for name, way in ways.items() if name != EAGER})
    for name in peaks:
        step.set_up(ways[name])
        host_us[name] = round(host_seconds(partial(step.run, ways[name]), calls=1) * 1e6)
    for name, timing in found.items():
        a_second = len(prompts) / timing.seconds.p50
        phase.row({
            "model": case.model, "trained": "W_Q, W_K" if case.full else "LoRA",
            "prompts": len(prompts), "n": case.length, "contender": name,
            "prompts_run": FEW if name == EAGER else len(prompts),
            "tokens_at_once": ways[name].tokens, **timing.columns(),
            "prompts_a_second": round(a_second, 2), "peak_bytes": peaks.get(name, ""),
            "gradient_error": f"{max(errors, default=math.nan):.1e}", "rounds": phase.rounds,
            "host_us": host_us.get(name, ""),
        })  # fmt: skip
        if name != EAGER:
            words = f"{a_second:.1f} prompts/s, {timing.speedup.p50:.2f} x eager"
            if name in peaks:
                words += f", {peaks[name] / 2**30:.1f} GiB beside the model"
            ours_ = name != "E2E"
            goal = "faster than eager, one by one" if ours_ else ""
            met = timing.speedup.p50 > 1 if ours_ else None
            phase.say(f"{case}, {name}", words, goal, met)
    for name in PROFILED:
        phase.attempt(f"{case}, {name}, kernels", partial(profile, phase, step, name, ways[name]))


def profile(phase: Phase, step: Step, name: str, way: Contender) -> None:
    step.set_up(way)
    phase.profile(f"{step.case}, {name}", partial(step.run, way))


def check(phase: Phase, step: Step) -> Iterator[float]:
    """The errors of gradients: of full by what plain torch loses, of others against float32."""
    yield step.check(WAYS[EAGER], {"ABFT, full": WAYS["ABFT, full"]})
    for name in ("ABFT, local", "ABFT, N = 4", "E2E"):
        exact = step.exact_gradient(WAYS[name])
        error = relative_difference(step.gradient(WAYS[name]), exact)
        met = error <= MOST_ERROR
        what = f"{step.case}, {name}: gradient"
        phase.say(what, f"off by {error:.1e}", f"{MOST_ERROR:g} at most", met)
        yield error


def fitting(step: Step) -> Iterator[tuple[str, Contender]]:
    """The ways, each with the most tokens at once that fit, by halves."""
    for name, way in WAYS.items():
        if name == EAGER:
            yield name, way
            continue
        yield name, way._replace(tokens=most_tokens(step, way, sum(step.lengths)))


def most_tokens(step: Step, way: Contender, tokens: int) -> int:
    """How many tokens a way can pack at once, `tokens` or fewer."""
    budget = TokenBudget(tokens, print)

    def attempt(tokens: int) -> None:
        trial = way._replace(tokens=tokens)
        step.set_up(trial)
        step.run(trial)

    budget.attempt(step.lengths, attempt, step.model.zero_grad)
    step.model.zero_grad()
    return budget.tokens
