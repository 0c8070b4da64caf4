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

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pytest
import torch

from abft_fast.core.attention import NAME
from abft_fast.memory.measure import static_memory, step_memory
from abft_fast.memory.plan import GPU_RESERVE, flows_of
from abft_fast.memory.types import Arithmetic, Flow
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from benchmarks.paired import NOT_TIMED, Timing, compare
from benchmarks.peak_memory import in_fresh_process, memory_held
from benchmarks.record import DEVICE, GPU, append, quick_first
from benchmarks.step_contenders import one_by_one, ours, packed_end_to_end
from benchmarks.steps import Case, Contender, Step, relative_difference


@dataclass(frozen=True)
class Capped(Case):
    """A case on a GPU of `cap_gb` GB (10^9 bytes); 0 is all there is."""

    cap_gb: int = 0

    def __str__(self) -> str:
        return super().__str__() + (f"-{self.cap_gb}GB" if self.cap_gb else "")


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
T = TypeVar("T")
TOLERANCE = 5e-2 if GPU else 1e-4
# bitsandbytes picks the columns it leaves unquantized by all rows of a product, and on a CPU, in
# training mode, which checkpointing needs, it quantizes no activations at all.
TOLERANCE_OF_8_BITS = 1e-1
ARITHMETIC = Arithmetic(DEVICE, mixed=GPU)


def configuration(case: Case, method: str) -> TrainConfig:
    """The options of a run."""
    options = {"quantized": case.bits > 0, "bits": case.bits or 4, "k": case.k, "method": method}
    return resolve(TrainConfig, options)


@dataclass(frozen=True)
class Planned:
    """A contender and what is planned for it.

    Attributes:
        contender: with the tokens it packs at once.
        step: bytes of its step.
    """

    contender: Contender
    step: int


def plans(case: Capped, static: int) -> dict[str, Planned | None]:
    """By name: every way that gradients flow, and E2E's; None where no prompt fits."""
    found = {}
    for method in ("ABFT", "E2E"):
        config = configuration(case, method)
        for flow in flows_of(config):
            step = step_memory(case.config, config, ARITHMETIC, flow, case.length)
            prompts = case.prompts
            if case.cap_gb:
                room = case.cap_gb * 1e9 - static - GPU_RESERVE
                prompts = min(prompts, step.most_tokens(room) // case.length)
            name = f"{method}, {flow.options.removeprefix('--gradient ').replace(' --', ', ')}"
            if prompts == 0:
                found[name] = None
                continue
            tokens = prompts * case.length
            found[name] = Planned(contender_of(method, flow, tokens), int(step.at(tokens)))
    return found


def contender_of(method: str, flow: Flow, tokens: int) -> Contender:
    """A method's packed step."""
    if method == "ABFT":
        return ours(flow.gradient, flow.checkpointing, tokens)
    return Contender(NAME, packed_end_to_end, flow.checkpointing, tokens)


EAGER = "eager, one by one"
eager = Contender("eager", one_by_one)


def loaded(case: Capped) -> tuple[Step | None, int]:
    """The model and its bytes; None where not even it fits in a GPU."""
    before = memory_held()
    step = fitting(lambda: Step(case))
    return step, memory_held() - before


def fitting(run: Callable[[], T]) -> T | None:
    """What a call returns; None where a GPU's memory was too little."""
    try:
        return run()
    except torch.OutOfMemoryError:
        pass  # its traceback keeps the failed attempt's tensors, so what follows has to be outside
    gc.collect()
    torch.cuda.empty_cache()
    return None


def runs(step: Step, way: Contender) -> bool:
    """Whether a way's step fits."""
    step.set_up(way)
    found = fitting(lambda: step.run(way) or True)
    step.model.zero_grad()
    return bool(found)


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
    if case.cap_gb:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap_gb * 1e9 / total))
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


def check(step: Step, running: dict[str, Contender]) -> None:
    """Nothing is timed unless gradients are right."""
    tolerance = TOLERANCE_OF_8_BITS if step.case.bits == 8 else TOLERANCE
    same = [name for name in ("ABFT, full", "ABFT, full, checkpointing", EAGER) if name in running]
    found = {name: step.gradient(running[name]) for name in same}
    for name, gradient in found.items():
        assert gradient.norm() > 0, f"{name}: no gradient"
        error = relative_difference(gradient, found[same[0]])
        assert error <= tolerance, f"{name}: gradient differs from {same[0]} by {error:.1e}"


def said(plan: Planned | None, timing: Timing | None, peak: int | None) -> str:
    """A row in words."""
    if timing is None:
        return "does not fit"
    ratio = f", planned / measured {plan.step / peak:.2f}" if plan else ""
    return (
        f"{timing.seconds.p50:7.3f} s a step, {timing.speedup.p50:.2f} x as fast as eager, "
        f"{peak / 2**20:7.0f} MiB{ratio}"
    )
