"""The baselines' loss against transformers' own, one prompt at a time."""

import pytest
import torch
from torch.nn import functional as F

from abft_fast.core.label_logits import keep_label_rows
from abft_fast.core.language_model_loss import (
    TargetedPrompt,
    every_token,
    label_target,
    language_model_loss,
)
from abft_fast.core.packing import EncodedPrompt
from abft_fast.models.trainable import set_trained, trained_parameters
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.unit


def prompts(kind):
    generator = torch.Generator().manual_seed(3)
    found = []
    for n in (9, 23, 1, 17):
        ids = torch.randint(3, 97, (n + 1,), generator=generator).tolist()
        if kind == "label":
            found.append(label_target(EncodedPrompt(ids[:n], [], []), ids[n]))
        else:
            found.append(every_token(ids))
    return found


def plain_loss(model, targeted):
    """By the model's own attention and transformers' loss."""
    losses = []
    for prompt in targeted:
        logits = model(torch.tensor([prompt.input_ids]), use_cache=False).logits[0]
        rows = logits[prompt.target_positions]
        losses.append(F.cross_entropy(rows, torch.tensor(prompt.targets)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["label", "every token"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_loss_and_gradient_are_those_of_one_prompt_at_a_time(family, kind):
    expected_model, model = tiny_model(family), tiny_model(family)
    expected = plain_loss(expected_model, prompts(kind))
    expected.backward()
    found = language_model_loss(model, prompts(kind))
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
        else:
            assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm() + 1e-7, name


def test_it_is_transformers_own_loss():
    model, (prompt, *_) = tiny_model("llama"), prompts("every token")
    ids = torch.tensor([prompt.input_ids])
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(language_model_loss(model, [prompt]).loss, expected)


def test_heads_are_seen_on_the_way():
    prompt = EncodedPrompt([5, 6, 7, 8, 9], [1, 3], [True, False])
    behavior = language_model_loss(tiny_model("llama"), [label_target(prompt, 4)])
    assert behavior.label_mass.shape == (4, 1, 4) and behavior.label_mass.min() > 0


@pytest.mark.parametrize(
    ("trainable", "moved"), [("lora", "lora_"), ("full", "_proj.weight"), ("model", "")]
)
def test_what_is_trained_gets_a_gradient(trainable, moved):
    model = set_trained(tiny_model("llama"), trainable, 4)
    language_model_loss(model, prompts("label")).loss.backward()
    trained = trained_parameters(model)
    assert all(moved in name for name in trained)
    with_gradient = [name for name, p in trained.items() if p.grad is not None and p.grad.any()]
    assert set(with_gradient) >= {name for name in trained if "lora_A" not in name}


def test_a_head_of_label_rows_is_refused():
    model = tiny_model("llama")
    keep_label_rows(model, [4, 5])
    with pytest.raises(ValueError, match="label words' rows only"):
        language_model_loss(model, prompts("label"))


def test_targets_weigh_the_same_however_many_a_prompt_has():
    model = tiny_model("llama")
    long, short = every_token(list(range(3, 40))), TargetedPrompt([5, 6], [], [], [1], [7])
    alone = [language_model_loss(model, [p]).loss for p in (long, short)]
    together = language_model_loss(model, [long, short]).loss
    torch.testing.assert_close(together, torch.stack(alone).mean())
