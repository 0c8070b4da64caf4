"""Most host memory of loading a checkpoint in shards, as it is stored or quantized on the way.

    python benchmarks/loading.py [--layers 16] [--width 2048] [--vocabulary 32768] [--shard 500MB]

A random Llama is written in bfloat16, then each mode loads it onto the CPU in a process of its own,
memory counted from before. `anonymous` is what the process itself holds, looked at every
millisecond; `resident`, the kernel's own high-water mark, also counts pages of the files, which are
mapped and which the kernel takes back when memory is short. The floor are the weights that become
others than the files hold, as the rest stays mapped; the goal is that and one shard. glibc keeps part
of what is freed, with MALLOC_MMAP_THRESHOLD_=65536 in the environment less. A row a mode goes to
results/loading.csv.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import append, high_water_mark, reset_high_water_mark, where
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from abft_fast import builtin_model_path
from abft_fast.loading import load, read_tokenizer

BF16 = torch.bfloat16
MODES = {  # dtype and bits to load with
    "as stored": (BF16, None),
    "to float32": (torch.float32, None),
    "to 8 bits": (BF16, 8),
    "to NF4": (BF16, 4),
    "stored in NF4": (BF16, None),
}


def write(folder: Path, options: argparse.Namespace) -> None:
    """A random checkpoint in bfloat16, and the built-in tokenizer to go with it."""
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.width,
        intermediate_size=options.width * 11 // 4, num_hidden_layers=options.layers,
        num_attention_heads=options.width // 128, head_dim=128,
        num_key_value_heads=max(1, options.width // 512), tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(BF16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=options.shard)
    AutoTokenizer.from_pretrained(builtin_model_path()).save_pretrained(folder)


def measure(folder: Path, mode: str, options: argparse.Namespace) -> None:
    """Load, between a line to the parent to begin its watch and one to end it."""
    load(str(builtin_model_path()), torch.device("cpu"), BF16, 4)  # imports, workspaces
    reset_high_water_mark("cpu")
    before = high_water_mark("cpu")
    print("begin", flush=True)
    started = time.perf_counter()
    model = load(str(folder), torch.device("cpu"), *MODES[mode])
    seconds = time.perf_counter() - started
    resident = high_water_mark("cpu") - before
    changed = (p for p in model.parameters() if mode.startswith("to") and p.dtype != BF16)
    allocated = sum(p.numel() * p.element_size() for p in changed)
    print("end", model.get_memory_footprint(), allocated, resident, seconds, flush=True)
    if mode == "to NF4":
        model.save_pretrained(folder.with_name("nf4"), max_shard_size=options.shard)
        read_tokenizer("builtin").save_pretrained(folder.with_name("nf4"))


def anonymous(pid: int) -> int:
    """Bytes a process holds that are of no file."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def watch(folder: Path, mode: str, sizes: list[str]) -> tuple[int, int, int, int, float]:
    """Bytes of the loaded model and of its changed weights, peaks of anonymous and of resident
    memory, and seconds."""
    with subprocess.Popen(
        [sys.executable, __file__, *sizes, "--mode", mode, "--folder", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        while process.stdout.readline().strip() != "begin":
            if process.poll() is not None:
                raise SystemExit(f"{mode}: the process that loads has failed")
        before = peak = anonymous(process.pid)
        while not select.select([process.stdout], [], [], 0.001)[0]:
            peak = max(peak, anonymous(process.pid))
        model, allocated, resident, seconds = process.stdout.readline().split()[1:]
    return int(model), int(allocated), peak - before, int(resident), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--shard", default="500MB", help="of the files, at most")
    parser.add_argument("--mode", choices=[*MODES, "write"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode == "write":
        write(options.folder, options)
        return
    if options.mode:
        measure(options.folder, options.mode, options)
        return
    sizes = [f"--{n}={getattr(options, n)}" for n in ("layers", "width", "vocabulary", "shard")]
    with tempfile.TemporaryDirectory() as scratch:
        stored = Path(scratch) / "bf16"
        subprocess.run(
            [sys.executable, __file__, *sizes, "--mode", "write", "--folder", str(stored)],
            check=True,
        )
        for mode in MODES:
            folder = Path(scratch) / "nf4" if mode == "stored in NF4" else stored
            shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
            model, allocated, held, resident, seconds = watch(folder, mode, sizes)
            goal = allocated + max(shards)
            append(
                "loading",
                {
                    **where("cpu"),
                    "layers": options.layers,
                    "width": options.width,
                    "vocabulary": options.vocabulary,
                    "mode": mode,
                    "shards": len(shards),
                    "largest_shard_bytes": max(shards),
                    "checkpoint_bytes": sum(shards),
                    "mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_", "glibc's own"),
                    "model_bytes": model,
                    "changed_bytes": allocated,
                    "peak_anonymous_bytes": held,
                    "peak_resident_bytes": resident,
                    "anonymous_to_goal": round(held / goal, 3),
                    "seconds": round(seconds, 2),
                },
            )
            print(
                f"{mode:15} model {model / 2**20:6.0f} MiB, changed {allocated / 2**20:6.0f}, "
                f"peak anonymous {held / 2**20:6.0f}, goal {goal / 2**20:6.0f}, "
                f"resident {resident / 2**20:6.0f} MiB, {seconds:.1f} s"
            )


if __name__ == "__main__":
    main()
