"""Effects on paths against plain hooks on whole prompts, in float64."""

import numpy as np
import pytest
import torch

from abft_fast import EncodedPrompt
from abft_fast.analysis.effects import log_odds
from abft_fast.analysis.last_row import is_induction, run_prompt
from abft_fast.analysis.path import path_effects, permuted
from abft_fast.core.backbone import attention_layers, output_projections
from tests.tiny_models import tiny_model
from tests.unit.test_analysis_cmap import LABELS

pytestmark = pytest.mark.unit

LAYERS = HEADS = 4
POSITIONS = [2, 5, 9]
CLOSE = 1e-5  # eager attention computes its softmax in float32


def clean_prompt():
    torch.manual_seed(5)
    ids = torch.randint(3, 97, (12,)).tolist()
    for position, token in zip(POSITIONS, (7, 11, 7), strict=True):
        ids[position] = token
    return EncodedPrompt(ids, POSITIONS, [True, False, True])


def model_of(family="llama"):
    more = {} if family == "gpt2" else {"num_key_value_heads": 4}
    return tiny_model(family, **more).double()


def by_hooks(model, ids, edits):
    """Logits, and the last inputs and outputs of modules, with some inputs or outputs edited."""
    seen, handles = {}, []
    projections = output_projections(model)
    for layer, module in attention_layers(model).items():
        name = f"o{layer}"

        def before(_, inputs, name=name):
            x = edits.get(name, lambda x: x)(inputs[0].clone())
            seen[name] = x[0].view(len(ids), HEADS, -1)
            return x, *inputs[1:]

        handles.append(projections[layer].register_forward_pre_hook(before))
        for part in "qkv":
            key = f"{part}{layer}"

            def after(_, inputs, output, key=key):
                x = edits.get(key, lambda x: x)(output.clone())
                seen[key] = x[0].view(len(ids), HEADS, -1)
                return x

            handles.append(getattr(module, f"{part}_proj").register_forward_hook(after))
    with torch.no_grad():
        output = model(torch.tensor([ids]), use_cache=False, output_attentions=True)
    for handle in handles:
        handle.remove()
    seen["attention"] = output.attentions
    return output.logits[0, -1, LABELS], seen


def put(values, position, heads=range(HEADS)):
    """An edit that puts (n, Hq, D) values in at one position and some heads."""

    def edit(x):
        view = x.view(1, x.shape[1], HEADS, -1)
        for head in heads:
            view[0, position, head] = values[position, head]
        return x

    return edit


def chained(*edits):
    def edit(x):
        for each in edits:
            x = each(x)
        return x

    return edit


def corrupting(clean, corrupted, layer, head, position):
    """All heads of a position frozen but the sender, which is the corrupted prompt's."""
    edits = {f"o{i}": put(clean[f"o{i}"], position) for i in range(LAYERS)}
    edits[f"o{layer}"] = chained(edits[f"o{layer}"], put(corrupted[f"o{layer}"], position, [head]))
    return edits


def test_all_paths_against_hooks():
    prompt, label = clean_prompt(), 0
    other = permuted(prompt)
    effects = path_effects(model_of(), prompt, other, label, LABELS)
    reference = model_of()
    row = run_prompt(model_of(), prompt, LABELS)
    receivers = is_induction(row, prompt)
    assert 0 < receivers[1:].sum() < 12
    base, clean = by_hooks(reference, prompt.input_ids, {})
    _, corrupted = by_hooks(reference, other.input_ids, {})
    last = len(prompt) - 1

    def odds(logits):
        return log_odds(logits[None], label)[0]

    for layer in range(LAYERS):
        for head in range(HEADS):
            later = {
                i: [h for h in range(HEADS) if receivers[i, h]] for i in range(layer + 1, LAYERS)
            }
            logits, sent = by_hooks(
                reference, prompt.input_ids, corrupting(clean, corrupted, layer, head, last)
            )
            assert effects.direct[layer, head] == pytest.approx(
                odds(base) - odds(logits), abs=CLOSE
            )
            # the receivers' queries of that run, with their clean keys and values at the last row
            edits = {}
            for i, heads in later.items():
                edits[f"q{i}"] = put(sent[f"q{i}"], last, heads)
                edits[f"k{i}"] = put(clean[f"k{i}"], last, heads)
                edits[f"v{i}"] = put(clean[f"v{i}"], last, heads)
            logits, _ = by_hooks(reference, prompt.input_ids, edits)
            expected = odds(base) - odds(logits)
            assert effects.queries[layer, head] == pytest.approx(expected, abs=CLOSE)
            # the receivers' values at labels, one label after the other, under clean attention
            outputs = {i: clean[f"o{i}"].clone() for i in later}
            for position in POSITIONS:
                _, sent = by_hooks(
                    reference, prompt.input_ids, corrupting(clean, corrupted, layer, head, position)
                )
                for i in later:
                    weight = clean["attention"][i][0, :, last, position, None]
                    outputs[i][last] += weight * (sent[f"v{i}"] - clean[f"v{i}"])[position]
            edits = {f"o{i}": put(outputs[i], last, heads) for i, heads in later.items()}
            logits, _ = by_hooks(reference, prompt.input_ids, edits)
            expected = odds(base) - odds(logits)
            assert effects.values[layer, head] == pytest.approx(expected, abs=CLOSE)
    for effect in effects:
        assert effect.abs().max() > 1e-3
    assert effects.queries[-1].abs().max() < 1e-8 and effects.values[-1].abs().max() < 1e-8


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_head_whose_output_is_not_read_has_no_effect(family):
    model, prompt = model_of(family), clean_prompt()
    width = run_prompt(model, prompt, LABELS).outputs.shape[2]
    with torch.no_grad():
        weight = output_projections(model)[1].weight
        part = slice(2 * width, 3 * width)
        if family == "gpt2":
            weight[part] = 0  # (in, out)
        else:
            weight[:, part] = 0
    effects = path_effects(model, prompt, permuted(prompt), 1, LABELS)
    for effect in effects:
        assert abs(effect[1, 2]) < 1e-9
    assert np.count_nonzero(effects.direct.abs() > 1e-6) == LAYERS * HEADS - 1


def test_the_corrupted_prompt_has_permuted_labels():
    prompt = clean_prompt()
    other = permuted(prompt)
    assert [other.input_ids[i] for i in POSITIONS] == [11, 7, 7]
    assert other.label_is_correct == [False, True, True]
    rest = [i for i in range(12) if i not in POSITIONS]
    assert [other.input_ids[i] for i in rest] == [prompt.input_ids[i] for i in rest]
    ids = [7 if i in POSITIONS else token for i, token in enumerate(prompt.input_ids)]
    assert permuted(EncodedPrompt(ids, POSITIONS, [True] * 3)) is None
