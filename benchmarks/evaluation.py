"""What a test costs: packed, against StaICC's own harness, one prompt at a time.

    OMP_NUM_THREADS=1 pytest benchmarks/evaluation.py [-k sst2] [--rounds 3]

On the built-in model, and on those of `make real-models`, in float32 and StaICC's form of prompts,
which its harness knows alone, text to metrics; each contender answers all prompts. `harness` is
StaICC's `standard_ICL_inference_with_torch_Causal_LM`, `padded` transformers in batches of 16 of
like lengths, with logits at last tokens alone, `packed` what `abft-fast eval` does, which also
looks at heads, `predictions` the same without. Probabilities must be equal to 1e-5, predictions and
accuracy the same, on all prompts. The floor is by arithmetic, the harness's time over
`floor_ratio`: multiplications of its weights over those that no packed forward can leave out, those
of the layers' weights (not the LM head's, but at last tokens); it is passed where packing also
saves what each call costs beside them. On a CPU seconds are of the processor, as a machine may be
shared, beside the least by the clock on the wall.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from StaICC.prefabricate_inference.model_kernel import standard_ICL_inference_with_torch_Causal_LM
from StaICC.util import functional

from abft_fast import data
from abft_fast.evaluation.inference import predict_labels
from abft_fast.evaluation.staicc_tests import METRICS, StaiccTest
from abft_fast.prompts import PromptEncoder
from abft_fast.runtime.token_budget import tokens_at_once
from benchmarks import stored
from benchmarks.paired import compare, wall_seconds
from benchmarks.record import DEVICE, GPU, append, quick_first
from benchmarks.step_contenders import Padded


class Case(NamedTuple):
    """The first prompts of a dataset's test, asked of a model."""

    dataset: str
    prompts: int
    model: str = stored.BUILTIN

    def __str__(self) -> str:
        return f"{self.model}-{self.dataset}-{self.prompts}"


SMALL, WHOLE = Case("sst2", 128), Case("sst2", 1024)
CASES = [
    SMALL,
    WHOLE,
    *(Case(name, 128) for name in data.DATASETS if name != "sst2"),
    *(Case(name, 64, model) for model in stored.REAL for name in ("sst2", "trec")),
]
CONTENDERS = ("harness", "padded", "packed", "predictions")
BATCH = 16
QUICK = (SMALL, WHOLE) if GPU else (SMALL,)


class Test:
    """A case's prompts, and every contender: a function to probabilities of the label words."""

    def __init__(self, case: Case):
        # Twice: ours stays set to packed attention.
        self.model, self.reference = (stored.load(case.model) for _ in range(2))
        self.reference.set_attn_implementation("sdpa")
        self.tokenizer = stored.read_tokenizer(case.model)
        self.dataset = data.load(case.dataset)
        [self.call] = StaiccTest.of("Normal", self.dataset, 4, "staicc").calls
        self.prompts = self.call.prompts[: case.prompts]
        self.tokens = sum(map(len, self.encoded().prompts))

    def encoded(self):
        return PromptEncoder(self.tokenizer, self.dataset, form="staicc").encode(self.prompts)

    def harness(self) -> list[list[float]]:
        words = list(self.dataset.staicc_label_words)
        return [
            standard_ICL_inference_with_torch_Causal_LM(
                self.call.template.render(prompt)[0],
                self.reference,
                self.tokenizer,
                words,
                cache_empty=None,
            )
            for prompt in self.prompts
        ]

    @torch.no_grad()
    def padded(self) -> list[list[float]]:
        encoded = self.encoded()
        longest_first = sorted(range(len(self.prompts)), key=lambda i: -len(encoded.prompts[i]))
        found: list[list[float]] = [[] for _ in self.prompts]
        for start in range(0, len(self.prompts), BATCH):
            batch = longest_first[start : start + BATCH]
            rows = Padded.of([encoded.prompts[i].input_ids for i in batch])
            logits = self.reference(**rows._asdict(), logits_to_keep=1, use_cache=False).logits
            for i, row in zip(batch, logits[:, -1, encoded.label_ids].tolist(), strict=True):
                found[i] = functional.softmax(row)
        return found

    def packed(self, behavior: bool = True) -> list[list[float]]:
        tokens = tokens_at_once("auto", DEVICE)
        logits, _ = predict_labels(self.model, self.encoded(), tokens, behavior=behavior)
        return [functional.softmax(row) for row in logits.tolist()]

    def predictions(self) -> list[list[float]]:
        return self.packed(behavior=False)

    def check(self) -> float:
        """The largest difference of probabilities; nothing is timed unless results are the same."""
        truth = [prompt.query.label for prompt in self.prompts]
        expected = self.harness()
        theirs = torch.tensor(expected, dtype=torch.float64)
        worst = 0.0
        for found in (self.padded(), self.packed(), self.predictions()):
            ours = torch.tensor(found, dtype=torch.float64)
            worst = max(worst, (ours - theirs).abs().max().item())
            assert worst <= 1e-5, f"probabilities differ by {worst:.1e}"
            assert torch.equal(ours.argmax(-1), theirs.argmax(-1)), "other predictions"
            assert METRICS["accuracy"](truth, found) == METRICS["accuracy"](truth, expected)
        return worst

    def floor_ratio(self) -> float:
        """Multiplications of the harness over those of the layers alone."""
        head = self.reference.lm_head.weight.numel()
        layers = sum(p.numel() for p in self.reference.model.layers.parameters() if p.dim() == 2)
        return (layers + head) / layers


@pytest.mark.parametrize("case", quick_first(CASES, QUICK))
def bench_evaluation(case, benchmark, rounds):
    stored.skip_if_missing(case.model)
    test = Test(case)
    difference = test.check()
    contenders = {name: getattr(test, name) for name in CONTENDERS}
    wall = {run: [] for run in contenders.values()}

    def processor_seconds(run: Callable[[], object]) -> float:
        began = time.process_time()
        wall[run].append(wall_seconds(run))
        return wall[run][-1] if GPU else time.process_time() - began

    found = compare(
        benchmark, contenders, floor="harness", baseline="harness", rounds=rounds(3),
        clock=processor_seconds,
    )  # fmt: skip
    ratio = test.floor_ratio()
    for name, timed in found.items():
        timing = timed.over_part("harness, multiplications left", ratio)
        row = {
            **case._asdict(),
            "tokens": test.tokens,
            "clock": "wall" if GPU else "processor",
            "contender": name,
            **timing.columns(),
            "wall_seconds_least": round(min(wall[contenders[name]][1:]), 3),
            "floor_ratio": round(ratio, 2),
            "largest_difference": f"{difference:.1e}",
        }
        append("evaluation", row)
        print(f"{case} {name:12} {timing.seconds.p50:8.3f} s, {timing.speedup.p50:.2f} x harness")
