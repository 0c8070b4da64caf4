"""What the loss adds to attention: attention with the loss over the same attention without.

    pytest benchmarks/fused_attention.py [-k 4096]

bfloat16 on a GPU, float32 on a CPU. `attention` is flash attention by torch's public entry, packed
on a GPU, prompt by prompt on a CPU. `eager` writes the matrices out, one prompt at a time; `flex`
is FlexAttention, compiled, with the last rows computed once more (on a CPU it has no backward).
Outputs, losses and filter are compared before anything is timed.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from abft_kernels import choose_attention

from benchmarks.exactness import DTYPE, WIDE
from benchmarks.layer import Layer, Shape, there_and_back
from benchmarks.paired import compare, device_seconds, host_part
from benchmarks.record import GPU, append, quick_first

EAGER_LIMIT = 8192 if GPU else 4096  # tokens a prompt up to which a matrix is written out
HEADS = (32, 8, 128) if GPU else (4, 1, 64)
LENGTHS = (16_384, 1024, 131_072, 4096, 128) if GPU else (128, 1024, 4096, 16_384)
SHAPES = [Shape(n, 32_768 if GPU else 4096, HEADS) for n in LENGTHS]
QUICK = SHAPES if GPU else SHAPES[:3]


def contenders_of(layer: Layer, gradient: bool) -> dict:
    """Functions by name to output, losses and filter, those that can be followed by a backward."""
    ways = {"attention": layer.attention, "fused": layer.fused}
    if layer.length <= EAGER_LIMIT:
        ways["eager"] = layer.eager
    if GPU or not gradient:
        ways["flex"] = layer.flex
    return {name: partial(way, gradient) for name, way in ways.items()}


def check(layer: Layer) -> None:
    """Nothing is timed unless it is right, gradients too."""
    exact, plain = layer.results(WIDE), layer.results(DTYPE)
    assert 0 < exact.is_induction.float().mean() <= 0.5, "no head, or nearly each, has a loss"
    ways = contenders_of(layer, gradient=False) | contenders_of(layer, gradient=True)
    attention = ways.pop("attention")
    torch.testing.assert_close(attention()[0], ways["fused"]()[0])
    for name, way in ways.items():
        layer.check_results(name, layer.results_of(way), plain, exact)


@pytest.mark.parametrize("part", ["forward and backward", "forward"])
@pytest.mark.parametrize("shape", quick_first(SHAPES, QUICK))
def bench_fused_attention(shape, part, benchmark, rounds):
    layer = Layer(shape)
    check(layer)
    contenders = contenders_of(layer, gradient=part != "forward")
    if part != "forward":
        contenders = {name: partial(there_and_back, way) for name, way in contenders.items()}
    found = compare(
        benchmark,
        contenders,
        floor="attention",
        baseline="eager" if "eager" in contenders else None,
        rounds=rounds(20 if GPU else 5),
        clock=device_seconds,
    )
    name, _ = choose_attention(layer.query)
    for contender, timing in found.items():
        row = {
            **shape.columns(), "part": part, "attention": name, "contender": contender,
            **timing.columns(),
        }  # fmt: skip
        append("fused_attention", row)
        print(
            f"n={shape} {part}: {contender:10} {timing.seconds.p50 * 1e3:9.3f} ms, "
            f"{timing.to_floor.p50:5.2f} x attention{host_part(contenders[contender])}"
        )
