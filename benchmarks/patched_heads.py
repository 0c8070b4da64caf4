"""Patch every head of a model alone: one token a head against one whole prompt a head.

    python -m benchmarks.patched_heads [MODEL [DATASET [PROMPTS]]]

The two first agree. Then they take turns, prompt by prompt; the ratio of the sums is printed.
"""

import sys
import time

import torch

from abft_fast import data
from abft_fast.analysis.cmap import ways_of
from abft_fast.analysis.last_row import run_prompt
from abft_fast.analysis.patching import patched_logits
from abft_fast.core.backbone import attention_layers, backbone, output_projections
from abft_fast.core.label_logits import keep_label_rows
from abft_fast.models import loading
from abft_fast.prompts import PromptEncoder


def whole_prompts(model, prompt, outputs, masks, label_ids):
    """The naive way: the whole prompt again for each head, with plain hooks."""
    rows = []
    for mask in masks:
        handles = []
        for index, module in enumerate(output_projections(model).values()):

            def put(module, inputs, index=index, mask=mask):
                x = inputs[0].clone()
                last = x[0, -1].view(mask.shape[1], -1)
                last[mask[index]] = outputs[index][mask[index]]
                return x, *inputs[1:]

            handles.append(module.register_forward_pre_hook(put))
        with torch.no_grad():
            rows.append(run_prompt(model, prompt, label_ids).logits)
        for handle in handles:
            handle.remove()
    return torch.stack(rows)


def one_token_a_head(model, prompt, outputs, masks, label_ids):
    """This library's way, with the prompt's own forward, whose keys and values it needs."""
    target = run_prompt(model, prompt, label_ids)
    with torch.no_grad():
        return patched_logits(model, prompt, target, outputs, masks, label_ids)


def main(name="builtin", dataset="subj", count="8"):
    model = loading.load(name, torch.device("cpu"), torch.float32).eval()
    tokenizer, chosen = loading.read_tokenizer(name), data.load(dataset)
    encoder = PromptEncoder(tokenizer, chosen)
    prompts = encoder.encode(chosen.test_prompts(4)[: int(count)]).prompts
    keep_label_rows(model, encoder.label_ids)
    layers, heads = len(attention_layers(model)), backbone(model).config.num_attention_heads
    ways = [way for way in ways_of(["head"], layers, heads) if way.group == "head"]
    masks = torch.zeros(len(ways), layers, heads, dtype=torch.bool)
    for row, way in enumerate(ways):
        masks[row][next(iter(way.heads))] = True
    seconds = {one_token_a_head: [], whole_prompts: []}
    for turn, prompt in enumerate(prompts):
        own = run_prompt(model, prompt, encoder.label_ids).outputs
        outputs = own.flip(1)  # another head's output
        logits = []
        for way, times in seconds.items():
            start = time.perf_counter()
            logits.append(way(model, prompt, outputs, masks, encoder.label_ids))
            times.append(time.perf_counter() - start)
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
        if turn == 0:  # it warms up
            for times in seconds.values():
                times.clear()
    fast, naive = (sum(times) / len(times) for times in seconds.values())
    tokens = sum(map(len, prompts)) / len(prompts)
    print(
        f"{name}, {dataset}: {len(ways)} heads, {tokens:.0f} tokens a prompt: "
        f"{fast:.3f} s a prompt, naive {naive:.3f} s, {naive / fast:.1f} times as fast"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
