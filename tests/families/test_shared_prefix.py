"""Label logits after a prefix that is computed once == those of whole prompts, by every family."""

import pytest
import torch

from abft_fast import EncodedPrompt
from abft_fast.core.label_logits import label_logits
from abft_fast.core.shared_prefix import SharedPrefix, common_prefix
from abft_fast.models.preflight import shared_prefix_is_exact
from abft_fast.models.trainable import add_lora
from tests.families.test_families import nf4_llama, tiny_hybrid
from tests.tiny_models import FAMILIES, tiny_longrope, tiny_model

pytestmark = pytest.mark.families

LABELS = [7, 11, 90]


def random_ids(*lengths):
    return [torch.randint(3, 97, (n,)).tolist() for n in lengths]


def whole(model, prompts):
    """By transformers alone, one prompt at a time."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([ids])).logits[0, -1, LABELS] for ids in prompts])


def assert_close(actual, expected, tolerance=4e-5):
    """Relative to the largest logit, as a logit near 0 is a difference of larger numbers.

    Eager attention in float32 is up to 1e-5 away from float64, by the processor's order of sums.
    """
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("attention", ["auto", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, attention):
    reference, model = tiny_model(family), tiny_model(family)
    # Longer than the window of 7, shorter, of one token; queries longer than it, one of one token.
    for length, lengths in ((29, (11, 1, 17, 8, 30)), (5, (1, 2, 13)), (1, (9,)), (3, (2,))):
        (prefix,) = random_ids(length)
        prompts = [prefix + own for own in random_ids(*lengths)]
        expected = whole(reference, prompts)
        shared = SharedPrefix(model, prefix, attention)
        assert_close(shared.label_logits(prompts, LABELS), expected)
        assert shared.computed == length + sum(lengths)  # and nothing twice
        assert_close(shared.label_logits(prompts[-1:], LABELS), expected[-1:])
        assert shared.computed == length + sum(lengths) + lengths[-1]


@pytest.mark.parametrize("family", ["llama", "smollm3", "gpt2"])
def test_a_shortened_prefix_is_not_computed_again(family):
    model = tiny_model(family)
    first, second = random_ids(20, 30)
    second[:12] = first[:12]
    shared = SharedPrefix(model, first[:15])
    shared.label_logits([first], LABELS)
    shared.shorten(12)
    assert_close(shared.label_logits([second, first], LABELS), whole(model, [second, first]))
    assert shared.computed == 15 + 5 + 18 + 8
    shared.shorten(0)
    third = random_ids(6)
    assert_close(shared.label_logits(third, LABELS), whole(model, third))


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "nf4"])
def test_with_an_adapter(quantized, tmp_path):
    model = nf4_llama(tmp_path) if quantized else tiny_model("llama")
    (prefix,) = random_ids(21)
    prompts = [prefix + own for own in random_ids(7, 3, 12)]
    before = SharedPrefix(model, prefix).label_logits(prompts, LABELS)
    adapted = add_lora(model, rank=4)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    actual = SharedPrefix(adapted, prefix).label_logits(prompts, LABELS)
    assert_close(actual, whole(adapted, prompts))
    assert not torch.allclose(actual, before, rtol=1e-2)


def test_layers_without_attention_are_given_whole_prompts():
    model = tiny_hybrid(["linear_attention", "full_attention"] * 2)
    (prefix,) = random_ids(9)
    prompts = [prefix + own for own in random_ids(4, 6)]
    shared = SharedPrefix(model, prefix)
    assert not shared.can_share(1)
    assert_close(shared.label_logits(prompts, LABELS), whole(model, prompts))
    assert shared.computed == 2 * 9 + 4 + 6


def test_rope_that_depends_on_length_is_given_whole_prompts_beyond_it():
    model = tiny_longrope(switch=20)
    (prefix,) = random_ids(14)
    short, long = ([prefix + own for own in random_ids(*n)] for n in ((6, 3), (7, 3)))
    shared = SharedPrefix(model, prefix)
    assert shared.can_share(20) and not shared.can_share(21)
    assert_close(shared.label_logits(short, LABELS), whole(model, short))
    assert shared.computed == 14 + 9
    assert_close(shared.label_logits(long, LABELS), whole(model, long))


def test_autocast_is_as_for_whole_prompts():
    model = tiny_model("llama")
    (prefix,) = random_ids(30)
    prompts = [prefix + own for own in random_ids(11, 5)]
    exact = whole(model, prompts)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual = SharedPrefix(model, prefix).label_logits(prompts, LABELS).float()
        packed = [EncodedPrompt(ids, [], []) for ids in prompts]
        expected = label_logits(model, packed, LABELS)[0].float()
    assert (actual - exact).norm() <= 2 * (expected - exact).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_before_a_run(family):
    model = tiny_model(family)
    (prefix,) = random_ids(12)
    prompts = [prefix + own for own in random_ids(9, 2, 14)]
    shared = SharedPrefix(model, prefix)
    assert shared_prefix_is_exact(shared, prompts)
    for _, value in shared._kept.values():
        value.add_(0.1)  # as were it of other tokens
    assert not shared_prefix_is_exact(shared, prompts)


def test_prompts_that_do_not_go_on_from_it_are_refused():
    shared = SharedPrefix(tiny_model("llama"), [5, 6, 7])
    for prompts in ([[5, 6, 7, 8], [5, 6, 8, 9]], [[5, 6, 7]], [[5, 6]]):
        with pytest.raises(ValueError, match=rf"prompts\[{len(prompts) - 1}\] does not continue"):
            shared.label_logits(prompts, LABELS)


def test_without_a_prefix():
    model = tiny_model("llama")
    prompts = random_ids(4, 6)
    assert_close(SharedPrefix(model, []).label_logits(prompts, LABELS), whole(model, prompts))


def test_common_prefix():
    assert common_prefix([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]]) == [1, 2]
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == [1, 2]  # each keeps a token
    assert common_prefix([[1, 2, 3, 4], [1, 2]]) == [1]
    assert common_prefix([[1], [1, 2]]) == []
    assert common_prefix([[3, 2], [1, 2]]) == []
