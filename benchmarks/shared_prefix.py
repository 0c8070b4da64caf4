"""What computing the demonstrations once saves: label logits of many queries after the same ones.

    python benchmarks/shared_prefix.py [--dataset subj] [--k 16] [--queries 512] [--rounds 3]

On the built-in model, prompts packed either way. `whole` computes every prompt; `shared` keeps the
keys and values of what all begin with. Their logits are compared before anything is timed; they
take turns in one process, and are given token ids. The floor is `whole` times the share of tokens
that `shared` computes. A row each goes to results/.
"""

from __future__ import annotations

import argparse
import time

import torch
from record import append, spread, where
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import EncodedPrompt, builtin_model_path, data
from abft_fast.data import Prompt
from abft_fast.evaluation import label_logits
from abft_fast.packing import micro_batches
from abft_fast.prompts import PromptEncoder
from abft_fast.shared_prefix import SharedPrefix, common_prefix
from abft_fast.token_budget import CPU_TOKENS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def whole(model, prompts, label_ids):
    """Every prompt from its first token; logits and tokens computed."""
    logits = torch.empty(len(prompts), len(label_ids))
    for batch in micro_batches([len(ids) for ids in prompts], CPU_TOKENS):
        encoded = [EncodedPrompt(prompts[i], [], []) for i in batch]
        logits[batch] = label_logits(model, encoded, label_ids)[0].cpu()
    return logits, sum(map(len, prompts))


def shared(model, prompts, label_ids):
    """What all begin with once, the rest packed."""
    prefix = SharedPrefix(model, common_prefix(prompts))
    logits = torch.empty(len(prompts), len(label_ids))
    for batch in micro_batches([len(ids) - len(prefix.ids) for ids in prompts], CPU_TOKENS):
        logits[batch] = prefix.label_logits([prompts[i] for i in batch], label_ids).cpu()
    return logits, prefix.computed


def main() -> None:
    """Compare, then time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", default="subj")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    path = builtin_model_path()
    model = AutoModelForCausalLM.from_pretrained(path).to(DEVICE)
    dataset = data.load(options.dataset)
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(path), dataset)
    demonstrations = dataset.training[: options.k]
    queries = dataset.test[: options.queries]
    start = time.perf_counter()
    encoded = encoder.encode([Prompt(demonstrations, query) for query in queries]).prompts
    tokenizing = time.perf_counter() - start
    prompts = [prompt.input_ids for prompt in encoded]

    contenders = {"whole": whole, "shared": shared}
    seconds = {name: [] for name in contenders}
    with torch.no_grad():
        found = {name: run(model, prompts, encoder.label_ids) for name, run in contenders.items()}
        torch.testing.assert_close(found["shared"][0], found["whole"][0], rtol=1e-4, atol=1e-4)
        for _ in range(options.rounds):
            for name, run in contenders.items():
                start = time.perf_counter()
                run(model, prompts, encoder.label_ids)
                seconds[name].append(time.perf_counter() - start)
    tokens = {name: computed for name, (_, computed) in found.items()}
    middle = spread(seconds["whole"])[1]
    for name in contenders:
        p20, p50, p80 = spread(seconds[name])
        floor = middle * tokens[name] / tokens["whole"]
        append(
            "shared_prefix",
            {
                **where(DEVICE), "dataset": options.dataset, "k": options.k,
                "queries": len(queries), "contender": name, "tokens": tokens[name],
                "p20_s": round(p20, 3), "p50_s": round(p50, 3), "p80_s": round(p80, 3),
                "floor_s": round(floor, 3), "tokenizing_s": round(tokenizing, 3),
            },
        )  # fmt: skip
        print(
            f"{name}: {tokens[name]:,} tokens, {p50:.2f} s, floor {floor:.2f} s, "
            f"{middle / p50:.1f} times as fast; tokenizing {tokenizing:.2f} s"
        )


if __name__ == "__main__":
    main()
