"""Packed evaluation against StaICC's own harness, one prompt at a time."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import EncodedPrompt, attention_behavior_loss, builtin_model_path, data, pack
from abft_fast.core.label_logits import label_logits
from abft_fast.evaluation.behavior import BehaviorMean
from abft_fast.evaluation.inference import predict_labels
from abft_fast.evaluation.protocols import Protocol
from abft_fast.prompts import PromptEncoder
from tests.staicc_reference import staicc_probabilities
from tests.tiny_models import FAMILIES, tiny_model

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def builtin():
    path = builtin_model_path()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def reference():
    """The same model, never packed."""
    return AutoModelForCausalLM.from_pretrained(builtin_model_path())


@pytest.mark.parametrize("name", data.DATASETS)
def test_predictions_are_those_of_staiccs_harness(builtin, reference, name):
    """One prompt at a time, by its own string, in float32."""
    model, tokenizer = builtin
    dataset = data.load(name)
    [call] = Protocol.of("Normal", dataset, 4, "staicc").calls
    prompts = call.prompts[:16]
    encoded = PromptEncoder(tokenizer, dataset, form="staicc").encode(prompts)
    logits, _ = predict_labels(model, encoded, token_budget=1000)
    theirs = staicc_probabilities(reference, tokenizer, dataset, call.template, prompts)
    torch.testing.assert_close(logits.softmax(-1), theirs, rtol=0, atol=1e-5)
    assert torch.equal(logits.argmax(-1), theirs.argmax(-1))


def test_neither_token_budget_nor_behavior_changes_predictions(builtin):
    model, tokenizer = builtin
    dataset = data.load("trec")
    encoded = PromptEncoder(tokenizer, dataset).encode(dataset.test_prompts(4)[:30])
    small, heads = predict_labels(model, encoded, token_budget=1)
    large, same_heads = predict_labels(model, encoded, token_budget=10**6)
    alone, none = predict_labels(model, encoded, token_budget=10**6, behavior=False)
    torch.testing.assert_close(small, large, rtol=0, atol=1e-4)
    assert torch.equal(large, alone)
    small, large = heads.result(), same_heads.result()
    assert small.induction_heads == pytest.approx(large.induction_heads) and large.induction_heads
    assert small.correct_share_above_chance == pytest.approx(
        large.correct_share_above_chance, abs=1e-6
    )
    assert none.result().induction_heads == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_label_logits_are_the_familys_own(family):
    """Every family's LM head, with its scale or soft-cap, at each prompt's last token."""
    model = tiny_model(family)
    prompts = [EncodedPrompt(torch.randint(3, 97, (n,)).tolist(), [1], [True]) for n in (9, 23, 4)]
    expected = torch.stack(
        [model(torch.tensor([p.input_ids])).logits[0, -1, [7, 11, 90]] for p in prompts]
    )
    actual, _, _ = label_logits(model, prompts, [7, 11, 90])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_behavior_mean_by_hand():
    model = tiny_model("llama")
    prompts = [
        EncodedPrompt(
            torch.randint(3, 97, (12,)).tolist(), [2, 5, 7, 9], [True, False, False, True]
        )
        for _ in range(6)
    ]
    packed = pack(prompts)
    behavior = attention_behavior_loss(model, packed)
    mean = BehaviorMean()
    mean.add(behavior, packed)
    heads, shares = 0, []
    for r in range(6):
        found = behavior.is_induction[:, r]
        heads += int(found.sum())
        if found.any():
            correct = behavior.correct_mass[:, r][found].sum()
            shares.append((correct / behavior.label_mass[:, r][found].sum() - 0.5).item())
    assert len(shares) > 0
    assert mean.result().induction_heads == pytest.approx(heads / 6)
    assert mean.result().correct_share_above_chance == pytest.approx(sum(shares) / len(shares))


def test_without_induction_heads_there_is_no_share():
    model = tiny_model("llama")
    packed = pack([EncodedPrompt([5, 6, 7], [], [])])
    mean = BehaviorMean()
    mean.add(attention_behavior_loss(model, packed), packed)
    assert mean.result().correct_share_above_chance is None


def test_logits_that_are_not_numbers_are_refused(builtin):
    _, tokenizer = builtin
    model = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    dataset = data.load("trec")
    encoder = PromptEncoder(tokenizer, dataset)
    encoded = encoder.encode(dataset.test_prompts(4)[:3])
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        predict_labels(model, encoded, token_budget=1000)
