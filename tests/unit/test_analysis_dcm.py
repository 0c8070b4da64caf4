"""Masks over heads are learnt by the true gradient: against plain hooks on whole prompts."""

import random

import pytest
import torch

from abft_fast import data
from abft_fast.analysis.dcm import Case, MaskLearning
from abft_fast.analysis.desiderata import DESIDERATA
from abft_fast.analysis.last_row import run_prompt
from abft_fast.analysis.patching import patched_logits
from abft_fast.core.backbone import output_projections
from abft_fast.data import Example, Prompt
from tests.tiny_models import tiny_model
from tests.unit.test_analysis_cmap import LABELS, prompts

pytestmark = pytest.mark.unit


def cases_of(model, lengths=(17, 21, 12)):
    """Cases whose source is another random prompt; every label is a target."""
    originals = prompts(*lengths).prompts
    sources = prompts(*(n + 1 for n in lengths)).prompts
    return [
        Case(
            original,
            run_prompt(model, original, LABELS),
            run_prompt(model, source, LABELS).outputs,
            target,
            LABELS,
        )
        for target, (original, source) in enumerate(zip(originals, sources, strict=True))
    ]


def by_hooks(model, case, mask):
    """The labels' logits of transformers on the whole prompt, with hooks that mix head outputs."""

    def hook(index):
        def mix(module, inputs):
            x = inputs[0].clone()
            own = x[0, -1].view(mask.shape[1], -1)
            part = mask[index, :, None].to(x)
            mixed = (1 - part) * own + part * case.source[index]
            return (torch.cat([x[:, :-1], mixed.reshape(1, 1, -1)], dim=1), *inputs[1:])

        return mix

    projections = output_projections(model)
    handles = [
        projections[layer].register_forward_pre_hook(hook(index))
        for index, layer in enumerate(sorted(projections))
    ]
    ids = torch.tensor([case.prompt.input_ids])
    logits = model(ids, use_cache=False).logits[0, -1, LABELS]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_oss"])
def test_the_gradient_of_a_mask_against_hooks(family):
    dtype = torch.float32 if family == "gpt_oss" else torch.float64
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    model = tiny_model(family).to(dtype)
    torch.manual_seed(0)
    for case in cases_of(model):
        mask = torch.rand(case.source.shape[:2], dtype=torch.float64, requires_grad=True)
        fast = patched_logits(model, case.prompt, case.original, case.source, mask[None], LABELS)[0]
        slow = by_hooks(model, case, mask)
        torch.testing.assert_close(fast, slow, **tolerance)
        gradients = [torch.autograd.grad(each[case.target], mask)[0] for each in (fast, slow)]
        torch.testing.assert_close(*gradients, **tolerance)
        assert gradients[0].abs().min() > 0


def test_learning_against_a_plain_loop():
    model, learning = tiny_model("llama").double(), MaskLearning(1e-3, 0.1, 12, batch_size=2)
    cases = cases_of(model)
    draw = random.Random("dcm")
    mask = torch.zeros(cases[0].source.shape[:2], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([mask], lr=0.1)
    for _ in range(12):
        batch = draw.sample(cases, 2)
        optimizer.zero_grad()
        logits = [by_hooks(model, case, mask).log_softmax(dim=0)[case.target] for case in batch]
        loss = -sum(logits) / 2
        (loss + 1e-3 * mask.sum()).backward()
        optimizer.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
    learnt = learning.learn(model, cases)
    torch.testing.assert_close(learnt, mask.detach())
    assert 0 < (learnt > 0.5).sum() < learnt.numel()


def test_only_heads_that_help_are_chosen():
    model = tiny_model("llama").double()
    (case, *_) = cases_of(model)
    source = case.original.outputs.clone()
    source[3, 2] = case.source[3, 2]  # in the last layer, so that no other head undoes it
    one = Case(case.prompt, case.original, source, case.target, LABELS)
    mask = torch.zeros(source.shape[:2], dtype=torch.bool)
    both = torch.stack([mask, mask.clone()])
    both[1, 3, 2] = True
    before, after = patched_logits(model, one.prompt, one.original, source, both, LABELS)
    target = int((after - before).argmax())
    assert after[target] > before[target]
    one = Case(case.prompt, case.original, source, target, LABELS)
    learnt = MaskLearning(1e-6, steps=20).learn(model, [one])
    assert (learnt > 0.5).nonzero().tolist() == [[3, 2]]
    assert not MaskLearning(1e6, steps=5).learn(model, [one]).any()
    everything = torch.ones(1, *source.shape[:2], dtype=torch.bool)
    answered = MaskLearning().answers_target(model, one, both)
    assert answered.tolist() == [int(each.argmax()) == target for each in (before, after)]
    assert torch.equal(
        patched_logits(model, one.prompt, one.original, source, everything, LABELS).argmax(),
        after.argmax(),
    )


def prompt_of(labels, query):
    examples = tuple(Example(f"text {i}", label) for i, label in enumerate(labels))
    return Prompt(examples, Example("query", query))


def make(name, prompt, labels=3):
    queries = [Example(f"other {label}", label) for label in range(labels)]
    return DESIDERATA[name](prompt, range(labels), queries, random.Random(0))


def test_label_word():
    source, target = make("label-word", prompt_of([0, 2, 1, 0], 2))
    assert [d.label for d in source.demonstrations] == [1, 0, 2, 1] and target == 0
    assert [d.text for d in source.demonstrations] == [f"text {i}" for i in range(4)]
    assert make("label-word", prompt_of([0, 1, 1, 0], 2)) is None


def test_label_word_among_the_answers_of_one_prompt():
    """As of boxes, whose prompts have other objects each: 7, 3 and 9 here."""
    prompt = prompt_of([7, 3, 9], 9)
    source, target = DESIDERATA["label-word"](prompt, [7, 3, 9], [], random.Random(0))
    assert [d.label for d in source.demonstrations] == [3, 9, 7] and target == 7


def test_position():
    prompt = prompt_of([0, 1, 1, 0, 2], 0)
    source, target = make("position", prompt)
    assert target == 1  # of label 2 there are too few
    assert [d.label for d in source.demonstrations] == [1, 0, 0, 1, 2]
    assert sorted(d.text for d in source.demonstrations) == [f"text {i}" for i in range(5)]
    right = [i for i, d in enumerate(source.demonstrations) if d.label == 0]
    assert {prompt.demonstrations[i].label for i in right} == {target}
    for labels in ([0, 0, 1, 0], [1, 2, 1, 2], [0, 0, 0, 0]):
        assert make("position", prompt_of(labels, 0)) is None


def test_text_prior():
    prompt = prompt_of([0, 1, 1, 0], 0)
    source, target = make("text-prior", prompt)
    assert target == 1 and source.query == Example("other 1", 1)
    assert source.demonstrations == prompt.demonstrations
    assert make("text-prior", prompt_of([0, 0], 0)) is None


@pytest.mark.parametrize("name", list(DESIDERATA))
def test_targets_of_real_prompts_differ_from_the_query_s_label(name):
    dataset = data.load("trec")
    drawn = dataset.test_prompts(8)[:200]
    queries = [prompt.query for prompt in drawn]
    draw = random.Random(1)
    answers = range(len(dataset.label_words))
    made = [DESIDERATA[name](prompt, answers, queries, draw) for prompt in drawn]
    pairs = [(p, d) for p, d in zip(drawn, made, strict=True) if d is not None]
    assert len(pairs) > 50
    assert all(d.target != p.query.label for p, d in pairs)
