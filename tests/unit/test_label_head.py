"""The LM head cut to the label words: same logits, the other rows really gone."""

import gc
import weakref

import pytest
import torch
from torch import nn

from abft_fast import EncodedPrompt
from abft_fast.core.label_logits import keep_label_rows, label_logits
from abft_fast.evaluation.inference import predict_labels
from abft_fast.models.trainable import add_lora
from abft_fast.prompts import EncodedPrompts
from tests.tiny_models import FAMILIES, tiny_model

pytestmark = pytest.mark.unit

LABELS = [90, 7, 11]
UNTIED = {"tie_word_embeddings": False}
MODELS = {
    "llama": ("llama", UNTIED),
    "logit-scale": ("cohere2", {**UNTIED, "logit_scale": 0.25}),
    "soft-cap": ("gemma2", {**UNTIED, "final_logit_softcapping": 3.0}),
    "gpt_neox": ("gpt_neox", UNTIED),
    "bias": ("phi", UNTIED),
}


def prompts():
    return [EncodedPrompt(torch.randint(3, 97, (n,)).tolist(), [1], [True]) for n in (9, 23, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_stay_and_rows_go(name, adapted):
    family, changes = MODELS[name]
    model = tiny_model(family, **changes)
    given = prompts()
    with torch.no_grad():  # a graph would keep the old rows
        before, _, _ = label_logits(model, given, LABELS)
    assert not torch.allclose(before[0], before[1])
    count = sum(p.numel() for p in model.parameters())
    old = weakref.ref(model.get_output_embeddings().weight)
    if adapted:
        model = add_lora(model, rank=2)
    added = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    keep_label_rows(model, LABELS)
    gc.collect()
    assert old() is None
    head = model.get_output_embeddings()
    biases = 94 if head.bias is not None else 0
    assert sum(p.numel() for p in model.parameters()) == count + added - 94 * 32 - biases
    after, _, _ = label_logits(model, given, LABELS)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    again, _, _ = label_logits(model, given, [11, 90])
    torch.testing.assert_close(again, before[:, [2, 0]], rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match="token 8 is not one of the 3 tokens that the LM head has kept"
    ):
        label_logits(model, given, [7, 8])


def test_there_is_a_model_with_a_bias_in_its_head():
    assert tiny_model("phi", **UNTIED).get_output_embeddings().bias is not None


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
def test_a_head_tied_to_the_embeddings_stays(family):
    model = tiny_model(family, tie_word_embeddings=True)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    keep_label_rows(model, LABELS)
    assert torch.equal(model(ids).logits, before)


def test_a_head_that_is_no_plain_linear_map_stays():
    class Other(nn.Linear):
        pass

    model = tiny_model("llama", **UNTIED)
    model.lm_head = Other(32, 97, bias=False)
    keep_label_rows(model, LABELS)
    assert model.lm_head.weight.shape == (97, 32)


def test_dtype_and_frozenness_stay():
    model = tiny_model("llama", **UNTIED).to(torch.bfloat16).requires_grad_(False)
    keep_label_rows(model, LABELS)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.lm_head.weight.shape == (3, 32) and not model.lm_head.weight.requires_grad


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_not_rounded_to_bfloat16(autocast, tied):
    """What bfloat16 hidden states and weights give in float64, to float32's precision."""
    model = tiny_model("gemma2", tie_word_embeddings=tied, final_logit_softcapping=30.0).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = []
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, inputs, output: hidden.append(inputs[0]))
        rows, _, _ = label_logits(model, prompts(), LABELS)
    assert hidden[0].dtype == torch.bfloat16
    exact = hidden[0][0].double() @ head.weight[LABELS].double().T
    torch.testing.assert_close(rows, (30 * (exact / 30).tanh()).float(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(rows, rows.bfloat16().float())
    assert "forward" not in vars(head)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_finds_the_same(family):
    """Of every family, tied or not as it comes."""
    model = tiny_model(family)
    given = EncodedPrompts(prompts() * 4, [0, 1, 2] * 4, label_ids=LABELS)
    before = predict_labels(model, given, 1000)
    keep_label_rows(model, [*LABELS, 3])  # of several datasets
    after = predict_labels(model, given, 1000)
    torch.testing.assert_close(after[0], before[0], rtol=1e-5, atol=1e-5)
    assert after[1].result() == before[1].result()
