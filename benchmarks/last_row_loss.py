"""What the loss of last rows costs by itself, beside a copy of the keys it has to read.

    pytest benchmarks/last_row_loss.py [-k 16384]

bfloat16 on a GPU, float32 on a CPU. Before anything is timed, label mass, filter and loss are those
of the float64 reference on the first and last prompt. A forward has to read the keys once, a copy
also writes them, so `bandwidth` is (bytes a contender has to move / its time) over (bytes the copy
moves / its time). `plain` is einsum, softmax and indexing in torch, `compiled` the same through
torch.compile. Most memory is that of forward and backward beyond the inputs.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from abft_kernels import LastRowLoss, choose_backend

from benchmarks.exactness import DTYPE, WIDE, assert_exact
from benchmarks.layer import Layer, Shape
from benchmarks.paired import compare, device_seconds, host_part
from benchmarks.peak_memory import in_fresh_process, peak_of
from benchmarks.record import GPU, append, quick_first

TOKENS = 262_144 if GPU else 16_384
LENGTHS = [16_384, 512, 131_072, 128, 4096, 65_536] if GPU else [512, 4096, 128, 131_072]
SHAPES = [Shape(n, TOKENS) for n in LENGTHS]
SHAPES += [Shape(4096, TOKENS, heads) for heads in ((32, 32, 128), (64, 8, 128))]
SHAPES += [Shape(4096, TOKENS, heads) for heads in ((32, 8, 64), (16, 8, 256))]
QUICK = SHAPES if GPU else SHAPES[:2]
_compiled = torch.compile(Layer.plain_loss, dynamic=False)


def check(layer: Layer) -> None:
    """Nothing is timed unless it is right, gradients too."""
    query, key = (t.detach().requires_grad_() for t in (layer.last_query, layer.key))
    layer.check_losses(layer.loss(query, key))
    ways = {"ours": layer.loss, "compiled": partial(_compiled, layer)}
    if GPU:
        ways["torch"] = lambda *leaves: layer.loss(*leaves, "torch")
    exact = _gradients(layer.plain_loss, query, key, WIDE)
    plain = _gradients(layer.plain_loss, query, key, DTYPE)
    for name, way in ways.items():
        found = _gradients(way, query, key, DTYPE)
        for part, *three in zip(("query", "key"), found, plain, exact, strict=True):
            assert_exact(f"{name}: the gradient of the {part}", *three)


def _gradients(way, query, key, dtype) -> tuple[torch.Tensor, ...]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in (query, key)]
    return torch.autograd.grad(_loss_and_filter(way(*leaves))[0].sum(), leaves)


def _loss_and_filter(found) -> tuple:
    """Of ours, or of a pair as it is."""
    return (found.loss, found.is_induction) if isinstance(found, LastRowLoss) else found


def peak(shape: Shape, contender: str) -> int:
    """Bytes of a forward and backward."""

    def run(layer: Layer) -> None:
        leaves = [t.detach().requires_grad_() for t in (layer.last_query, layer.key)]
        way = layer.plain_loss if contender == "plain" else layer.loss
        torch.autograd.grad(_loss_and_filter(way(*leaves))[0].sum(), leaves)

    run(Layer(Shape(64, 64, shape.heads)))  # what libraries take once
    layer = Layer(shape)
    return peak_of(lambda: run(layer))


@pytest.mark.parametrize("shape", quick_first(SHAPES, QUICK))
def bench_last_row_loss(shape, benchmark, rounds):
    layer = Layer(shape)
    check(layer)
    query, key = layer.last_query, layer.key
    copied = torch.empty_like(key)
    leaves = [t.detach().requires_grad_() for t in (query, key)]
    losses = {"ours": layer.loss(*leaves).loss.sum(), "plain": layer.plain_loss(*leaves)[0].sum()}

    def backward(name: str) -> None:
        torch.autograd.grad(losses[name], leaves, retain_graph=True)

    backend = choose_backend(query)
    contenders = {
        "copy": lambda: copied.copy_(key),
        f"forward, {backend}": lambda: layer.loss(query, key),
        f"forward for gradient, {backend}": lambda: layer.loss(*leaves),
        f"backward, {backend}": lambda: backward("ours"),
        "forward, plain": lambda: layer.plain_loss(query, key),
        "forward, compiled": lambda: _compiled(layer, query, key),
        "backward, plain": lambda: backward("plain"),
    }
    if backend == "triton":
        contenders["forward, torch"] = lambda: layer.loss(query, key, "torch")
    found = compare(
        benchmark, contenders, floor="copy", rounds=rounds(20 if GPU else 5), clock=device_seconds,
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
        print(
            f"n={shape} {name:28} {timing.seconds.p50 * 1e3:9.3f} ms, {share:5.0%} of the copy's"
            f"{host_part(contenders[name])}"
        )


def measured_peak(shape: Shape, contender: str) -> int:
    """Bytes; on a CPU in a process of its own."""
    return peak(shape, contender) if GPU else in_fresh_process(peak, shape, contender)
