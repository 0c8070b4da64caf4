"""Most memory of one gradient, by how far it flows, beside a plain forward of the same tokens.

    python benchmarks/memory.py [--layers 12] [--width 512] [--tokens 8192] [--length 256]

A random Llama with LoRA on W_Q and W_K; each mode in a process of its own, its high-water mark
counted from before the forward (a GPU's own counter there). `inference` is the backbone without
gradient or loss, the floor. A row a mode goes to results/memory.csv.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch
from record import append, high_water_mark, reset_high_water_mark, where
from transformers import LlamaConfig, LlamaForCausalLM

from abft_fast import EncodedPrompt, attention_behavior_loss, pack
from abft_fast.attention import PackedForward
from abft_fast.backbone import backbone
from abft_fast.model import enable_checkpointing, train_lora
from abft_fast.objective import run_packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("inference", "local", "2", "4", "full", "full, checkpointed")


def measure(mode: str, options: argparse.Namespace) -> int:
    """Bytes beyond model and batch."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
        num_key_value_heads=max(1, options.width // 256), head_dim=64,
    )  # fmt: skip
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    model = train_lora(LlamaForCausalLM(config).to(DEVICE, dtype).eval(), rank=16)
    if mode == "full, checkpointed":
        enable_checkpointing(model)
    positions = list(range(8, 8 + 16 * 8, 8))
    prompts = [
        EncodedPrompt(torch.randint(512, (options.length,)).tolist(), positions, [True, False] * 8)
        for _ in range(options.tokens // options.length)
    ]

    def run(packed, gradient) -> None:
        if mode == "inference":
            with torch.no_grad():
                forward = PackedForward(packed, {"penalty": 0.0, "reward": 0.0})
                run_packed(backbone(model), forward)
        else:
            attention_behavior_loss(
                model, packed, head_filter=False, gradient=gradient
            ).loss.backward()

    gradient = {"local": "local", "2": 2, "4": 4}.get(mode, "full")
    run(pack(prompts[:1]), gradient)  # libraries take their workspace once
    model.zero_grad()
    packed = pack(prompts).to(DEVICE)
    reset_high_water_mark(DEVICE)
    before = high_water_mark(DEVICE)
    run(packed, gradient)
    return high_water_mark(DEVICE) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        print(measure(options.mode, options))
        return
    sizes = [f"--{n}={getattr(options, n)}" for n in ("layers", "width", "tokens", "length")]
    # Freed tensors go back to the system at once, so that later ones count again.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    floor = None
    for mode in MODES:
        run = subprocess.run(
            [sys.executable, __file__, *sizes, "--mode", mode],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        peak = int(run.stdout.split()[-1])
        floor = floor or peak
        append(
            "memory",
            {
                **where(DEVICE),
                "layers": options.layers,
                "width": options.width,
                "tokens": options.tokens,
                "n": options.length,
                "mode": mode,
                "peak_bytes": peak,
                "ratio_to_inference": round(peak / floor, 3),
            },
        )
        print(f"{mode:20} {peak / 2**20:8.1f} MiB  {peak / floor:6.2f} x inference")


if __name__ == "__main__":
    main()
