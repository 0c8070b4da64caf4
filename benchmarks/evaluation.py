"""What a test costs: packed, against StaICC's own harness, one prompt at a time.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py [--dataset subj] [--rounds 3] [--prompts 1024]

On the built-in model in float32 and StaICC's form of prompts, which its harness knows alone, text
to metrics. Contenders take turns; each answers all prompts once a round. `harness` is StaICC's
`standard_ICL_inference_with_torch_Causal_LM`, `packed` what `abft-fast eval` does, which also looks
at heads, `predictions` the same without. Nothing is recorded unless probabilities are equal to
1e-5 and predictions and accuracy the same, on all prompts. `floor_ratio` is by arithmetic alone:
multiplications of the harness's weights over those that no packed forward can leave out, those of
the layers' weights (not the LM head's, but at last tokens). Processor time tells more than wall
time where a machine is shared: both are in results/, a row a contender.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from record import append, spread, where
from StaICC.prefabricate_inference.model_kernel import standard_ICL_inference_with_torch_Causal_LM
from StaICC.util import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import builtin_model_path, data
from abft_fast.evaluation import predict
from abft_fast.prompts import PromptEncoder
from abft_fast.protocols import METRICS, Protocol
from abft_fast.token_budget import CPU_TOKENS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def models():
    """The built-in model, twice: ours stays set to packed attention."""
    path = builtin_model_path()
    loaded = [AutoModelForCausalLM.from_pretrained(path).to(DEVICE).eval() for _ in range(2)]
    return *loaded, AutoTokenizer.from_pretrained(path)


def contenders(dataset, call, count):
    """Functions from nothing to probabilities of the label words."""
    model, reference, tokenizer = models()
    prompts = call.prompts[:count]

    def harness():
        words = list(dataset.staicc_label_words)
        return [
            standard_ICL_inference_with_torch_Causal_LM(
                call.template.render(prompt)[0], reference, tokenizer, words, cache_empty=None
            )
            for prompt in prompts
        ]

    def packed(behavior=True):
        encoded = PromptEncoder(tokenizer, dataset, form="staicc").encode(prompts)
        logits, _ = predict(model, encoded, CPU_TOKENS, behavior=behavior)
        return [functional.softmax(row) for row in logits.tolist()]

    tokens = sum(map(len, PromptEncoder(tokenizer, dataset, form="staicc").encode(prompts).prompts))
    head = reference.lm_head.weight.numel()
    layers = sum(p.numel() for p in reference.model.layers.parameters() if p.dim() == 2)
    floor = (layers + head) / layers
    found = {"harness": harness, "packed": packed, "predictions": lambda: packed(behavior=False)}
    return found, tokens, floor


def check(truth, found):
    """The largest difference of probabilities; an error where results differ."""
    theirs = torch.tensor(found["harness"], dtype=torch.float64)
    worst = 0.0
    for name, rows in found.items():
        ours = torch.tensor(rows, dtype=torch.float64)
        worst = max(worst, (ours - theirs).abs().max().item())
        if worst > 1e-5 or not torch.equal(ours.argmax(-1), theirs.argmax(-1)):
            raise SystemExit(f"{name}: probabilities differ by {worst}")
        accuracies = {METRICS["accuracy"](truth, rows) for rows in (rows, found["harness"])}
        if len(accuracies) > 1:
            raise SystemExit(f"{name}: accuracies {accuracies}")
    return worst


def measure(name, count, rounds):
    """Print and append a row for each contender."""
    dataset = data.load(name)
    [call] = Protocol.of("Normal", dataset, 4, "staicc").calls
    functions, tokens, floor = contenders(dataset, call, count)
    truth = [prompt.query.label for prompt in call.prompts[:count]]
    wall, processor = ({which: [] for which in functions} for _ in range(2))
    found = {}
    for _ in range(rounds):
        for which, function in functions.items():
            began = time.perf_counter(), time.process_time()
            found[which] = function()
            wall[which].append(time.perf_counter() - began[0])
            processor[which].append(time.process_time() - began[1])
    difference = check(truth, found)
    expected = statistics.median(processor["harness"])
    for which in functions:
        p20, p50, p80 = spread(processor[which]) if rounds > 1 else processor[which] * 3
        row = {
            **where(DEVICE),
            "dataset": name,
            "prompts": len(truth),
            "tokens": tokens,
            "contender": which,
            "rounds": rounds,
            "processor_seconds_p20": round(p20, 3),
            "processor_seconds_p50": round(p50, 3),
            "processor_seconds_p80": round(p80, 3),
            "wall_seconds_least": round(min(wall[which]), 3),
            "ratio": round(expected / p50, 2),
            "floor_ratio": round(floor, 2),
            "largest_difference": f"{difference:.1e}",
        }
        append("evaluation", row)
        print(f"{name} {which}: {p50:.2f} s of processor, ratio {expected / p50:.2f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", nargs="+", default=["subj"], choices=data.DATASETS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=1024)
    options = parser.parse_args()
    for name in options.dataset:
        measure(name, options.prompts, options.rounds)


if __name__ == "__main__":
    main()
