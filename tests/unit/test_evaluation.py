"""Packed evaluation against StaICC's own harness, one prompt at a time."""

import warnings

import pytest
import torch
from StaICC.prefabricate_inference.model_kernel import standard_ICL_inference_with_torch_Causal_LM
from StaICC.util import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import EncodedPrompt, attention_behavior_loss, builtin_model_path, data, pack
from abft_fast.evaluation import BehaviorMean, evaluate, label_logits, staicc_metrics
from abft_fast.prompts import PromptEncoder, Template
from tests.tiny_models import FAMILIES, tiny_model

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def builtin():
    path = builtin_model_path()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", ["subj", "trec"])
def test_staicc_form_equals_staiccs_harness(builtin, name):
    model, tokenizer = builtin
    dataset = data.load(name)
    prompts = dataset.test_prompts(4)[:40]
    encoder = PromptEncoder(tokenizer, dataset, form="staicc")
    encoded = encoder.encode(prompts)
    rows, _, _ = label_logits(model, encoded.prompts, encoder.label_ids)

    template = Template.of(dataset, "staicc")
    reference = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    theirs = [
        standard_ICL_inference_with_torch_Causal_LM(
            template.render(prompt)[0],
            reference,
            tokenizer,
            list(dataset.staicc_label_words),
            cache_empty=None,
        )
        for prompt in prompts
    ]
    torch.testing.assert_close(
        rows.softmax(-1).double(), torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-5
    )
    metrics, _ = evaluate(model, encoded, encoder.label_ids, token_budget=1000)
    assert metrics.accuracy == functional.accuracy(encoded.labels, theirs)
    assert metrics.macro_f1 == functional.macro_F1(encoded.labels, theirs)
    assert metrics.true_label_likelihood == pytest.approx(
        functional.averaged_truelabel_likelihood(encoded.labels, theirs), abs=1e-5
    )


def test_token_budget_changes_nothing(builtin):
    model, tokenizer = builtin
    dataset = data.load("trec")
    encoder = PromptEncoder(tokenizer, dataset)
    encoded = encoder.encode(dataset.test_prompts(4)[:30])
    small = evaluate(model, encoded, encoder.label_ids, token_budget=1)
    large = evaluate(model, encoded, encoder.label_ids, token_budget=10**6)
    assert small[0].accuracy == large[0].accuracy
    assert small[1].induction_heads == pytest.approx(large[1].induction_heads)
    assert small[1].correct_share_above_chance == pytest.approx(
        large[1].correct_share_above_chance, abs=1e-6
    )


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


def test_metrics_are_staiccs():
    logits = torch.randn(50, 3)
    labels = torch.randint(0, 3, (50,)).tolist()
    probabilities = [functional.softmax(row) for row in logits.tolist()]
    metrics = staicc_metrics(labels, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.expected_calibration_error == functional.expected_calibration_error_1(
            labels, probabilities
        )
    assert metrics.accuracy == functional.accuracy(labels, probabilities)


def test_logits_that_are_not_numbers_are_refused(builtin):
    _, tokenizer = builtin
    model = AutoModelForCausalLM.from_pretrained(builtin_model_path())
    dataset = data.load("trec")
    encoder = PromptEncoder(tokenizer, dataset)
    encoded = encoder.encode(dataset.test_prompts(4)[:3])
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError):
        evaluate(model, encoded, encoder.label_ids, token_budget=1000)
