"""Patched heads are exact: against plain hooks on whole prompts, in float64."""

import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from abft_kernels import Scores

from abft_fast import EncodedPrompt
from abft_fast.analysis.cmap import Effects, Patcher, Way, curve_ways, halves, ways_of
from abft_fast.analysis.effects import log_odds, recovered
from abft_fast.analysis.last_row import induction_threshold, is_induction, run_prompt
from abft_fast.analysis.pair import ModelPair
from abft_fast.analysis.patching import check_can_patch, patched_logits, replacement
from abft_fast.commands.analyze import pictures
from abft_fast.commands.analyze.cmap import summary
from abft_fast.core.attention_rows import attention_rows
from abft_fast.core.backbone import output_projections, without_peft
from abft_fast.core.packed_forward import LastQueries
from abft_fast.errors import UserError
from abft_fast.models.trainable import add_lora
from abft_fast.options import CmapConfig
from abft_fast.prompts import EncodedPrompts
from tests.families.test_families import tiny_hybrid
from tests.tiny_models import FAMILIES, tiny_model

pytestmark = pytest.mark.unit

LABELS = [7, 11, 90]
SOME = ("llama", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "phi3", "olmo2")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def tiny_pair(family="llama", size=0.3):
    """A float64 model with an adapter of this size; gpt_oss's experts need float32."""
    dtype = torch.float32 if family == "gpt_oss" else torch.float64
    model = add_lora(tiny_model(family), rank=4)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    return ModelPair(model.to(dtype))


def prompts(*lengths):
    """Prompts of the three labels, each twice, with labels at 2 and 5."""
    torch.manual_seed(2)
    encoded = EncodedPrompts(label_ids=LABELS)
    for i, n in enumerate(lengths):
        ids = torch.randint(3, 97, (n,)).tolist()
        encoded.prompts.append(EncodedPrompt(ids, [2, 5], [True, False]))
        encoded.labels.append(i % 3)
    return encoded


def by_hooks(model, ids, edit=None):
    """Logits of the labels and the last row's head outputs, by transformers on the whole prompt."""
    seen = {}

    def hook(layer):
        def change(module, inputs):
            if edit is not None:
                inputs = (edit(layer, inputs[0].clone()), *inputs[1:])
            seen[layer] = inputs[0][0, -1]
            return inputs

        return change

    handles = [
        module.register_forward_pre_hook(hook(layer))
        for layer, module in output_projections(model).items()
    ]
    with torch.no_grad():
        logits = without_peft(model)(torch.tensor([ids]), use_cache=False).logits[0, -1, LABELS]
    for handle in handles:
        handle.remove()
    return logits, torch.stack([seen[layer] for layer in sorted(seen)])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("family", SOME)
def test_every_head_against_hooks(family, reverse):
    pair = tiny_pair(family)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if family == "gpt_oss" else CLOSE
    encoded = prompts(23)  # beyond the window of 7
    (prompt,) = encoded.prompts
    ways = ways_of(["head", "layer"], len(pair.layers), pair.heads)
    receives, gives = (pair.tuned, pair.base) if reverse else (pair.base, pair.tuned)
    patcher = Patcher(pair, reverse=reverse)
    _, _, logits, masks = patcher._patch(prompt, ways, LABELS)
    with gives() as model:
        given_logits, given = by_hooks(model, prompt.input_ids)
    width = given.shape[1] // pair.heads
    with receives() as model:
        for row, way in zip(logits, ways, strict=True):

            def edit(layer, x, heads=way.heads):
                for index, head in heads:
                    if pair.layers[index] == layer:
                        part = slice(head * width, (head + 1) * width)
                        x[0, -1, part] = given[index, part]
                return x

            torch.testing.assert_close(row, by_hooks(model, prompt.input_ids, edit)[0], **tolerance)
        own, _ = by_hooks(model, prompt.input_ids)
    torch.testing.assert_close(logits[0], own, **tolerance)  # no head: the receiving model
    torch.testing.assert_close(logits[1], given_logits, **tolerance)  # every head: the giving one
    assert (own - given_logits).abs().max() > 1e-2
    assert masks.sum(dim=(1, 2)).tolist() == [len(way.heads) for way in ways]


@pytest.mark.parametrize("what", ["pattern", "values"])
def test_pattern_and_values_against_whole_matrices(what):
    pair = tiny_pair("gemma3_text")
    (prompt,) = prompts(17).prompts
    rows = []
    for side in (pair.tuned, pair.base):
        with side() as model:
            rows.append(run_prompt(model, prompt, LABELS))
    giver, receiver = rows
    mixed = replacement(giver, receiver, what)
    attention, values = (giver, receiver) if what == "pattern" else (receiver, giver)
    for index, layer in enumerate(pair.layers):
        for head in range(pair.heads):
            value = values.kept[layer][1][:, head // 2]
            expected = attention.attention()[index, head] @ value
            torch.testing.assert_close(mixed[index, head], expected, **CLOSE)
    torch.testing.assert_close(replacement(receiver, receiver, what), receiver.outputs, **CLOSE)
    assert (mixed - receiver.outputs).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_rows_are_those_that_ran(family):
    """The rows give the heads' outputs again; with GPT-OSS's sinks and Gemma's soft-cap too."""
    (prompt,) = prompts(19).prompts
    row = run_prompt(tiny_model(family), prompt, LABELS)
    mixed = torch.einsum("lhn,lhnd->lhd", row.attention(), row.values())
    torch.testing.assert_close(mixed, row.outputs, rtol=1e-4, atol=1e-5)


def test_attention_rows_are_not_rounded_under_autocast():
    torch.manual_seed(0)
    query, key = 4 * torch.randn(3, 4, 32).bfloat16(), torch.randn(50, 2, 32).bfloat16()
    queries = LastQueries(query, Scores(32**-0.5, None, None), None)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attention_rows(queries, key)
    assert torch.equal(inside, attention_rows(queries, key))


@pytest.mark.parametrize("reverse", [False, True])
def test_weights_that_move_are_not_taken_from_autocasts_cache(reverse):
    """The giver's 16-bit weights stay in it where they want a gradient."""
    model = tiny_model("llama")
    torch.manual_seed(1)
    change = {name: torch.randn_like(p) for name, p in model.named_parameters() if "q_proj" in name}
    assert all(p.requires_grad for p in model.parameters())
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    ends = []
    for context in (autocast, nullcontext):
        pair = ModelPair(model, changes=change)
        patcher = Patcher(pair, reverse=reverse, autocast=context)
        ways = ways_of([], len(patcher.pair.layers), patcher.pair.heads)
        receiver, giver, _, _ = patcher._patch(prompts(12).prompts[0], ways, LABELS)
        ends.append(torch.stack([receiver.logits, giver.logits]))
    rounded, exact = ends
    assert (exact[0] - exact[1]).abs().max() > 1
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.2)


def test_an_adapter_of_zeros_recovers_nothing():
    pair = tiny_pair(size=0.0)
    encoded = prompts(12, 15, 9)
    ways = ways_of(["head", "induction", "other"], len(pair.layers), pair.heads)
    effects = Patcher(pair).measure(encoded, ways)
    np.testing.assert_allclose(
        effects.log_odds, effects.receiver[:, :1].repeat(len(ways), axis=1), rtol=1e-9
    )
    assert {share for pair in effects.recovered() for share in pair} == {(None, None, None)}


def test_induction_and_other_heads_are_all_heads():
    pair = tiny_pair(size=1.0)
    encoded = prompts(12, 15)
    ways = ways_of(["induction", "other"], len(pair.layers), pair.heads)
    effects = Patcher(pair).measure(encoded, ways)
    total = len(pair.layers) * pair.heads
    assert (effects.heads[:, 2] + effects.heads[:, 3] == total).all()
    assert 0 < effects.heads[:, 2].min() < total
    with pair.base() as model:
        row = run_prompt(model, encoded.prompts[0], LABELS)
    mass = row.attention()[..., [2, 5]].sum(-1)
    assert torch.equal(is_induction(row, encoded.prompts[0]), mass > 2 / (2 + np.log(12)))


def test_rows_may_get_different_outputs():
    pair = tiny_pair()
    (prompt,) = prompts(11).prompts
    with pair.base() as model:
        row = run_prompt(model, prompt, LABELS)
        outputs = torch.randn(3, *row.outputs.shape, dtype=torch.float64)
        masks = torch.rand(3, *row.outputs.shape[:2]) < 0.4
        together = patched_logits(model, prompt, row, outputs, masks, LABELS)
        for i in range(3):
            alone = patched_logits(model, prompt, row, outputs[i], masks[i : i + 1], LABELS)
            torch.testing.assert_close(together[i], alone[0], **CLOSE)


def test_recovered_is_a_ratio_of_means_with_an_interval():
    generator = np.random.default_rng(0)
    before, gain = generator.normal(size=400), generator.normal(2, 1, size=400)
    patched = np.stack([before, before + 0.3 * gain, before + gain], axis=1)
    none, some, everything = recovered(patched, before, before + gain)
    assert none == (0, 0, 0)
    assert np.allclose([*some, *everything], [0.3] * 3 + [1] * 3)
    noisy = before + 0.5 * gain + generator.normal(size=400)
    (share,) = recovered(noisy[:, None], before, before + gain)
    # the ratio's own error: 1 / (2 sqrt(400)) = 0.025
    assert share.low < 0.5 < share.high and 0.07 < share.high - share.low < 0.13


def test_a_gain_that_may_be_0_has_no_interval():
    """One prompt of 128 would else give 1 [1, 1]."""
    before, gain = np.zeros(128), np.eye(128)[0]
    (share,) = recovered(gain[:, None], before, gain)
    assert share == (1, None, None)
    ends = np.stack([before, before], axis=1), np.stack([gain, gain], axis=1)
    way, ones = Way("chosen", frozenset({(0, 0), (1, 1)})), np.ones((128, 1))
    effects = Effects([way], gain[:, None], gain[:, None], *ends, 2 * ones)
    assert summary(effects, None, ("of the base", "of the tuned model")) == [
        "accuracy: 0.0 % of the base, 0.8 % of the tuned model",
        "chosen (2.0 heads): 100 % of the log-odds (the gain is not distinguishable from 0)",
    ]


@pytest.mark.parametrize(("groups", "panels"), [("induction,other", 1), ("head", 3), ("layer", 2)])
def test_a_picture_has_panels_of_its_groups(groups, panels):
    """A heatmap's scale is a panel, too."""
    pair = tiny_pair()
    effects = Patcher(pair).measure(
        prompts(12, 15), ways_of(groups.split(","), len(pair.layers), pair.heads)
    )
    config = CmapConfig(adapter="a", groups=groups)
    figure = pictures.cmap(effects, None, pair.layers, pair.heads, config)
    assert len(figure.axes) == panels and all(axes.has_data() for axes in figure.axes)


def test_a_threshold_is_that_of_the_loss():
    assert induction_threshold(4, 100) == 4 / (4 + math.log(100))
    assert (induction_threshold(0, 100), induction_threshold(3, 1)) == (0, 1)


def test_a_curve_has_the_best_heads_and_random_ones():
    ranking = [(layer, head) for layer in range(3) for head in range(4)]
    ways = list(curve_ways(ranking, draws=2))
    tops = [way for way in ways if way.group == "top"]
    assert [len(way.heads) for way in tops] == [1, 2, 4, 8, 12]
    assert all(way.heads == set(ranking[: len(way.heads)]) for way in tops)
    random = [way for way in ways if way.group == "random"]
    assert sorted(len(way.heads) for way in random) == [1, 1, 2, 2, 4, 4, 8, 8]


def test_heads_are_not_ranked_by_the_prompts_that_judge_them():
    first, second = halves(prompts(9, 10, 11, 12, 13))
    assert [len(p) for p in first.prompts] == [9, 11, 13]
    assert [len(p) for p in second.prompts] == [10, 12]
    assert (first.labels, second.labels) == ([0, 2, 1], [1, 0])


def test_the_head_that_carries_the_gain_is_first():
    pair = tiny_pair()
    layers, heads = len(pair.layers), pair.heads
    encoded = prompts(12, 15, 20)
    effects = Patcher(pair).measure(encoded, ways_of(["head"], layers, heads))
    best = effects.ranking()[0]
    singles = effects.log_odds[:, 2:].mean(axis=0).reshape(layers, heads)
    gains = effects.giver[:, 0].mean() > effects.receiver[:, 0].mean()
    assert singles[best] == (singles.max() if gains else singles.min())


def test_models_whose_keys_depend_on_the_whole_prompt_are_refused():
    with pytest.raises(UserError, match="cannot be patched alone"):
        model = tiny_hybrid(["linear_attention", "full_attention"] * 2)
        check_can_patch(model, prompts(20).prompts, LABELS)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_patched(family):
    for what in ("output", "pattern", "values"):
        check_can_patch(tiny_model(family), prompts(12, 15).prompts, LABELS, what)


def test_a_norm_behind_attention_times_values_is_seen():
    model = tiny_model("bitnet", num_key_value_heads=2)
    check_can_patch(model, prompts(12).prompts, LABELS)
    for what in ("pattern", "values"):
        with pytest.raises(UserError, match=f"bitnet: .* {what} cannot be patched"):
            check_can_patch(model, prompts(12).prompts, LABELS, what)
    with pytest.raises(UserError, match=r"diffllama: .* output cannot be patched"):
        model = tiny_model("diffllama", num_key_value_heads=2)
        check_can_patch(model, prompts(12).prompts, LABELS)


def test_log_odds_are_of_one_label_against_all_others():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    expected = [math.log(0.3 / 0.7), math.log(0.8 / 0.2)]
    assert log_odds(probabilities.log(), 1) == pytest.approx(expected, rel=1e-6)
