"""The plan of memory against what a step really takes, in models of random weights.

    python benchmarks/plan.py [--shape qwen2.5-0.5b] [--layers 0] [--prompts 16] [--length 150]
                              [--bits 0 4 8] [--mixed] [--room 0]

Each way that gradients flow is run in a process of its own: a model of a known shape (cut to
`--layers`), LoRA on W_Q and W_K, one forward and backward of packed prompts with the head filter
off, its high-water mark counted from before it; on a GPU by CUDA's counters, there in bfloat16.
`--room` limits the process to so many GB of the GPU. A row goes to results/plan.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys

import torch
from record import append, high_water_mark, reset_high_water_mark, where

from abft_fast import EncodedPrompt, attention_behavior_loss, pack
from abft_fast.config import TrainConfig
from abft_fast.model import enable_checkpointing, train_lora
from abft_fast.plan import FLOWS, Arithmetic, Flow, static_memory, step_memory
from abft_fast.resolve import resolve
from abft_fast.shapes import known_shape, with_layers
from abft_fast.synthetic import random_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K = 4


def measure(options: argparse.Namespace, bits: int, flow: Flow) -> tuple[int, int, int, int]:
    """Bytes always there and of a step, each as planned and as measured."""
    shape = known_shape(options.shape)
    if options.layers:
        shape = with_layers(shape, options.layers)
    config = resolve(TrainConfig, {"quantized": bits > 0, "bits": bits or 4, "k": K})
    arithmetic = Arithmetic(DEVICE, options.mixed or DEVICE == "cuda")
    static = static_memory(shape, config, arithmetic)
    step = step_memory(shape, config, arithmetic, flow, options.length)
    if options.room and DEVICE == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.room * 1e9 / total)
    empty = high_water_mark(DEVICE)
    model = random_model(shape, torch.device(DEVICE), arithmetic.dtype, bits or None)
    model = train_lora(model, config.lora_r)
    if flow.checkpointing:
        enable_checkpointing(model)
    every = options.length // (K + 1)
    labels = [every * (i + 1) - 1 for i in range(K)]
    prompt = EncodedPrompt([5] * options.length, labels, [True, False] * (K // 2))

    def run(count: int) -> None:
        bfloat16 = torch.autocast(DEVICE, torch.bfloat16)
        with bfloat16 if arithmetic.mixed else contextlib.nullcontext():
            behavior = attention_behavior_loss(
                model, pack([prompt] * count), head_filter=False, gradient=flow.gradient
            )
        behavior.loss.backward()

    run(1)  # gradients, and what libraries take once
    reset_high_water_mark(DEVICE)
    before = high_water_mark(DEVICE)
    run(options.prompts)
    peak = high_water_mark(DEVICE)
    planned = int(step.at(options.prompts * options.length))
    return static.total - static.optimizer, before - empty, planned, peak - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the shape has")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=150)
    parser.add_argument("--bits", type=int, nargs="+", default=[4], choices=[0, 4, 8])
    parser.add_argument("--mixed", action="store_true", help="bfloat16 on a CPU too")
    parser.add_argument("--room", type=float, default=0, help="GB of the GPU")
    parser.add_argument("--flow", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flow is not None:
        print(*measure(options, options.bits[0], FLOWS[options.flow]))
        return
    # Freed tensors go back to the system at once, so that later ones count again.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for bits in options.bits:
        for i, flow in enumerate(FLOWS):
            run = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--bits", str(bits), "--flow", str(i)],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if run.returncode:
                print(f"{flow.options}: {run.stderr.strip().splitlines()[-1]}")
                continue
            static, there, planned, measured = map(int, run.stdout.split()[-4:])
            append(
                "plan",
                {
                    **where(DEVICE),
                    "shape": options.shape,
                    "layers": options.layers or known_shape(options.shape).num_hidden_layers,
                    "bits": bits,
                    "mixed": options.mixed or DEVICE == "cuda",
                    "flow": flow.options,
                    "tokens": options.prompts * options.length,
                    "static_planned": static,
                    "static_measured": there,
                    "step_planned": planned,
                    "step_measured": measured,
                },
            )
            print(
                f"{bits} bits {flow.options:32} planned / measured: "
                f"step {planned / 2**20:7.0f} / {measured / 2**20:7.0f} MiB = "
                f"{planned / measured:.2f}, there {static / there:.2f}, "
                f"together {(static + planned) / (there + measured):.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
