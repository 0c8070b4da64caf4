"""How much of a copy's bandwidth the loss alone has: keys are read once, and nothing else matters.

The second-level cache is emptied before each call; a copy in the same run is the measure. It reads
and writes the keys, the loss reads them. So the copy begins with a cache of written lines, as it
ends with one, and the loss with one of lines that were read.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.exactness import DTYPE
from benchmarks.layer import Layer, Shape
from benchmarks.on_gpu.phase import Phase
from benchmarks.paired import device_seconds, host_seconds
from benchmarks.record import DEVICE, GPU

GOALS = (0.8, 0.9)
HEADS = (32, 8, 128) if GPU else (4, 1, 16)
CASES = (  # keys a row, rows
    [(16_384, 32), (131_072, 1), (16_384, 1), (131_072, 8), (16_384, 8), (131_072, 32)]
    if GPU
    else [(128, 2), (256, 1)]
)
CACHE_BYTES = 256 * 2**20 if GPU else 4  # more than any second-level cache


def run(phase: Phase) -> None:
    for length, rows in CASES:
        phase.attempt(f"n = {length}, R = {rows}", partial(measure, phase, length, rows))


def measure(phase: Phase, length: int, rows: int) -> None:
    shape = Shape(length, length * rows, HEADS)
    layer = Layer(shape)
    query, key = layer.last_query, layer.key
    layer.check_losses(layer.loss(query, key, "triton"))
    copied, cache = torch.empty_like(key), torch.zeros(CACHE_BYTES // 4, device=DEVICE)
    leaves = [t.detach().requires_grad_() for t in (query, key)]
    loss = layer.loss(*leaves, "triton").loss.sum()
    contenders = {
        "copy": lambda: copied.copy_(key),
        "forward": lambda: layer.loss(query, key, "triton"),
        "forward for gradient": lambda: layer.loss(*leaves, "triton"),
        "backward": lambda: torch.autograd.grad(loss, leaves, retain_graph=True),
    }
    # A copy reads and writes the keys; the backward reads them, and writes their gradient twice, as
    # zeros first.
    passes = {"copy": 2, "backward": 3}
    found = phase.timed(
        contenders, floor="copy", rounds=20 if GPU else 1, clock=device_seconds,
        setups={name: cache.zero_ if name == "copy" else cache.sum for name in contenders},
    )  # fmt: skip
    key_bytes = key.numel() * DTYPE.itemsize
    for name, timing in found.items():
        share = passes.get(name, 1) / passes["copy"] / timing.to_floor.p50
        moved = key_bytes * passes.get(name, 1)
        phase.row({
            **shape.columns(), "contender": name, **timing.columns(), "rounds": phase.rounds,
            "host_us": round(host_seconds(contenders[name]) * 1e6), "bytes": moved,
            "gb_a_second": round(moved / timing.seconds.p50 / 1e9, 1), "of_a_copy": round(share, 3),
        })  # fmt: skip
        if name == "forward":
            phase.say(
                f"forward, n = {length}, R = {rows}",
                f"{share:.0%} of a copy's bandwidth",
                " then ".join(f"{goal:.0%}" for goal in GOALS),
                share >= GOALS[0],
            )
