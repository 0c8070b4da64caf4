"""E2E by unsloth, where it is installed on a GPU: its step beside that of a plain loop.

    pytest benchmarks/unsloth_step.py

Importing unsloth patches transformers, and it wants other versions of it, so it is measured in a
process of its own and skipped where it is not there; the two do not take turns, and the ratio is of
medians. LoRA on W_Q and W_K, one padded batch, transformers' loss on each prompt's label. Before
LoRA has learnt anything the two losses must agree.
"""

from __future__ import annotations

import importlib.util
import tempfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import builtin_model_path
from abft_fast.models.synthetic import random_model
from abft_fast.models.trainable import add_lora
from benchmarks.paired import Timing, wall_seconds
from benchmarks.peak_memory import in_fresh_process
from benchmarks.record import DEVICE, GPU, SEED, append
from benchmarks.step_contenders import label_batch
from benchmarks.steps import DTYPE, Case, random_prompts

CASE = Case("llama3-8b", 32, 150) if GPU else Case("6x512", 32, 150)


def write_checkpoint(folder: str) -> None:
    """The case's random model with a tokenizer, as a loader expects them."""
    torch.manual_seed(SEED)
    random_model(CASE.config, torch.device(DEVICE), DTYPE, None).save_pretrained(folder)
    AutoTokenizer.from_pretrained(builtin_model_path()).save_pretrained(folder)


def by_unsloth(folder: str):
    """A model as unsloth's own examples load one."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=2 * CASE.length, dtype=DTYPE, load_in_4bit=False
    )
    return FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, target_modules=["q_proj", "k_proj"],
        use_gradient_checkpointing=False,
    )  # fmt: skip


def plain(folder: str):
    """The same by transformers and PEFT."""
    return add_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(DEVICE), 16)


def measure(folder: str, loader, rounds: int) -> tuple[float, list[float]]:
    """The first loss, and seconds of each step."""
    model = loader(folder)
    batch = label_batch(list(random_prompts(CASE)))
    losses = []

    def step() -> None:
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())

    step()
    return losses[0], [wall_seconds(step) for _ in range(rounds)]


@pytest.mark.skipif(not GPU or not importlib.util.find_spec("unsloth"), reason="needs unsloth")
def bench_unsloth_step(benchmark, rounds):
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(write_checkpoint, folder)
        arguments = {"plain": plain, "unsloth": by_unsloth}
        found = benchmark.pedantic(
            lambda: {
                name: in_fresh_process(measure, folder, loader, rounds(10))
                for name, loader in arguments.items()
            },
            rounds=1,
        )
    expected, seconds = found["plain"]
    loss, its_seconds = found["unsloth"]
    assert abs(loss - expected) <= 2e-2 * expected, f"unsloth's loss is {loss}, not {expected}"
    for name, taken in {"plain": seconds, "unsloth": its_seconds}.items():
        timing = Timing.alone(taken)
        case = {"model": CASE.model, "prompts": CASE.prompts, "n": CASE.length}
        append("unsloth_step", {**case, "contender": name, **timing.columns()})
        print(f"{CASE} {name:8} {timing.seconds.p50:7.3f} s")
