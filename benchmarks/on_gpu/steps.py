"""What a step takes: ABFT by gradient, end to end, and eager attention one prompt at a time.

A step is timed by the wall: a small model waits for its host, and a user does too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from abft_fast.core.attention import NAME
from abft_fast.runtime.token_budget import TokenBudget
from benchmarks.on_gpu.phase import Phase
from benchmarks.record import GPU
from benchmarks.step_contenders import one_by_one, ours, packed_end_to_end
from benchmarks.steps import Case, Contender, Step

CASES = (
    [
        Case("llama3-8b", 32, 150),
        Case("qwen2.5-0.5b", 32, 150),
        Case("llama3-8b", 32, 600),
        Case("qwen2.5-0.5b", 32, 600),
    ]
    if GPU
    else [Case("5x128", 6, 30)]
)
FEW = 4  # prompts of what is slow, whose time is scaled
EAGER = "eager, one by one"
WAYS = {
    "ABFT, local": ours("local"),
    "ABFT, N = 4": ours(4),
    "ABFT, full": ours("full"),
    "E2E": Contender(NAME, packed_end_to_end),
    EAGER: Contender("eager", one_by_one),
}


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
    error = step.check(WAYS[EAGER], {"ABFT, full": WAYS["ABFT, full"]})
    step.prompts = prompts
    ways = dict(fitting(step))
    found = phase.timed(
        {name: partial(step.run, way) for name, way in ways.items()},
        floor="ABFT, local", baseline=EAGER, rounds=5 if GPU else 1,
        setups={name: partial(set_up, name, way) for name, way in ways.items()},
        scales={EAGER: len(prompts) / FEW},
    )  # fmt: skip
    step.prompts = prompts
    peaks = step.peaks({name: way for name, way in ways.items() if name != EAGER})
    for name, timing in found.items():
        a_second = len(prompts) / timing.seconds.p50
        phase.row({
            "model": case.model, "prompts": len(prompts), "n": case.length, "contender": name,
            "prompts_run": FEW if name == EAGER else len(prompts),
            "tokens_at_once": ways[name].tokens, **timing.columns(),
            "prompts_a_second": round(a_second, 2), "peak_bytes": peaks.get(name, ""),
            "gradient_error": f"{error:.1e}",
        })  # fmt: skip
        if name != EAGER:
            words = f"{a_second:.1f} prompts/s, {timing.speedup.p50:.2f} x eager"
            words += f", {peaks[name] / 2**30:.1f} GiB beside the model"
            ours_ = name != "E2E"
            goal = "faster than eager, one by one" if ours_ else ""
            met = timing.speedup.p50 > 1 if ours_ else None
            phase.say(f"{case.model}, n = {case.length}, {name}", words, goal, met)


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
