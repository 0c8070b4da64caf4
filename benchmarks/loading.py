"""Most host memory of loading a checkpoint in shards, as it is stored or quantized on the way.

    pytest benchmarks/loading.py [-k "16x2048 and not 65536"]

A random Llama is written in bfloat16, then each mode loads it onto the CPU in a process of its own,
memory counted from before. `anonymous` is what the process itself holds, looked at every
millisecond; `resident`, the kernel's own high-water mark, also counts pages of the files, which are
mapped and which the kernel takes back when memory is short. The floor is what is not in the files
as it is loaded, the goal that and one shard. glibc keeps part of what is freed, less of it with
MALLOC_MMAP_THRESHOLD_=65536, as in cases named so. Each mode loads once; nothing is recorded of it
unless its logits are those of the stored model, as near as its format lets them be (`error`; of
unrelated ones it is 1.4).
"""

from __future__ import annotations

import logging
import multiprocessing
import platform
import re
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from abft_fast import builtin_model_path
from abft_fast.models.loading import load, read_tokenizer
from benchmarks.paired import Timing
from benchmarks.peak_memory import high_water_mark, in_fresh_process, reset_high_water_mark
from benchmarks.record import append, quick_first

BF16 = torch.bfloat16
MODES = {  # dtype and bits to load with, and how far logits may be from those of what is stored
    "as stored": (BF16, None, 0.0),
    "to float32": (torch.float32, None, 0.05),
    "to 8 bits": (BF16, 8, 0.2),
    "to NF4": (BF16, 4, 0.7),
    "stored in NF4": (BF16, None, 0.7),
}
GLIBC = "glibc's own"


class Case(NamedTuple):
    """A random Llama, its files' size, and from how many bytes on glibc gives memory back."""

    layers: int
    width: int
    vocabulary: int = 32_768
    shard: str = "500MB"
    mmap_threshold: str = GLIBC

    def __str__(self) -> str:
        threshold = "" if self.mmap_threshold == GLIBC else f"-{self.mmap_threshold}"
        return f"{self.layers}x{self.width}{threshold}"


SMALL = Case(4, 1024, 4096, "30MB")
LARGE = [Case(16, 2048), Case(32, 2048), Case(4, 4096)]
CASES = [SMALL, *LARGE, *(case._replace(mmap_threshold="65536") for case in LARGE[:2])]


def write(folder: Path, case: Case) -> None:
    """A random checkpoint in bfloat16, and the built-in tokenizer to go with it."""
    config = LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=case.width,
        intermediate_size=case.width * 11 // 4, num_hidden_layers=case.layers,
        num_attention_heads=case.width // 128, head_dim=128,
        num_key_value_heads=max(1, case.width // 512), tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(BF16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=case.shard)
    AutoTokenizer.from_pretrained(builtin_model_path()).save_pretrained(folder)


def measure(parent, folder: Path, mode: str, shard: str) -> None:
    """Load, between a message to the parent to begin its watch and one to end it."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    dtype, bits, _ = MODES[mode]
    load(str(builtin_model_path()), torch.device("cpu"), BF16, 4)  # imports, workspaces
    reset_high_water_mark("cpu")
    before = high_water_mark("cpu")
    parent.send("begin")
    began = time.perf_counter()
    model = load(str(folder), torch.device("cpu"), dtype, bits)
    seconds = time.perf_counter() - began
    resident = high_water_mark("cpu") - before
    changed = (p for p in model.parameters() if mode.startswith("to") and p.dtype != BF16)
    parent.send(
        {
            "model_bytes": model.get_memory_footprint(),
            "changed_bytes": sum(p.numel() * p.element_size() for p in changed),
            "peak_resident_bytes": resident,
            "seconds": seconds,
        }
    )
    model.set_attn_implementation("eager")
    with torch.no_grad():
        parent.send(model(torch.arange(64)[None]).logits.float().numpy())
    if mode == "to NF4":
        model.save_pretrained(folder.with_name("nf4"), max_shard_size=shard)
        read_tokenizer("builtin").save_pretrained(folder.with_name("nf4"))


def anonymous(pid: int) -> int:
    """Bytes a process holds that are of no file."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def watch(folder: Path, mode: str, shard: str) -> tuple[dict, torch.Tensor]:
    """What `measure` found, with the peak of anonymous memory, and the model's logits."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=measure, args=(there, folder, mode, shard))
    process.start()
    there.close()  # so that the end of a process that fails is an error here
    here.recv()
    before = peak = anonymous(process.pid)
    while not here.poll(0.001):
        peak = max(peak, anonymous(process.pid))
    found = {**here.recv(), "peak_anonymous_bytes": peak - before}
    logits = torch.from_numpy(here.recv())
    process.join()
    assert process.exitcode == 0, mode
    return found, logits


@pytest.mark.parametrize("case", quick_first(CASES, (SMALL,)))
def bench_loading(case, benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # memory is counted on the CPU
    if case.mmap_threshold != GLIBC:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", case.mmap_threshold)
    in_fresh_process(write, tmp_path / "bf16", case)
    benchmark.pedantic(lambda: load_all(case, tmp_path), rounds=1)


def load_all(case: Case, scratch: Path) -> None:
    """A row a mode, if the model computes what the stored one does."""
    for mode, (_, _, tolerance) in MODES.items():
        folder = scratch / ("nf4" if mode == "stored in NF4" else "bf16")
        shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
        found, logits = watch(folder, mode, case.shard)
        if mode == "as stored":
            expected = logits
        error = ((logits - expected).norm() / expected.norm()).item()
        assert error <= tolerance, f"{mode}: logits differ by {error:.1%}"
        goal = found["changed_bytes"] + max(shards)
        row = {
            "device": platform.machine(),
            "layers": case.layers,
            "width": case.width,
            "vocabulary": case.vocabulary,
            "shards": len(shards),
            "largest_shard_bytes": max(shards),
            "checkpoint_bytes": sum(shards),
            "mmap_threshold": case.mmap_threshold,
            "contender": mode,
            **Timing.alone([found.pop("seconds")]).columns(),
            **found,
            "anonymous_to_goal": round(found["peak_anonymous_bytes"] / goal, 3),
            "error": f"{error:.1e}",
        }
        append("loading", row)
        print(
            f"{case} {mode:13} model {row['model_bytes'] / 2**20:6.0f} MiB, "
            f"changed {row['changed_bytes'] / 2**20:6.0f}, "
            f"peak anonymous {row['peak_anonymous_bytes'] / 2**20:6.0f}, "
            f"goal {goal / 2**20:6.0f}, resident {row['peak_resident_bytes'] / 2**20:6.0f} MiB, "
            f"{row['seconds_p50']:.1f} s"
        )
