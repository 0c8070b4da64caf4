"""What the last rows' loss costs: beside the bytes it must read, and beside flash attention.

    python benchmarks/last_row_loss.py [--rounds 20] [--lengths 1024,16384]

On a GPU in bfloat16 with the Triton kernels, on a CPU in float32 with the torch backend. All
contenders of a length take turns in one process, after their results were compared with float64.

kernel: `last_row_loss` alone over packed rows. Its floor is one read of the keys; `copy` moves the
    same keys, so the ratio is (bytes read / time) over (bytes read and written / time of the copy).
fused: attention with the loss against the same attention without, forward and forward + backward,
    and against `eager`, which writes the attention matrix out, one prompt at a time.
memory (CPU only): most memory beyond the inputs, in a process of its own for each length.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from abft_kernels import choose_attention, flash_attention_with_last_row_loss, last_row_loss
from abft_kernels.problem import Scores
from abft_kernels.separate_attention import explicit_attention, visible_keys
from record import append, high_water_mark, reset_high_water_mark, spread, where
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
LABELS = 16
FACTORS = {"penalty": 0.5, "reward": 1.0}
EAGER_LIMIT = 8192 if GPU else 16384  # tokens a prompt up to which a matrix is written out


class Layer:
    """One layer's packed prompts of n tokens; one key head in eight holds induction heads."""

    def __init__(self, length: int, tokens: int, query_heads: int, key_heads: int, head_dim: int):
        self.rows = max(1, tokens // length)
        self.length, self.tokens = length, self.rows * length
        shape = (self.tokens, key_heads, head_dim)
        draw = {"device": DEVICE, "dtype": DTYPE}
        self.key, self.value = (torch.randn(shape, **draw) for _ in range(2))
        self.query = torch.randn(self.tokens, query_heads, head_dim, **draw)
        self.bounds = torch.arange(self.rows + 1, dtype=torch.int32, device=DEVICE) * length
        stride = max(1, (length - 1) // LABELS)
        inside = torch.arange(min(LABELS, length), device=DEVICE) * stride
        self.positions = (self.bounds[:-1, None] + inside).flatten().int()
        self.offsets = torch.arange(self.rows + 1, dtype=torch.int32, device=DEVICE) * len(inside)
        self.correct = torch.arange(len(self.positions), device=DEVICE) % 2 == 0
        group = query_heads // key_heads
        for row in range(self.rows):
            owned = self.positions[row * len(inside) : (row + 1) * len(inside)].long()
            last = self.query[(row + 1) * length - 1].unflatten(0, (key_heads, group))
            self.key[owned, ::8] += 2 * last[::8, 0]

    @property
    def last_query(self) -> Tensor:
        return self.query[self.bounds[1:].long() - 1]

    def labels(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.positions, self.offsets, self.correct

    def alone(self, backend: str = "auto", gradient: bool = False, double: bool = False):
        query, key = self.last_query, self.key.detach()
        if double:
            query, key = query.double(), key.double()
        query.requires_grad_(gradient)
        key = key.requires_grad_(gradient)
        rows = self.bounds[:-1], self.bounds[1:]
        return last_row_loss(query, key, *rows, *self.labels(), **FACTORS, backend=backend)

    def fused(self, gradient: bool = False):
        leaves = [t.detach().requires_grad_(gradient) for t in (self.query, self.key, self.value)]
        return flash_attention_with_last_row_loss(
            *leaves, self.bounds, *self.labels(), longest=self.length, **FACTORS
        )

    def attention(self, gradient: bool = False) -> Tensor:
        """The same flash attention by its public entry, with nothing of ours."""
        leaves = [t.detach().requires_grad_(gradient) for t in (self.query, self.key, self.value)]
        if GPU:
            from torch.nn.attention.varlen import varlen_attn

            return varlen_attn(
                *leaves, self.bounds, self.bounds, self.length, self.length,
                window_size=(-1, 0), enable_gqa=True,
            )  # fmt: skip
        outs = []
        for row in range(self.rows):
            span = slice(row * self.length, (row + 1) * self.length)
            prompt = (t[span].transpose(0, 1)[None] for t in leaves)
            outs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    *prompt, is_causal=True, enable_gqa=True
                )[0].transpose(0, 1)
            )
        return torch.cat(outs)

    def eager(self, gradient: bool = False) -> tuple[Tensor, Tensor]:
        """The matrix written out, one prompt at a time, and the loss of its last row."""
        leaves = [t.detach().requires_grad_(gradient) for t in (self.query, self.key, self.value)]
        scores = Scores(self.query.shape[-1] ** -0.5, None, None)
        mask = visible_keys(self.length, None, self.query.device)
        outs, losses = [], []
        per_row = len(self.positions) // self.rows
        threshold = per_row / (per_row + math.log(self.length))
        for row in range(self.rows):
            span = slice(row * self.length, (row + 1) * self.length)
            prompt = (t[span].transpose(0, 1)[None] for t in leaves)
            out, alpha = explicit_attention(*prompt, mask, scores)
            owned = slice(row * per_row, (row + 1) * per_row)
            on_labels = alpha[0, :, -1, (self.positions[owned] - row * self.length).long()].float()
            correct = self.correct[owned]
            loss = FACTORS["penalty"] * on_labels[:, ~correct].sum(1)
            loss = loss + FACTORS["reward"] * (1 - on_labels[:, correct]).sum(1)
            losses.append(torch.where(on_labels.sum(1) > threshold, loss, 0.0))
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs), torch.stack(losses)


def timed(run: Callable[[], object]) -> float:
    """Milliseconds."""
    if not GPU:
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def compare(part: str, layer: Layer, contenders: dict[str, Callable], floor: str, rounds: int):
    """Time contenders in turns, append their rows, and yield each one's ratio to the floor."""
    times = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name, run in contenders.items():
            spent = timed(run)
            if round_ >= 2:
                times[name].append(spent)
    ratios = {}
    for name, values in times.items():
        p20, p50, p80 = spread(values)
        ratios[name] = statistics.median(a / b for a, b in zip(values, times[floor], strict=True))
        row = {
            **where(DEVICE),
            "part": part,
            "contender": name,
            "dtype": str(DTYPE).removeprefix("torch."),
            "n": layer.length,
            "prompts": layer.rows,
            "heads": f"{layer.query.shape[1]}/{layer.key.shape[1]}x{layer.key.shape[2]}",
            "p20_ms": round(p20, 4),
            "p50_ms": round(p50, 4),
            "p80_ms": round(p80, 4),
            "floor": floor,
            "p50_ratio_to_floor": round(ratios[name], 4),
        }
        append("last_row_loss", row)
        print(f"{part:6} n={layer.length:<7} {name:24} {p50:10.3f} ms  {ratios[name]:8.3f}")
    return ratios


def check(layer: Layer) -> None:
    """Nothing is timed unless it is right."""
    truth = layer.alone(backend="torch", double=True)
    share = truth.is_induction.float().mean().item()
    for name, found in (("alone", layer.alone()), ("fused", layer.fused()[1])):
        worst = (found.label_mass.double() - truth.label_mass).abs().max().item()
        same = (found.is_induction == truth.is_induction).float().mean().item()
        if not (worst <= 1e-3 and same >= 0.99 and 0 < share <= 0.5):
            raise SystemExit(
                f"{name}: label mass off by {worst:.1e}, filter agrees on {same:.1%}, "
                f"{share:.0%} induction heads: nothing is timed"
            )


def kernel(length: int, rounds: int) -> None:
    layer = Layer(length, 262_144 if GPU else 16_384, 32, 8, 128)
    check(layer)
    loss = layer.alone(gradient=True).loss

    def backward():
        loss.sum().backward(retain_graph=True)

    contenders = {
        "copy": layer.key.clone,
        "forward": layer.alone,
        "forward for gradient": lambda: layer.alone(gradient=True),
        "backward": backward,
    }
    with torch.enable_grad():
        ratios = compare("kernel", layer, contenders, "copy", rounds)
    print(f"       bandwidth of the forward, of the copy's: {0.5 / ratios['forward']:.0%}")


def fused(length: int, rounds: int) -> None:
    layer = Layer(length, 32_768, 32, 8, 128) if GPU else Layer(length, length, 2, 1, 64)
    check(layer)
    print(f"attention: {choose_attention(layer.query)[0]}")

    def with_backward(forward):
        def run():
            found = forward(gradient=True)
            out, loss = found if isinstance(found, tuple) else (found, None)
            total = out.float().sum()
            if loss is not None:
                total = total + (loss.loss if hasattr(loss, "loss") else loss).sum()
            total.backward()

        return run

    for part, wrap in (("attend", lambda f: f), ("train", with_backward)):
        contenders = {"attention": wrap(layer.attention), "fused": wrap(layer.fused)}
        if length <= EAGER_LIMIT:
            contenders["eager"] = wrap(layer.eager)
        compare(part, layer, contenders, "attention", rounds)


def memory(length: int) -> None:
    """In a process of its own: print most bytes beyond what the inputs and a first call left."""
    small = Layer(64, 64, 32, 8, 128)
    small.alone(gradient=True).loss.sum().backward()
    layer = Layer(length, length, 32, 8, 128)
    reset_high_water_mark(DEVICE)
    before = high_water_mark(DEVICE)
    layer.alone(gradient=True).loss.sum().backward()
    print(high_water_mark(DEVICE) - before)


def memory_slope(lengths: list[int]) -> None:
    """Log-log slope of memory over length, appended as rows."""
    peaks = []
    for length in lengths:
        command = [sys.executable, __file__, "--memory", str(length)]
        # Freed tensors go back to the system at once, so that later ones count again.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout))
        append(
            "last_row_loss_memory",
            {**where(DEVICE), "n": length, "heads": "32/8x128", "peak_bytes": peaks[-1]},
        )
        print(f"memory n={length:<7} {peaks[-1] / 2**20:8.1f} MiB beyond the inputs")
    points = [(math.log(n), math.log(p)) for n, p in zip(lengths, peaks, strict=True)]
    slope, _ = statistics.linear_regression(*zip(*points, strict=True))
    print(f"log-log slope of memory over n: {slope:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "16384,131072,1024,4096,65536" if GPU else "512,4096,16384"
    parser.add_argument("--lengths", default=default, help=f"default {default}")
    parser.add_argument("--rounds", type=int, default=20 if GPU else 5)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.memory:
        memory(options.memory)
        return
    lengths = [int(n) for n in options.lengths.split(",")]
    for length in lengths:
        kernel(length, options.rounds)
        fused(length, options.rounds)
    if not GPU:
        memory_slope(lengths)


if __name__ == "__main__":
    main()
