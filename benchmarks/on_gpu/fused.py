"""What the loss adds to flash attention: both in one op over flash attention alone."""

from __future__ import annotations

from functools import partial

from abft_kernels import choose_attention

from benchmarks.exactness import DTYPE, WIDE
from benchmarks.layer import Layer, Shape, there_and_back
from benchmarks.on_gpu.phase import Phase
from benchmarks.paired import device_seconds, host_seconds
from benchmarks.record import GPU

GOAL = 1.03
HEADS = (32, 8, 128) if GPU else (4, 1, 16)
LENGTHS = (4096, 1024, 16_384) if GPU else (64, 32)
TOKENS = 32_768 if GPU else 64


def run(phase: Phase) -> None:
    for length in LENGTHS:
        phase.attempt(f"n = {length}", partial(measure, phase, length))


def measure(phase: Phase, length: int) -> None:
    shape = Shape(length, TOKENS, HEADS)
    layer = Layer(shape)
    fused = layer.results_of(partial(layer.fused, True))
    layer.check_results("fused", fused, layer.results(DTYPE), layer.results(WIDE))
    ways = {"attention": layer.attention, "fused": layer.fused}
    for part in ("forward", "forward and backward"):
        back = part != "forward"
        contenders = {name: partial(way, back) for name, way in ways.items()}
        if back:
            contenders = {name: partial(there_and_back, way) for name, way in contenders.items()}
        found = phase.timed(
            contenders, floor="attention", rounds=20 if GPU else 1, clock=device_seconds
        )
        for name, timing in found.items():
            phase.row({
                **shape.columns(), "part": part, "attention": choose_attention(layer.query)[0],
                "contender": name, **timing.columns(),
                "host_us": round(host_seconds(contenders[name]) * 1e6), "rounds": phase.rounds,
            })  # fmt: skip
            what = f"{name}, {part}, n = {length}"
            phase.attempt(f"{what}, kernels", partial(phase.profile, what, contenders[name]))
        ratio = found["fused"].to_floor.p50
        phase.say(
            f"{part}, n = {length}", f"{ratio:.3f} of flash alone", f"{GOAL} at most", ratio <= GOAL
        )
