"""Packed evaluation against StaICC's own harness, one prompt at a time."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import EncodedPrompt, attention_behavior_loss, builtin_model_path, data, pack
from abft_fast.core.label_logits import label_logits
from abft_fast.evaluation.behavior import BehaviorMean
from abft_fast.evaluation.inference import predict_labels
from abft_fast.evaluation.last_rows import mean_last_row
from abft_fast.evaluation.staicc_tests import StaiccTest
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


@pytest.mark.slow
@pytest.mark.parametrize("name", data.DATASETS)
def test_predictions_are_those_of_staiccs_harness(builtin, reference, name):
    """One prompt at a time, by its own string, in float32."""
    model, tokenizer = builtin
    dataset = data.load(name)
    [call] = StaiccTest.of("Normal", dataset, 4, "staicc").calls
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


def random_prompts(kinds, labels=(2, 5, 7, 9)):
    return [
        EncodedPrompt(torch.randint(3, 97, (12,)).tolist(), list(labels), [c == "+" for c in kind])
        for kind in kinds
    ]


def test_behavior_mean_by_hand():
    """A prompt whose labels are all of one kind has heads, but no correct share."""
    model = tiny_model("llama")
    kinds = ["+--+", "++++", "-+--", "----", "+++-", "+--+"]
    packed = pack(random_prompts(kinds))
    behavior = attention_behavior_loss(model, packed)
    mean = BehaviorMean()
    mean.add(behavior, packed)
    shares = []
    for r, kind in enumerate(kinds):
        found = behavior.is_induction[:, r]
        if found.any() and len(set(kind)) == 2:
            correct = behavior.correct_mass[:, r][found].sum()
            share = correct / behavior.label_mass[:, r][found].sum()
            shares.append(share.item() - kind.count("+") / 4)
    assert len(shares) > 1
    result = mean.result()
    assert result.induction_heads == pytest.approx(behavior.is_induction.sum().item() / 6)
    assert result.correct_share_above_chance == pytest.approx(sum(shares) / len(shares))
    assert result.label_mass == pytest.approx(behavior.label_mass.mean().item())
    layers = mean.layers()
    for name in ("label_mass", "correct_mass"):
        expected = getattr(behavior, name).mean(dim=(1, 2)).tolist()
        assert layers[name] == pytest.approx(expected)
    assert sum(layers["induction_heads"]) == pytest.approx(result.induction_heads)


@pytest.mark.parametrize("kind", ["++++", "----"])
def test_without_both_kinds_of_labels_there_is_no_share(kind):
    model = tiny_model("llama")
    packed = pack(random_prompts([kind] * 4))
    mean = BehaviorMean()
    mean.add(attention_behavior_loss(model, packed), packed)
    assert mean.result().induction_heads > 0 and mean.result().label_mass > 0
    assert mean.result().correct_share_above_chance is None


@pytest.mark.parametrize("factors", [(0.5, 1.0), (2.0, 0.3)])
def test_the_attention_loss_of_a_mean_is_the_papers(factors):
    """From the masses that any method observes; batches joined are one batch."""
    model = tiny_model("llama")
    prompts = [*random_prompts(["+--+", "++++", "-+--", "----"]), EncodedPrompt([5, 6], [], [])]
    penalty, reward = factors
    loss = attention_behavior_loss(model, pack(prompts), penalty=penalty, reward=reward).loss
    mean = BehaviorMean()
    for part in (prompts[:3], prompts[3:]):
        packed = pack(part)
        mean.add(attention_behavior_loss(model, packed), packed)
    assert mean.attention_loss(penalty, reward) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_the_mean_last_row_is_that_of_eager_attention(family):
    model, eager = tiny_model(family), tiny_model(family)
    eager.set_attn_implementation("eager")
    [prompt] = random_prompts(["+--+"])
    found = mean_last_row(model, prompt)
    output = eager(torch.tensor([prompt.input_ids]), output_attentions=True)
    rows = torch.stack([layer[0, :, -1] for layer in output.attentions])
    rows = rows[..., : len(prompt)]  # GPT-OSS has a sink
    chosen = attention_behavior_loss(model, pack([prompt])).is_induction[:, 0]
    assert chosen.any() and not chosen.all()
    torch.testing.assert_close(torch.tensor(found), rows[chosen].mean(dim=0), rtol=1e-4, atol=1e-6)


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
