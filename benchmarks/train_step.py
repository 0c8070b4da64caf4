"""What a step's gradient costs: packed, against eager attention matrices one prompt at a time.

    python benchmarks/train_step.py [--dataset subj] [--rounds 10]

Contenders take turns in one process, on the built-in model and the same 32 prompts. `trivial` is
the packed forward and backward of the backbone with the mean of its last hidden states as the loss;
it is no strict floor, as our loss needs no backward of the last layer's V, O and MLP. Before
anything is timed, packed and eager gradients are compared. A row a contender goes to results/.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from record import append, spread, where
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import EncodedPrompt, attention_behavior_loss, builtin_model_path, data, pack
from abft_fast.attention import PackedForward
from abft_fast.backbone import backbone, query_key_projections
from abft_fast.objective import run_packed
from abft_fast.prompts import PromptEncoder


def eager_gradient(model, prompts):
    """The original's way: every attention matrix of every layer, one prompt a forward."""
    device = next(model.parameters()).device
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids], device=device)
        attentions = model(ids, output_attentions=True).attentions
        n, k = len(prompt.input_ids), len(prompt.label_positions)
        correct = torch.tensor(prompt.label_is_correct, device=device)
        loss = 0.0
        for attention in attentions:
            on_labels = attention[0, :, -1, prompt.label_positions]
            induction = on_labels.sum(dim=-1) > k / (k + math.log(n))
            wrong = on_labels[:, ~correct].sum(dim=-1)
            loss += ((0.5 * wrong + (1 - on_labels[:, correct]).sum(dim=-1)) * induction).sum()
        (loss / len(prompts)).backward()


def packed_gradient(model, prompts):
    """Ours."""
    attention_behavior_loss(model, pack(prompts)).loss.backward()


def trivial(model, prompts):
    """The packed pass with nothing of ours in it but the packing."""
    unlabeled = [EncodedPrompt(prompt.input_ids, [], []) for prompt in prompts]
    forward = PackedForward(pack(unlabeled), {"penalty": 0.0, "reward": 0.0})
    run_packed(backbone(model), forward).last_hidden_state.mean().backward()


def gradient_of(contender, model, prompts):
    model.zero_grad()
    contender(model, prompts)
    return torch.cat([p.module.weight.grad.flatten() for p in query_key_projections(model)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="subj")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = data.load(options.dataset)
    tokenizer = AutoTokenizer.from_pretrained(builtin_model_path())
    prompts = PromptEncoder(tokenizer, dataset).encode(dataset.training_prompts(4, 32, 0)).prompts

    def load(implementation):
        model = AutoModelForCausalLM.from_pretrained(
            builtin_model_path(), attn_implementation=implementation
        ).to(device)
        model.requires_grad_(False)
        for projection in query_key_projections(model):
            projection.module.weight.requires_grad_()
        return model

    eager, packed = load("eager"), load("sdpa")
    expected = gradient_of(eager_gradient, eager, prompts)
    error = (
        (gradient_of(packed_gradient, packed, prompts) - expected).norm() / expected.norm()
    ).item()
    if not error <= 1e-4:
        raise SystemExit(f"packed and eager gradients differ by {error:.1e}: nothing is timed")

    contenders = {"eager": (eager_gradient, eager), "packed": (packed_gradient, packed)}
    contenders["trivial"] = (trivial, packed)
    seconds = {name: [] for name in contenders}
    for round_ in range(options.rounds + 1):
        for name, (contender, model) in contenders.items():
            model.zero_grad()
            started = time.perf_counter()
            contender(model, prompts)
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - started)

    for name, values in seconds.items():
        p20, p50, p80 = spread(values)
        ratios = [a / b for a, b in zip(values, seconds["trivial"], strict=True)]
        row = {
            **where(device),
            "dataset": options.dataset,
            "tokens": sum(map(len, prompts)),
            "contender": name,
            "p20_s": round(p20, 4),
            "p50_s": round(p50, 4),
            "p80_s": round(p80, 4),
            "p50_ratio_to_trivial": round(statistics.median(ratios), 2),
            "gradient_error": f"{error:.1e}",
        }
        append("train_step", row)
        print(f"{name:7} {p50:.3f} s a step, {row['p50_ratio_to_trivial']} x the trivial loss")


if __name__ == "__main__":
    main()
