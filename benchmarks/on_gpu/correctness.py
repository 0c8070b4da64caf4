"""What only a GPU can show to be right: kernels in every dtype, large offsets, no waiting.

Each check is a generator of what it found beside what is allowed. `pytest -m gpu` runs the same.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from abft_kernels import choose_attention, flash_attention_with_last_row_loss, last_row_loss
from abft_kernels.attention.registry import ATTENTIONS

from benchmarks.on_gpu.phase import Phase
from benchmarks.paired import device_seconds
from benchmarks.record import GPU
from tests.last_row_cases import (
    DEVICE,
    KERNEL_ROUNDING,
    eager,
    error,
    gradients,
    in_float64,
    make_case,
)


class Found(NamedTuple):
    """A quantity, how far it is off, and how far it may be."""

    quantity: str
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed  # a NaN does not


OPTIONS = {
    "plain": {},
    "window": {"window": 70},
    "sinks": {"sinks": True},
    "sinks-window": {"sinks": True, "window": 70},
    "softcap": {"softcap": 20.0},
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if GPU else (torch.float32,)


def run(phase: Phase) -> None:
    for name, check in checks().items():
        phase.attempt(name, partial(report, phase, name, check))


def report(phase: Phase, name: str, check: Callable[[], Iterator[Found]]) -> None:
    started = time.monotonic()
    found = list(check())
    seconds = round(time.monotonic() - started, 2)
    for each in found:
        phase.row({
            "check": name, "quantity": each.quantity, "error": f"{each.error:.3g}",
            "allowed": f"{each.allowed:.3g}", "holds": each.holds, "seconds": seconds,
        })  # fmt: skip
    wrong = [each for each in found if not each.holds]
    assert not wrong, "; ".join(
        f"{each.quantity} is off by {each.error:.2g}, allowed {each.allowed:.2g}" for each in wrong
    )
    phase.say(name, f"{len(found)} quantities hold", "all", met=True)


def checks() -> dict[str, Callable[[], Iterator[Found]]]:
    """By name, the most telling first: each new shape of kernel is compiled for seconds."""
    found = {}
    for length, dtype in itertools.product((1000, 16_384, 131_072) if GPU else (70,), DTYPES):
        found[f"rows of {length}, {said(dtype)}"] = partial(long_rows, length, dtype)
    first = DTYPES[0]
    found["no waiting for the device"] = partial(no_waits, first)
    found["bitwise repeatable"] = partial(repeatable, 100 if GPU else 3, first)
    if GPU:
        found["the clock leaves out the host"] = clock_without_host
    cases = [(first, name, 128) for name in OPTIONS]
    if GPU:
        cases += [(first, name, 64) for name in OPTIONS] + [(first, "plain", 80)]
        cases += [(torch.float16, name, 128) for name in OPTIONS]
    for dtype, name, head_dim in cases:
        what = f"fused against separate, {name}, D = {head_dim}, {said(dtype)}"
        found[what] = partial(every_attention, dtype, OPTIONS[name], head_dim)
    # Last, as an access outside memory would end all work on the GPU.
    last = "offsets over 2^31" if GPU else "offsets"
    found[last] = partial(large_offsets, 140_000 if GPU else 300)
    return found


def said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def long_rows(length: int, dtype: torch.dtype) -> Iterator[Found]:
    """The kernels against the torch backend in float64, which tests/unit holds to the reference."""
    case = make_case([length, 31], [64, 4], 8, 2, 128, dtype)
    bounds = torch.cat([case["key_start"], case["key_end"][-1:]])
    case |= {"key_start": bounds[:-1], "key_end": bounds[1:]}  # as in training: one is not aligned
    truth, true_grads = gradients(last_row_loss, in_float64(case), backend="torch")
    found, grads = gradients(last_row_loss, case, backend="triton")
    base = eager(**case, threshold_from=truth.is_induction)
    yield Found("filter", (found.is_induction != truth.is_induction).sum().item(), 0)
    for name in ("loss", "label_mass", "correct_mass"):
        ours, theirs, exact = (getattr(result, name) for result in (found, base, truth))
        yield Found(name, error(ours, exact), max(2 * error(theirs, exact), KERNEL_ROUNDING))
    rounding = max(torch.finfo(dtype).eps, 2 * KERNEL_ROUNDING)  # stored in the inputs' dtype
    for name, ours, exact in zip(("query", "key"), grads, true_grads, strict=True):
        yield Found(f"gradient of {name}", error(ours, exact), rounding)


def large_offsets(tokens: int) -> Iterator[Found]:
    """A row at the end of `tokens` keys against the same row alone."""
    heads, dim, length = (64, 256, 200) if GPU else (2, 16, 20)
    dtype = DTYPES[0]
    key = torch.zeros(tokens, heads, dim, dtype=dtype, device=DEVICE)
    small = make_case([length], [4], heads, heads, dim, dtype)
    start = tokens - length
    key[start:] = small["key"]
    moved = {**small, "key": key}
    moved |= {n: small[n] + start for n in ("key_start", "key_end", "label_positions")}
    expected, expected_grads = gradients(last_row_loss, small, backend="triton")
    found, grads = gradients(last_row_loss, moved, backend="triton")
    yield Found("loss", error(found.loss, expected.loss.double()), 1e-6)
    yield Found("gradient of query", error(grads[0], expected_grads[0].double()), 1e-2)
    yield Found("gradient of key", error(grads[1][start:], expected_grads[1].double()), 1e-2)
    yield Found("gradient elsewhere", grads[1][:start].abs().max().item(), 0)


def available_attentions(dtype: torch.dtype, softcap: float | None) -> list[str]:
    q = torch.zeros(1, 4, 64, dtype=dtype, device=DEVICE)
    names = []
    for name in ATTENTIONS[1:]:
        try:
            names.append(choose_attention(q, softcap=softcap, requested=name)[0])
        except ValueError:
            continue
    return names


def every_attention(dtype: torch.dtype, options: dict, head_dim: int) -> Iterator[Found]:
    """Output, losses and gradients against float64, by what a written-out attention loses."""
    lengths, labels = [300, 1, 129, 64], [16, 1, 0, 4]
    case = make_case(lengths, labels, 8, 2, head_dim, dtype, **options)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(sum(lengths), 8, head_dim, generator=generator).to(DEVICE, dtype)
    q[bounds[1:].long() - 1] = case["query"]
    v = torch.randn(sum(lengths), 2, head_dim, generator=generator).to(DEVICE, dtype)
    indices = [case[n] for n in ("label_positions", "label_offsets", "label_is_correct")]
    rest = {name: options.get(name) for name in ("window", "softcap")}
    rest |= {"penalty": 0.5, "reward": 1.0}
    weights = torch.linspace(-1, 1, q.numel(), device=DEVICE).view_as(q)

    def results(attention: str, to: torch.dtype):
        leaves = [t.to(to).requires_grad_() for t in (q, case["key"], v)]
        sinks = case["sinks"].to(to).requires_grad_() if "sinks" in case else None
        out, result = flash_attention_with_last_row_loss(
            *leaves, bounds, *indices, longest=300, sinks=sinks, attention=attention, **rest
        )
        leaves += [] if sinks is None else [sinks]
        total = (out * weights.to(to)).sum() + result.loss.sum()
        return out, result, torch.autograd.grad(total, leaves)

    true_out, truth, true_grads = results("separate", torch.float64)
    base_out, base, base_grads = results("separate", dtype)
    yield Found("separate: loss", error(base.loss, truth.loss), 1e-5)
    for attention in available_attentions(dtype, options.get("softcap")):
        out, result, grads = results(attention, dtype)
        differing = (result.is_induction != truth.is_induction).sum().item()
        yield Found(f"{attention}: filter", differing, 0)
        allowed = max(2 * error(base_out, true_out), 1e-3)
        yield Found(f"{attention}: output", error(out, true_out), allowed)
        yield Found(f"{attention}: loss", error(result.loss, truth.loss), 1e-4)
        names = ("query", "key", "value", "sinks")
        for name, ours, theirs, exact in zip(
            names, grads, base_grads, true_grads, strict=False
        ):  # there may be no sinks
            allowed = max(2 * error(theirs, exact), 1e-3)
            yield Found(f"{attention}: gradient of {name}", error(ours, exact), allowed)


def fused_case(lengths: list[int], labels: list[int], dtype: torch.dtype):
    """A case, its leaves, and the first arguments of the fused op."""
    case = make_case(lengths, labels, 7, 1, 64, dtype)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    q, v = (torch.randn(sum(lengths), h, 64, dtype=dtype, device=DEVICE) for h in (7, 1))
    q[bounds[1:].long() - 1] = case["query"]
    indices = (case[n] for n in ("label_positions", "label_offsets", "label_is_correct"))
    leaves = [t.requires_grad_() for t in (q, case["key"], v)]
    return case, leaves, (*leaves, bounds, *indices)


def both_ops(lengths: list[int], labels: list[int], penalty: torch.Tensor, dtype: torch.dtype):
    """A function that runs the loss alone and in attention, and their gradients."""
    case, leaves, arguments = fused_case(lengths, labels, dtype)
    factors = {"penalty": penalty, "reward": torch.ones((), device=DEVICE)}
    options = {**factors, "longest": max(lengths)}

    def run() -> list[torch.Tensor]:
        out, result = flash_attention_with_last_row_loss(*arguments, **options)
        (out.sum() + result.loss.sum()).backward()
        query = case["query"].detach().requires_grad_()
        alone = last_row_loss(**{**case, **factors, "query": query}, backend="triton")
        alone.loss.sum().backward()
        return [result.loss, alone.loss, query.grad, *(t.grad for t in leaves)]

    return run


def no_waits(dtype: torch.dtype) -> Iterator[Found]:
    """Both ops and their backwards, where a wait for the device is an error."""
    lengths = [300, 40] if GPU else [30, 4]
    run = both_ops(lengths, [4, 4], torch.tensor(0.5, device=DEVICE), dtype)
    run()
    with waits_are_errors():
        run()
    yield Found("waits", 0, 0)


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    """Raise RuntimeError at a wait for a GPU."""
    if not GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def repeatable(times: int, dtype: torch.dtype) -> Iterator[Found]:
    """The fused forward, bit by bit."""
    _, _, arguments = fused_case([700, 65], [7, 3], dtype)
    options = {"penalty": 0.5, "reward": 1.0, "longest": 700}
    first_out, first = flash_attention_with_last_row_loss(*arguments, **options)
    differing = 0
    for _ in range(times):
        out, result = flash_attention_with_last_row_loss(*arguments, **options)
        same = torch.equal(out, first_out)
        differing += not (same and all(map(torch.equal, result, first)))
    yield Found(f"of {times} runs, different", differing, 0)


def clock_without_host() -> Iterator[Found]:
    """A host of 5 ms before a kernel is not in the kernel's time."""
    tensor = torch.zeros(1024, device=DEVICE)

    def slow_host() -> None:
        time.sleep(5e-3)
        tensor.zero_()

    yield Found("seconds", device_seconds(slow_host), 1e-3)
