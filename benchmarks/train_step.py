"""What a step's gradient costs: packed, against eager attention matrices one prompt at a time.

    python benchmarks/train_step.py [--dataset subj] [--rounds 10]
    python benchmarks/train_step.py --layers 6 --width 512 --length 4096 --prompts 1 --rounds 3
    python benchmarks/train_step.py --layers 6 --width 512 --length 150 --prompts 32

On the built-in model and 32 prompts of a dataset, or on a random Llama and prompts of one length,
the head filter off, as a random model has no induction heads. Contenders take turns in one process;
`trivial` is the packed forward and backward of the backbone with the mean of its last hidden states
as the loss; it is no strict floor, as our loss needs no backward of the last layer's V, O and MLP.
Before anything is timed, packed and eager gradients are compared. Then each contender's most memory
is measured in a process of its own, beyond model and prompts. A row a contender goes to results/.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import subprocess
import sys
import time

import torch
from record import append, high_water_mark, reset_high_water_mark, spread, where
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from abft_fast import EncodedPrompt, attention_behavior_loss, builtin_model_path, data, pack
from abft_fast.attention import PackedForward
from abft_fast.backbone import backbone, query_key_projections
from abft_fast.objective import run_packed
from abft_fast.prompts import PromptEncoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def eager_gradient(model, prompts, head_filter):
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
            induction = on_labels.sum(dim=-1) > k / (k + math.log(n)) if head_filter else 1.0
            wrong = on_labels[:, ~correct].sum(dim=-1)
            loss += ((0.5 * wrong + (1 - on_labels[:, correct]).sum(dim=-1)) * induction).sum()
        (loss / len(prompts)).backward()


def packed_gradient(model, prompts, head_filter, gradient="full"):
    """Ours."""
    attention_behavior_loss(
        model, pack(prompts), head_filter=head_filter, gradient=gradient
    ).loss.backward()


def trivial(model, prompts, head_filter):
    """The packed pass with nothing of ours in it but the packing."""
    unlabeled = [EncodedPrompt(prompt.input_ids, [], []) for prompt in prompts]
    forward = PackedForward(pack(unlabeled), {"penalty": 0.0, "reward": 0.0})
    run_packed(backbone(model), forward).last_hidden_state.mean().backward()


CONTENDERS = {
    "eager": eager_gradient,
    "packed": packed_gradient,
    "packed, local": functools.partial(packed_gradient, gradient="local"),
    "trivial": trivial,
}


def prepared(options, implementation):
    """Model and prompts."""
    if options.layers:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
            num_hidden_layers=options.layers, num_attention_heads=options.width // 64,
            num_key_value_heads=max(1, options.width // 256),
            max_position_embeddings=options.length,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        every = options.length // 5
        labels = [every * (i + 1) - 1 for i in range(4)]
        prompts = [
            EncodedPrompt(torch.randint(512, (options.length,)).tolist(), labels, [True, False] * 2)
            for _ in range(options.prompts)
        ]
    else:
        dataset = data.load(options.dataset)
        encoder = PromptEncoder(AutoTokenizer.from_pretrained(builtin_model_path()), dataset)
        prompts = encoder.encode(dataset.training_prompts(4, options.prompts, 0)).prompts
        model = AutoModelForCausalLM.from_pretrained(
            builtin_model_path(), attn_implementation=implementation
        )
    model.to(DEVICE).requires_grad_(False)
    for projection in query_key_projections(model):
        projection.module.weight.requires_grad_()
    return model, prompts


def gradient_of(contender, model, prompts, head_filter):
    model.zero_grad()
    contender(model, prompts, head_filter)
    return torch.cat([p.module.weight.grad.flatten() for p in query_key_projections(model)])


def memory_of(name, options):
    """Most bytes of a step, by this file in a process of its own."""
    run = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--memory-of", name],
        # Freed tensors go back to the system at once, so that later ones count again.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="subj")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=0, help="of a random Llama")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--length", type=int, default=150)
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    head_filter = not options.layers
    if options.memory_of:
        name = options.memory_of
        model, prompts = prepared(options, "eager" if name == "eager" else "sdpa")
        contender = CONTENDERS[name]
        short = EncodedPrompt(prompts[0].input_ids[:32], [5, 9], [True, False])
        contender(model, [short], head_filter)  # gradients, and what libraries take once
        reset_high_water_mark(DEVICE)
        before = high_water_mark(DEVICE)
        contender(model, prompts, head_filter)
        print(high_water_mark(DEVICE) - before)
        return
    eager, prompts = prepared(options, "eager")
    packed, _ = prepared(options, "sdpa")
    expected = gradient_of(eager_gradient, eager, prompts, head_filter)
    found = gradient_of(packed_gradient, packed, prompts, head_filter)
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= 1e-4:
        raise SystemExit(f"packed and eager gradients differ by {error:.1e}: nothing is timed")

    seconds = {name: [] for name in CONTENDERS}
    for round_ in range(options.rounds + 1):
        for name, contender in CONTENDERS.items():
            model = eager if name == "eager" else packed
            model.zero_grad()
            started = time.perf_counter()
            contender(model, prompts, head_filter)
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if round_:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - started)
    del eager, packed, model
    peaks = {name: memory_of(name, options) for name in CONTENDERS}
    for name, values in seconds.items():
        p20, p50, p80 = spread(values)
        ratios = {
            other: statistics.median(a / b for a, b in zip(values, theirs, strict=True))
            for other, theirs in seconds.items()
        }
        row = {
            **where(DEVICE),
            "model": f"{options.layers} x {options.width}" if options.layers else "builtin",
            "prompts": len(prompts),
            "tokens": sum(map(len, prompts)),
            "contender": name,
            "p20_s": round(p20, 4),
            "p50_s": round(p50, 4),
            "p80_s": round(p80, 4),
            "p50_ratio_to_trivial": round(ratios["trivial"], 2),
            "p50_ratio_to_eager": round(ratios["eager"], 3),
            "peak_bytes": peaks[name],
            "gradient_error": f"{error:.1e}",
        }
        append("train_step", row)
        print(
            f"{name:13} {p50:7.3f} s a step, {ratios['trivial']:5.2f} x the trivial loss, "
            f"{1 / ratios['eager']:5.2f} x as fast as eager, {peaks[name] / 2**20:6.0f} MiB"
        )


if __name__ == "__main__":
    main()
