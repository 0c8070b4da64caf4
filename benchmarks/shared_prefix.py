"""What computing the demonstrations once saves: label logits of many queries after the same ones.

    pytest benchmarks/shared_prefix.py [-k subj] [--rounds 3]

On the built-in model, prompts packed either way. `whole` computes every prompt; `shared` keeps the
keys and values of what all begin with. Their logits are compared before anything is timed, and both
are given token ids. The floor is `whole`'s time for the tokens that a contender computes.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import EncodedPrompt, builtin_model_path, data
from abft_fast.core.label_logits import label_logits
from abft_fast.core.shared_prefix import SharedPrefix, common_prefix
from abft_fast.data import Prompt
from abft_fast.prompts import PromptEncoder
from abft_fast.runtime.batching import micro_batches
from abft_fast.runtime.token_budget import tokens_at_once
from benchmarks.paired import compare
from benchmarks.record import DEVICE, GPU, append, quick_first


class Case(NamedTuple):
    """Queries after the same k demonstrations."""

    dataset: str
    k: int
    queries: int

    def __str__(self) -> str:
        return f"{self.dataset}-k{self.k}-{self.queries}"


SMALL, LARGE = Case("subj", 8, 128), Case("subj", 16, 512)


@torch.no_grad()
def whole(model, prompts, label_ids):
    """Every prompt from its first token; logits and tokens computed."""
    logits = torch.empty(len(prompts), len(label_ids))
    for batch in micro_batches([len(ids) for ids in prompts], tokens_at_once("auto", DEVICE)):
        encoded = [EncodedPrompt(prompts[i], [], []) for i in batch]
        logits[batch] = label_logits(model, encoded, label_ids)[0].cpu()
    return logits, sum(map(len, prompts))


@torch.no_grad()
def shared(model, prompts, label_ids):
    """What all begin with once, the rest packed."""
    prefix = SharedPrefix(model, common_prefix(prompts))
    logits = torch.empty(len(prompts), len(label_ids))
    lengths = [len(ids) - len(prefix.ids) for ids in prompts]
    for batch in micro_batches(lengths, tokens_at_once("auto", DEVICE)):
        logits[batch] = prefix.label_logits([prompts[i] for i in batch], label_ids).cpu()
    return logits, prefix.computed


@pytest.mark.parametrize("case", quick_first([SMALL, LARGE], (SMALL, LARGE) if GPU else (SMALL,)))
def bench_shared_prefix(case, benchmark, rounds):
    path = builtin_model_path()
    model = AutoModelForCausalLM.from_pretrained(path).to(DEVICE)
    dataset = data.load(case.dataset)
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(path), dataset)
    demonstrations = dataset.training[: case.k]
    began = time.perf_counter()
    encoded = encoder.encode([Prompt(demonstrations, q) for q in dataset.test[: case.queries]])
    tokenizing = time.perf_counter() - began
    task = (model, [prompt.input_ids for prompt in encoded.prompts], encoder.label_ids)
    (expected, all_tokens), (logits, tokens) = whole(*task), shared(*task)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    contenders = {"whole": lambda: whole(*task), "shared": lambda: shared(*task)}
    found = compare(benchmark, contenders, floor="whole", baseline="whole", rounds=rounds(3))
    computed = {"whole": all_tokens, "shared": tokens}
    for name, timed in found.items():
        timing = timed.over_part("whole, a token", all_tokens / computed[name])
        row = {
            **case._asdict(),
            "contender": name,
            **timing.columns(),
            "tokens": computed[name],
            "tokenizing_seconds": round(tokenizing, 3),
        }
        append("shared_prefix", row)
        print(
            f"{case} {name:6} {computed[name]:9,} tokens, {timing.seconds.p50:7.2f} s, "
            f"{timing.speedup.p50:.1f} times as fast"
        )
