"""What the loss of last rows costs by itself, beside a copy of the keys it has to read.

    pytest benchmarks/last_row_loss.py [-k 16384]

bfloat16 on a GPU, float32 on a CPU. Before anything is timed, label mass, filter and loss are those
of the float64 reference on the first and last prompt. A forward has to read the keys once, a copy
also writes them, so `bandwidth` is (bytes a contender has to move / its time) over (bytes the copy
moves / its time). `plain` is einsum, softmax and indexing in torch, `compiled` the same through
torch.compile. Most memory is that of forward and backward beyond the inputs.
"""

from __future__ import annotations

import pytest
import torch
from abft_kernels import choose_backend
from layer import DTYPE, Layer, Shape
from paired import compare
from peak_memory import in_fresh_process, peak_of
from record import GPU, append, quick_first

TOKENS = 262_144 if GPU else 16_384
LENGTHS = [16_384, 512, 131_072, 128, 4096, 65_536] if GPU else [512, 4096, 131_072, 128]
SHAPES = [Shape(n, TOKENS) for n in LENGTHS]
SHAPES += [Shape(4096, TOKENS, heads) for heads in ((32, 32, 128), (64, 8, 128))]
SHAPES += [Shape(4096, TOKENS, heads) for heads in ((32, 8, 64), (16, 8, 256))]
QUICK = SHAPES if GPU else SHAPES[:3]
_compiled = torch.compile(Layer.plain_loss, dynamic=False)


def check(layer: Layer) -> None:
    """Nothing is timed unless it is right."""
    truth, found = layer.specification(), layer.loss()
    ends = sorted({0, layer.rows - 1})
    for name in ("label_mass", "correct_mass", "loss"):
        mine = getattr(found, name)[ends].double()
        same = found.is_induction[ends] == truth.is_induction
        worst = torch.where(same, mine - getattr(truth, name), 0.0).abs().max().item()
        assert worst <= 1e-3 * len(layer.label_positions), f"{name} is off by {worst:.1e}"
    assert same.float().mean() >= 0.99, "the filter picks other heads"
    assert 0 < truth.is_induction.float().mean() <= 0.5, "no head, or nearly each, has a loss"
    plain, _ = layer.plain_loss(layer.last_query, layer.key)
    torch.testing.assert_close(
        plain[ends][same], found.loss[ends][same], rtol=1e-2, atol=5e-2 if GPU else 1e-4
    )


def peak(shape: Shape, contender: str) -> int:
    """Bytes of a forward and backward."""

    def run(layer: Layer) -> None:
        if contender == "plain":
            query, key = (t.detach().requires_grad_() for t in (layer.last_query, layer.key))
            layer.plain_loss(query, key)[0].sum().backward()
        else:
            layer.loss(gradient=True).loss.sum().backward()

    run(Layer(Shape(64, 64, shape.heads)))  # what libraries take once
    layer = Layer(shape)
    return peak_of(lambda: run(layer))


@pytest.mark.parametrize("shape", quick_first(SHAPES, QUICK))
def bench_last_row_loss(shape, benchmark, rounds):
    layer = Layer(shape)
    check(layer)
    result = layer.loss(gradient=True).loss.sum()
    query, key = layer.last_query, layer.key
    plain_query, plain_key = (t.detach().requires_grad_() for t in (query, key))
    plain_result = layer.plain_loss(plain_query, plain_key)[0].sum()
    backend = choose_backend(query)
    contenders = {
        "copy": key.clone,
        f"forward, {backend}": layer.loss,
        f"forward for gradient, {backend}": lambda: layer.loss(gradient=True),
        f"backward, {backend}": lambda: result.backward(retain_graph=True),
        "forward, plain": lambda: layer.plain_loss(query, key),
        "forward, compiled": lambda: _compiled(layer, query, key),
        "backward, plain": lambda: plain_result.backward(retain_graph=True),
    }
    if backend == "triton":
        contenders["forward, torch"] = lambda: layer.loss("torch")
    found = compare(
        benchmark, contenders, floor="copy", baseline="forward, plain",
        rounds=rounds(20 if GPU else 5),
    )  # fmt: skip
    peaks = {name: measured_peak(shape, name) for name in (backend, "plain")}
    key_bytes = key.numel() * DTYPE.itemsize
    for name, timing in found.items():
        moved = 2 * key_bytes if name == "copy" else key_bytes
        share = moved / (2 * key_bytes) / timing.to_floor.p50
        row = {
            **shape.columns(),
            "contender": name,
            **timing.columns(),
            "bytes": moved,
            "bandwidth": round(share, 3),
            "peak_bytes": peaks.get(name.rpartition(", ")[2], ""),
        }
        append("last_row_loss", row)
        print(f"n={shape} {name:28} {timing.seconds.p50 * 1e3:9.3f} ms, {share:5.0%} of the copy's")


def measured_peak(shape: Shape, contender: str) -> int:
    """Bytes; on a CPU in a process of its own."""
    return peak(shape, contender) if GPU else in_fresh_process(peak, shape, contender)
