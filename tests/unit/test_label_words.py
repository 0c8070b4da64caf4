"""Label words that change from prompt to prompt, in training and in the test of them."""

import dataclasses
import re
from collections import Counter

import pytest
import scipy.stats

from abft_fast import data
from abft_fast.errors import UserError
from abft_fast.evaluation.intervals import wilson
from abft_fast.evaluation.label_following import LabelFollowing
from abft_fast.models import loading
from abft_fast.options import EvalConfig, TrainConfig
from abft_fast.options.resolve import resolve
from abft_fast.prompts import PromptEncoder
from abft_fast.prompts.symbols import draw_symbols
from abft_fast.training.label_words import encode_with_drawn_labels
from abft_fast.training.method_prompts import shares
from abft_fast.training.methods import training_prompts

pytestmark = pytest.mark.unit

TOKENIZER = loading.read_tokenizer("builtin")


def prompts_of(dataset="trec", **options):
    config = resolve(TrainConfig, {"dataset": dataset, "train_samples": 64, **options})
    loaded = data.load(dataset)
    encoder = PromptEncoder.from_options(config, TOKENIZER, loaded, 2048)
    return training_prompts(config, loaded, encoder).prompts, encoder


def words_of(prompt):
    return [TOKENIZER.decode([prompt.input_ids[i]]).strip() for i in prompt.label_positions]


@pytest.mark.parametrize("method", ["ABFT", "E2E"])
def test_permuted_labels_are_a_bijection_in_each_prompt(method):
    own, encoder = prompts_of(method=method)
    permuted, _ = prompts_of(method=method, training_labels="permuted")
    moved = 0
    for before, after in zip(own, permuted, strict=True):
        assert after.label_is_correct == before.label_is_correct
        pairs = set(zip(words_of(before), words_of(after), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert {b for _, b in pairs} <= set(encoder.template.label_words)
        moved += any(a != b for a, b in pairs)
        if method == "E2E":
            right = [
                i for i, c in zip(after.label_positions, after.label_is_correct, strict=True) if c
            ]
            assert {after.input_ids[i] for i in right} <= set(after.targets)
    assert moved > 32
    targets = Counter(prompt.targets[0] for prompt in permuted) if method == "E2E" else {}
    assert all(token in encoder.label_ids for token in targets)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["ours", "staicc"])
def test_symbols_mean_nothing_in_their_prompt(form):
    own, encoder = prompts_of(method="E2E", prompt_form=form)
    changed, _ = prompts_of(method="E2E", prompt_form=form, training_labels="symbols")
    used = Counter()
    for before, after in zip(own, changed, strict=True):
        assert after.label_is_correct == before.label_is_correct
        words = words_of(after)
        shown = TOKENIZER.decode(before.input_ids).lower()
        assert not set(words) & set(re.findall("[a-z]+", shown))
        assert len(set(words)) == len(set(words_of(before)))
        target = TOKENIZER.decode(after.targets).strip()
        assert [word == target for word in words] == after.label_is_correct
        used.update(set(words))
    assert set(used) <= set(encoder.symbols.training)
    assert max(used.values()) < 6 and len(used) > 100  # new ones in each prompt


@pytest.mark.slow
def test_words_of_tests_are_never_trained_on():
    encoders = [PromptEncoder(TOKENIZER, data.load(name)) for name in data.DATASETS]
    training = {word for encoder in encoders for word in encoder.symbols.training}
    tested = {word for encoder in encoders for word in encoder.symbols.test}
    assert training and tested and not training & tested
    taken = {word for name in data.DATASETS for word in data.load(name).label_words}
    assert not taken & (training | tested)


def test_mixed_takes_own_labels_by_their_share():
    own, _ = prompts_of()
    kept = {}
    for share in (0, 0.5, 1):
        mixed, _ = prompts_of(training_labels="mixed", own_labels_share=share)
        kept[share] = sum(a == b for a, b in zip(own, mixed, strict=True))
    assert kept[0] < 8 and 20 < kept[0.5] < 50 and kept[1] == 64


@pytest.mark.slow
def test_the_draw_depends_on_the_seed_alone():
    for labels in ("permuted", "symbols", "mixed"):
        first, _ = prompts_of(training_labels=labels)
        again, _ = prompts_of(training_labels=labels)
        other, _ = prompts_of(training_labels=labels, seed=1)
        assert first == again != other


@pytest.mark.parametrize("labels", ["permuted", "symbols", "mixed"])
def test_the_same_prompts_get_other_labels_by_another_seed(labels):
    dataset = data.load("trec")
    encoder = PromptEncoder(TOKENIZER, dataset)
    prompts = dataset.training_prompts(4, 16, 0)
    encoded = [
        encode_with_drawn_labels(
            resolve(TrainConfig, {"training_labels": labels, "seed": seed}),
            dataset, encoder, prompts,
        ).prompts
        for seed in (0, 1)
    ]  # fmt: skip
    assert encoded[0] != encoded[1]


def test_a_symbol_is_no_word_of_its_prompt():
    prompt = data.load("subj").training_prompts(2, 1, 0)[0]
    used = re.findall("[a-z]+", prompt.query.text.lower())
    words = (*used, "alpha", "beta")
    for seed in map(str, range(20)):
        [drawn] = draw_symbols([prompt], 2, words, seed)
        assert {words[index] for index in drawn} == {"alpha", "beta"}


def test_what_cannot_change_is_refused():
    with pytest.raises(UserError, match="PICL trains on plain text"):
        resolve(TrainConfig, {"method": "PICL", "training_labels": "permuted"})
    few = data.load("subj").training_prompts(4, 3, 0)
    with pytest.raises(UserError, match="the tokenizer has 2 words of one token"):
        draw_symbols(few, 3, ("alpha", "beta"), "seed")
    with pytest.raises(UserError, match="--calibration contextual is for the dataset's own"):
        resolve(EvalConfig, {"test_type": "LabelFollowing", "calibration": "contextual"})
    with pytest.raises(UserError, match="--k 0: LabelFollowing"):
        resolve(EvalConfig, {"test_type": "LabelFollowing", "k": 0})
    dataset = dataclasses.replace(data.load("subj"), label_words=("only",))
    with pytest.raises(UserError, match="has one label"):
        LabelFollowing(dataset, 2, "ours", ("alpha", "beta"))


@pytest.fixture(scope="module")
def label_test():
    dataset = data.load("trec")
    dataset = dataclasses.replace(dataset, test=dataset.test[:50])
    encoder = PromptEncoder(TOKENIZER, dataset)
    return LabelFollowing(dataset, 4, "ours", encoder.symbols.test)


def certain(call, label_of):
    """Predictions that are certain of one answer."""
    rows = []
    for index, prompt in enumerate(call.prompts):
        answers = call.template.label_words if call.answers is None else call.answers[index]
        row = [0.0] * len(answers)
        row[label_of(index, prompt)] = 1.0
        rows.append(row)
    return rows


def test_a_model_that_reads_its_context_follows_every_label(label_test):
    predictions = [
        certain(call, lambda index, _, call=call: call.labels[index]) for call in label_test.calls
    ]
    scores = label_test.score(predictions)
    right = ("own", "rotated", "symbols", "override_rate")
    assert [scores[name] for name in right] == [1] * 4 and scores["prior_rate"] == 0


def test_a_model_that_knows_the_task_keeps_its_own_labels(label_test):
    own = label_test.calls[0].prompts
    stays = [
        certain(label_test.calls[0], lambda _, prompt: prompt.query.label),
        certain(label_test.calls[1], lambda index, _: own[index].query.label),
        [[]] * len(own),
    ]
    scores = label_test.score(stays)
    assert (scores["rotated"], scores["override_rate"], scores["prior_rate"]) == (0, 0, 1)
    assert scores["symbols"] is scores["symbols_low"] is None


def test_rates_are_of_the_queries_that_are_known(label_test):
    """Every third query is unknown under own labels; the others follow the rotation."""
    labels = len(label_test.calls[0].template.label_words)
    own = [prompt.query.label for prompt in label_test.calls[0].prompts]
    rotated = [prompt.query.label for prompt in label_test.calls[1].prompts]
    predictions = [
        certain(label_test.calls[0], lambda i, _: (own[i] + (i % 3 == 0)) % labels),
        certain(label_test.calls[1], lambda i, _: own[i] if i % 3 == 0 else rotated[i]),
        [[]] * len(own),
    ]
    scores = label_test.score(predictions)
    assert (scores["override_rate"], scores["prior_rate"]) == (1, 0)
    known = sum(i % 3 != 0 for i in range(len(own))) / len(own)
    assert scores["rotated"] == scores["own"] == known
    # A query is asked twice, and its two answers are one trial.
    assert (known, scores["own_low"], scores["own_high"]) == wilson(known, len(own) / 2)


def test_prompts_keep_their_texts_and_rotate_their_labels(label_test):
    own, rotated, symbols = label_test.calls
    words = own.template.label_words
    for before, after, new in zip(own.prompts, rotated.prompts, symbols.prompts, strict=True):
        pairs = [
            *zip(before.demonstrations, after.demonstrations, strict=True),
            (before.query, after.query),
        ]
        assert all(b.label == (a.label + 1) % len(words) and a.text == b.text for a, b in pairs)
        labels = [map(by_label, prompt.demonstrations) for prompt in (before, new)]
        renamed = dict(zip(*labels, strict=True))
        assert all(
            renamed[d.label] == e.label
            for d, e in zip(before.demonstrations, new.demonstrations, strict=True)
        )
    assert own.answers is rotated.answers is None
    for prompt, answers, label in zip(symbols.prompts, symbols.answers, own.labels, strict=True):
        assert len(set(answers)) == len(words) and answers[label] == prompt.query.label
        assert {d.label for d in prompt.demonstrations} <= set(answers)
    assert [call.measures_behavior for call in label_test.calls] == [True, False, False]


def by_label(example):
    return example.label


@pytest.mark.parametrize(("successes", "count"), [(0, 7), (7, 7), (3, 10), (701, 1024)])
def test_wilson_is_scipys(successes, count):
    expected = scipy.stats.binomtest(successes, count).proportion_ci(method="wilson")
    _, low, high = wilson(successes / count, count)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [(10, [1, 1, 1], [4, 3, 3]), (5, [10, 90], [1, 4]), (2, [1, 1, 1], [1, 1, 0])],
)
def test_shares(total, weights, expected):
    assert shares(total, weights) == expected
