"""Means of heads, norms of changes and restricted changes against their definitions."""

import math
import weakref

import numpy as np
import pytest
import torch

from abft_fast.analysis.attention import head_means
from abft_fast.analysis.cmap import Patcher, ways_of
from abft_fast.analysis.head_rows import head_rows
from abft_fast.analysis.last_row import run_prompt
from abft_fast.analysis.pair import ModelPair, moved
from abft_fast.analysis.restrict import check_changes, check_heads, restricted
from abft_fast.analysis.shift import shifts
from abft_fast.commands.analyze.models import draw_queries
from abft_fast.commands.analyze.show import show
from abft_fast.core.packing import EncodedPrompt
from abft_fast.errors import UserError
from abft_fast.models import loading
from abft_fast.models.merging import changes_of, untie
from abft_fast.models.trainable import add_lora, save_adapter, set_trained
from abft_fast.options import ShowConfig
from abft_fast.options.resolve import resolve
from abft_fast.runtime.progress import Progress
from tests.tiny_models import tiny_model
from tests.unit.test_analysis_cmap import LABELS, prompts

pytestmark = pytest.mark.unit

FAMILIES = ("llama", "gemma3_text", "gpt2", "gpt_neox", "phi3", "qwen2")


def eager_attention(model, ids):
    """(layers, Hq, n), the last row of transformers' own eager attention."""
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_attentions=True, use_cache=False)
    return torch.stack([layer[0, :, -1] for layer in output.attentions]).numpy()


@pytest.mark.parametrize("budget", [20, 10_000])
def test_means_of_heads_are_those_of_eager_attention(budget):
    encoded = prompts(12, 19, 8).prompts
    encoded[1] = EncodedPrompt(encoded[1].input_ids, [1, 4, 9], [True, False, True])
    reference = tiny_model("gemma3_text")
    label, above, correct, induction, first = (np.zeros((4, 4)) for _ in range(5))
    for prompt in encoded:
        rows = eager_attention(reference, prompt.input_ids)
        mass = rows[..., prompt.label_positions].sum(-1)
        right = np.array(prompt.label_positions)[prompt.label_is_correct]
        k = len(prompt.label_positions)
        threshold = k / (k + math.log(len(prompt)))
        label += mass / 3
        above += (mass - threshold) / 3
        correct += rows[..., right].sum(-1) / 3
        induction += (mass > threshold) / 3
        first += rows[..., 0] / 3
    means = head_means(tiny_model("gemma3_text"), encoded, budget)
    pairs = {
        "label_mass": label, "above_threshold": above, "correct_mass": correct,
        "induction": induction, "first_token": first, "correct_share": correct / label,
    }  # fmt: skip
    for name, expected in pairs.items():
        np.testing.assert_allclose(getattr(means, name), expected, rtol=1e-4, atol=1e-6)
    assert 0 < induction.sum() < induction.size


def trained_changes(tmp_path, family, trainable):
    """The base, the changes of an adapter of random numbers, and a model with the adapter on."""
    tuned = set_trained(tiny_model(family), trainable, rank=4)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and (trainable == "full" or "lora_B" in name):
                parameter.add_(0.2 * torch.randn_like(parameter))
    (tmp_path / "adapter").mkdir()
    save_adapter(tuned, tmp_path / "adapter")
    model, changes = changes_of(tiny_model(family), [(tmp_path / "adapter", 1.0)], lambda _: None)
    untie(model)
    return model, changes, tuned


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_have_their_rows(tmp_path, family, trainable):
    """Changing one head's rows of W_Q changes that head's queries alone, in every layout."""
    model, _, _ = trained_changes(tmp_path, family, trainable)
    ids = prompts(11).prompts[0]
    before = run_prompt(model, ids, LABELS)
    for rows in [each for each in head_rows(model) if each.layer == 0]:
        weight = model.get_parameter(rows.name)
        change = rows.keep(torch.randn_like(weight), [1])
        assert torch.equal(rows.of(change)[0], torch.zeros_like(rows.of(change)[0]))
        with moved(model, {rows.name: change}):
            after = run_prompt(model, ids, LABELS)
        query = (after.queries[0].query != before.queries[0].query).any(dim=2)[0].tolist()
        key = (after.kept[0][0] != before.kept[0][0]).any(dim=2).any(dim=0).tolist()
        expected = [False, True] + [False] * (len(rows.rows) - 2)
        assert (query, any(key)) == (expected, False) if rows.projection == "q" else (
            key, any(query)
        ) == (expected, False)  # fmt: skip


@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_restricted_are_the_adapter_and_none_is_the_base(tmp_path, family, trainable):
    model, changes, tuned = trained_changes(tmp_path, family, trainable)
    if family in ("gpt2", "phi3", "gpt_neox"):  # the random numbers, unlike training, move V too
        with pytest.raises(UserError, match="has changed, too"):
            check_changes(model, changes)
        changes = {n: c - _values_only(model, n, c) for n, c in changes.items()}
        tuned = tiny_model(family)
        for name, change in changes.items():
            tuned.get_parameter(name).data += change
    check_changes(model, changes)
    heads = [(layer, head) for layer in range(4) for head in range(4)]
    prompt = prompts(13).prompts[0]
    expected = run_prompt(tuned, prompt, LABELS).logits
    base = run_prompt(model, prompt, LABELS).logits
    with moved(model, restricted(model, changes, heads)):
        torch.testing.assert_close(run_prompt(model, prompt, LABELS).logits, expected)
    with moved(model, restricted(model, changes, [])):
        assert torch.equal(run_prompt(model, prompt, LABELS).logits, base)
    assert (expected - base).abs().max() > 1e-3
    assert torch.equal(run_prompt(model, prompt, LABELS).logits, base)  # all is as before


def _values_only(model, name, change):
    rows = [each for each in head_rows(model) if each.name == name]
    return change - sum(each.keep(change, list(range(len(each.rows)))) for each in rows)


def test_a_key_head_moves_with_each_of_its_query_heads(tmp_path):
    model, changes, _ = trained_changes(tmp_path, "llama", "full")
    kept = restricted(model, changes, [(2, 3)])  # heads 2 and 3 read key head 1
    moved_names = {name for name, change in kept.items() if change.any()}
    assert {name.split("layers.")[1] for name in moved_names} == {
        "2.self_attn.q_proj.weight", "2.self_attn.k_proj.weight"
    }  # fmt: skip
    for rows in [each for each in head_rows(model) if each.layer == 2]:
        parts = rows.of(kept[rows.name]), rows.of(changes[rows.name])
        head = 3 if rows.projection == "q" else 1
        assert torch.equal(parts[0][head], parts[1][head])
        assert parts[0].count_nonzero() == parts[0][head].count_nonzero() > 0


def test_changes_and_heads_that_cannot_be_restricted(tmp_path):
    model, changes, _ = trained_changes(tmp_path, "llama", "full")
    check_changes(model, changes)
    with pytest.raises(UserError, match=r"^model.norm.weight has changed, too"):
        check_changes(model, {**changes, "model.norm.weight": torch.ones(32)})
    with pytest.raises(UserError, match=r"--heads 4.0: the model has the heads 0 to 3 in the lay"):
        check_heads(model, [(0, 3), (4, 0)])


def test_norms_of_changes(tmp_path):
    model, changes, _ = trained_changes(tmp_path, "llama", "full")
    found = {(s.layer, s.projection, s.head): s for s in shifts(model, changes)}
    assert len(found) == 4 * (1 + 4 + 1 + 2)
    name = "model.layers.1.self_attn.k_proj.weight"
    weight, change = model.get_parameter(name).detach(), changes[name]
    whole = found[1, "k", None]
    assert whole.change == pytest.approx(change.norm().item())
    assert whole.weight == pytest.approx(weight.norm().item())
    heads = [found[1, "k", head].change for head in range(2)]
    assert heads[1] == pytest.approx(change[8:].norm().item())
    assert math.hypot(*heads) == pytest.approx(whole.change)
    assert all(s.change == 0 for s in shifts(model, {}))


def test_two_models_are_a_pair_as_an_adapter_is(tmp_path):
    model, changes, tuned = trained_changes(tmp_path, "llama", "lora")
    encoded = prompts(12, 9)
    ways = ways_of(["head"], 4, 4)
    pairs = ModelPair(tuned), ModelPair(tiny_model("llama"), tiny_model("llama")), None
    pairs[1]._tuned.load_state_dict(
        {n: p + changes.get(n, 0) for n, p in tiny_model("llama").state_dict().items()}
    )
    adapter, two, by_changes = (
        Patcher(pair or ModelPair(model, changes=changes)).measure(encoded, ways) for pair in pairs
    )
    for other in (two, by_changes):
        np.testing.assert_allclose(other.log_odds, adapter.log_odds, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(other.giver, adapter.giver, rtol=1e-4, atol=1e-4)


def test_models_of_other_shapes_are_no_pair():
    message = r"^the tuned model and its base have different shapes: .*layers.3"
    with pytest.raises(UserError, match=message):
        ModelPair(tiny_model("llama"), tiny_model("llama", num_hidden_layers=3))


def test_show_holds_one_further_model_at_a_time(tmp_path, monkeypatch):
    folders = []
    for name in ("a", "b", "c"):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        save_adapter(
            add_lora(loading.load("builtin", torch.device("cpu"), torch.float32), 4), folders[-1]
        )
    read, before_a_load, models = loading.load, [], []

    def load(*args):
        before_a_load.append(sum(model() is not None for model in models))
        model = read(*args)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load", load)
    options = {"adapter": folders[0], "also": folders[1:], "output_dir": tmp_path / "out"}
    show(resolve(ShowConfig, {**options, "device": "cpu"}), Progress())
    assert before_a_load == [0] * 3


def test_a_head_that_is_tied_in_one_model_only_is_no_other_shape():
    tied, untied = (tiny_model("llama", tie_word_embeddings=tie) for tie in (True, False))
    ModelPair(tied, untied)
    ModelPair(untied, tied)


@pytest.mark.parametrize("count", [1, 10, 40, 100])
def test_no_query_is_drawn_twice(count):
    """A query that is asked twice must not be in both halves of the prompts, nor count twice."""
    asked = [f"query {i % 40}" for i in range(80)]
    places = draw_queries(asked, count)
    assert places == sorted(places) == draw_queries(asked, count)
    assert len({asked[place] for place in places}) == len(places) == min(count, 40)
    assert set(draw_queries(asked, 1)) <= set(places)
