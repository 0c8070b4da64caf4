"""Large models of random weights: what is planned for them, and what fits under a cap of memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from abft_fast.core.attention import NAME
from abft_fast.memory.measure import step_memory
from abft_fast.memory.plan import GPU_RESERVE, flows_of
from abft_fast.memory.types import Arithmetic, Flow
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import resolve
from benchmarks.exactness import relative_difference
from benchmarks.peak_memory import memory_held
from benchmarks.record import DEVICE, GPU
from benchmarks.step_contenders import one_by_one, ours, packed_end_to_end
from benchmarks.steps import Case, Contender, Step

T = TypeVar("T")
# bitsandbytes picks the columns it leaves unquantized by all rows of a product, and on a CPU, in
# training mode, which checkpointing needs, it quantizes no activations at all.
TOLERANCE_OF_8_BITS = 1e-1
ARITHMETIC = Arithmetic(DEVICE, mixed=GPU)
EAGER = "eager, one by one"
eager = Contender("eager", one_by_one)


@dataclass(frozen=True)
class Capped(Case):
    """A case on a GPU of `cap_gb` GB (10^9 bytes); 0 is all there is."""

    cap_gb: int = 0

    def __str__(self) -> str:
        return super().__str__() + (f"-{self.cap_gb}GB" if self.cap_gb else "")


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
        for flow in flows_of(configuration(case, method)):
            name = f"{method}, {flow.options.removeprefix('--gradient ').replace(' --', ', ')}"
            found[name] = plan(case, static, method, flow)
    return found


def plan(case: Capped, static: int, method: str, flow: Flow) -> Planned | None:
    """One way's plan; None where no prompt fits."""
    step = step_memory(case.config, configuration(case, method), ARITHMETIC, flow, case.length)
    prompts = case.prompts
    if case.cap_gb:
        room = case.cap_gb * 1e9 - static - GPU_RESERVE
        prompts = min(prompts, step.most_tokens(room) // case.length)
    if prompts == 0:
        return None
    tokens = prompts * case.length
    return Planned(contender_of(method, flow, tokens), int(step.at(tokens)))


def contender_of(method: str, flow: Flow, tokens: int) -> Contender:
    """A method's packed step."""
    if method == "ABFT":
        return ours(flow.gradient, flow.checkpointing, tokens)
    return Contender(NAME, packed_end_to_end, flow.checkpointing, tokens)


def limit_memory(gb: float) -> None:
    """Let this process have so many GB (10^9 bytes) of a GPU; 0 is all."""
    if GPU:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gb * 1e9 / total) if gb else 1.0)


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


def check(step: Step, running: dict[str, Contender]) -> None:
    """Nothing is timed unless gradients are right."""
    same = {
        name: running[name]
        for name in ("ABFT, full", "ABFT, full, checkpointing")
        if name in running
    }
    if EAGER not in running or not same:
        for name, way in (same or running).items():
            assert step.gradient(way).norm() > 0, f"{name}: no gradient"
    elif step.case.bits == 8:
        expected = step.gradient(running[EAGER])
        assert expected.norm() > 0, "no gradient"
        for name, way in same.items():
            error = relative_difference(step.gradient(way), expected)
            assert error <= TOLERANCE_OF_8_BITS, f"{name}: gradient differs by {error:.1e}"
    else:
        step.check(running[EAGER], same)
