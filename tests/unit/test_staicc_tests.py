"""StaICC's tests over our prompts are what its own experimentors, from its own loaders, do."""

import dataclasses
import random
from typing import get_args

import pytest
from StaICC.util import functional
from transformers import AutoTokenizer

from abft_fast import builtin_model_path, data
from abft_fast.data import Dataset, Example
from abft_fast.errors import UserError
from abft_fast.evaluation.evaluation_set import EvaluationSet
from abft_fast.evaluation.staicc_adapter import quiet
from abft_fast.evaluation.staicc_tests import StaiccTest
from abft_fast.options import EvalConfig, TestType
from abft_fast.options.resolve import resolve
from abft_fast.prompts import PromptEncoder, Template
from tests.staicc_reference import parts, staicc_experimentor

pytestmark = pytest.mark.unit

TEST_TYPES = [name for name in get_args(TestType) if name != "LabelFollowing"]  # StaICC's


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(builtin_model_path())


def cut(name, queries):
    """A dataset with its first test examples only."""
    dataset = data.load(name)
    return dataclasses.replace(dataset, test=dataset.test[:queries])


def their_calls(experimentor, answer):
    """The prompts an experimentor asks for, call by call, and its results."""
    calls = []

    def inference(prompt, label_space):
        calls.append(prompt)
        return answer(prompt, label_space)

    with quiet():
        results, success = experimentor(inference, batched_inference=True)
    assert success
    return calls, results


def uniform(prompt, label_space):
    return [[1 / len(label_space)] * len(label_space)] * len(prompt)


@pytest.mark.slow
@pytest.mark.parametrize("test_type", [t for t in TEST_TYPES if t != "UnseenLabel"])
@pytest.mark.parametrize("name", data.DATASETS)
def test_prompts_are_staiccs_own(name, test_type):
    """Every string, under every template, in order.

    Of a bias, whose texts are slow, only as many as show every label, which its metrics need.
    """
    queries = None
    if test_type == "TripletBias":
        queries = 252 if name == "trec" else 40
    found = StaiccTest.of(test_type, cut(name, queries), 4, "staicc").calls
    theirs = []
    for part in parts(test_type):
        theirs += their_calls(staicc_experimentor(part, name, 4, queries), uniform)[0]
    assert len(found) == len(theirs)
    for call, expected in zip(found, theirs, strict=True):
        assert [call.template.render(prompt)[0] for prompt in call.prompts] == expected


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 1, 4, 16])
@pytest.mark.parametrize("name", data.DATASETS)
def test_a_datasets_test_prompts_are_those_of_the_normal_test(name, k):
    dataset = data.load(name)
    [call] = StaiccTest.of("Normal", dataset, k).calls
    assert dataset.test_prompts(k) == call.prompts
    assert {len(prompt.demonstrations) for prompt in call.prompts} == {k}


@pytest.mark.slow
@pytest.mark.parametrize("name", data.DATASETS)
def test_prompts_of_unseen_labels_are_staiccs_own(name):
    """Few, as StaICC takes a millisecond a draw and draws until no label is the query's."""
    k = 1 if name == "hate_speech_18" else 4
    [call] = StaiccTest.of("UnseenLabel", cut(name, 12), k, "staicc").calls
    [expected], _ = their_calls(staicc_experimentor("UnseenLabel", name, k, 12), uniform)
    assert [call.template.render(prompt)[0] for prompt in call.prompts] == expected
    for prompt in call.prompts:
        assert prompt.query.label not in [d.label for d in prompt.demonstrations]


@pytest.mark.slow
@pytest.mark.parametrize("test_type", TEST_TYPES)
@pytest.mark.parametrize("name", ["fp", "tee"])
def test_metrics_are_staiccs_bit_for_bit(name, test_type):
    """Of the same random probabilities; twice, as a run is evaluated before and after."""
    protocol = StaiccTest.of(test_type, cut(name, 64), 4, "staicc")
    words = len(protocol.triplet.template.label_words)
    generator = random.Random(0)
    for _ in range(2):
        given = [
            [functional.softmax([generator.gauss(0, 2) for _ in range(words)]) for _ in c.prompts]
            for c in protocol.calls
        ]
        expected, answers = {}, iter(given)

        def answer(prompt, label_space, answers=answers):
            return next(answers)

        for part in parts(test_type):
            _, expected[part] = their_calls(staicc_experimentor(part, name, 4, 64), answer)
        assert list(protocol.score(given).values()) == flat(test_type, expected)


def flat(test_type, results):
    """StaICC's results as a list in the order of our names."""
    if test_type.endswith("Sensitivity"):
        return [results[test_type]["sensitivity"]["consistency"]]
    if test_type == "TripletBias":
        return [
            value
            for part, first in (("contextual", "entropy"), ("domain", "entropy"),
                                ("post", "DL div."))
            for value in (results[part][first], *results[part]["distribution"])
        ]  # fmt: skip
    names = (
        "accuracy", "macro_F1", "averaged_truelabel_likelihood", "expected_calibration_error_1",
    )  # fmt: skip
    found = results[test_type]
    if test_type == "GLER":
        slopes = [value for name in names for value in found["sensitivity"][name]]
        return slopes + [found[str(rate)][name] for rate in range(5) for name in names]
    return [found[n] for n in names]


@pytest.mark.parametrize("name", data.DATASETS)
def test_labels_are_found_under_every_template(tokenizer, name):
    dataset = cut(name, 6)
    encoder = PromptEncoder(tokenizer, dataset)
    calls = StaiccTest.of("TempSensitivity", dataset, 4).calls
    assert len({call.template for call in calls}) == 9
    for call in calls:
        encoded = encoder.encode(call.prompts, call.template)
        assert encoded.label_ids == encoder.label_ids
        for prompt, found in zip(call.prompts, encoded.prompts, strict=True):
            shown = [tokenizer.decode([found.input_ids[i]]).strip() for i in found.label_positions]
            assert shown == [dataset.label_words[d.label] for d in prompt.demonstrations]


def test_our_form_of_another_template():
    template = Template("text: ", "Label: ", ("good", "bad"), "ours", "Which? ", label_affix="\t")
    prompt = data.Prompt((Example(" fine ", 0),), Example("so so", 1))
    text, [(start, end)] = template.render(prompt)
    assert text == "Which? text: fine Label: good\ttext: so so Label:"
    assert text[start:end] == "good"


def test_queries_know_their_labels_and_pseudo_queries_have_none():
    dataset = cut("subj", 20)
    contextual, domain, post = StaiccTest.of("TripletBias", dataset, 4).calls
    assert [call.measures_behavior for call in (contextual, domain, post)] == [False, False, True]
    assert {p.query.text for p in contextual.prompts} == {""}
    assert all(len(p.query.text.split(" ")) == 128 for p in domain.prompts)
    assert [p.query for p in post.prompts] == list(dataset.test) * 2


def small(labels=(0, 1), **options):
    examples = tuple(Example(f"text {i}", labels[i % len(labels)]) for i in range(12))
    words = ("good", "bad")
    return Dataset(
        "tiny", "text: ", "label: ", words, words, examples, examples, examples, **options
    )  # fmt: skip


@pytest.mark.parametrize(
    ("test_type", "dataset", "k", "message"),
    [
        ("Normal", small(), 13, "k=13: tiny has 12 demonstrations to draw from"),
        ("TempSensitivity", small(), 4, "TempSensitivity: tiny has no alternate templates"),
        ("UnseenLabel", small(), 7, "6 demonstrations of labels other than 'good': lower --k to 6"),
        ("UnseenLabel", small(labels=(0,)), 1, "0 demonstrations of labels other than 'good'"),
        ("GLER", small(), 0, "--k 0: GLER changes demonstrations"),
        ("DemoSensitivity", small(), 0, "--k 0: DemoSensitivity changes demonstrations"),
        (
            "DemoSensitivity",
            dataclasses.replace(small(), test=small().test[:3]),
            2,
            "DemoSensitivity: tiny has 3 test examples, but the test needs 4",
        ),
        ("UnseenLabel", data.load("hate_speech_18"), 12, r"k=12 .* rarely lack a label"),
    ],
)
def test_what_a_dataset_does_not_allow(test_type, dataset, k, message):
    with pytest.raises(UserError, match=message) as caught:
        StaiccTest.of(test_type, dataset, k)
    assert "\n" not in str(caught.value)


def test_gler_refuses_prompts_without_some_of_their_demonstrations(tokenizer):
    given = {"test_type": "GLER", "k": 4, "on_long_prompt": "fewer-demonstrations"}
    config = resolve(EvalConfig, given)
    encoder = PromptEncoder.from_options(config, tokenizer, small(), max_length=24)
    with pytest.raises(UserError, match="GLER counts wrong labels among 4 demonstrations"):
        EvaluationSet(config, small(), encoder, "GLER")


def test_undefined_metrics_are_none():
    dataset = dataclasses.replace(small(), test=small().test[:2])
    protocol = StaiccTest.of("Normal", dataset, 2)
    found = protocol.score([[[0.25, 0.75]] * 4])
    assert found["accuracy"] == 0.5
    assert found["expected_calibration_error"] is None  # fewer prompts than its bins
    dataset = dataclasses.replace(small(), test=small(labels=(0,)).test)
    protocol = StaiccTest.of("TripletBias", dataset, 2)
    found = protocol.score([[[0.25, 0.75]] * 24] * 3)
    assert found["post_divergence"] is None  # a label no query has
    assert found["post_distribution_bad"] == 0.75


def test_prompts_left_out_do_not_count():
    protocol = StaiccTest.of("Normal", small(), 2)
    rows = [[1.0, 0.0], []] * 12  # the queries of every other prompt are `good`
    assert protocol.score([rows])["accuracy"] == 1.0
