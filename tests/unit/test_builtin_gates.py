"""What the built-in model has to show: it reads its context, not its weights, and ABFT helps it.

On all of StaICC's 1,024 test prompts at k = 4: a standard error is at most 1.6 points. What it does
after ABFT is from the rows of a sweep; as it then depends on the query alone, it is of 512 queries.
"""

from dataclasses import replace
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from abft_fast import builtin_model_path, data
from abft_fast.evaluation.behavior import Behavior
from abft_fast.evaluation.inference import predict_labels
from abft_fast.options import TrainConfig
from abft_fast.prompts import PromptEncoder
from abft_fast.runtime.token_budget import CPU_TOKENS
from tests.study_rows import largest_class, rows_of

pytestmark = [pytest.mark.unit, pytest.mark.slow]
DATASETS = data.PAPER_DATASETS


class Answers(NamedTuple):
    """To the test prompts of a dataset.

    Attributes:
        accuracy: share that is right.
        by_luck: what as many of each answer would have right if texts had no part in it. With
            65 % of one class, as in fp, it is more than one over the number of classes.
        heads: what the heads did, where labels are as they are.
    """

    accuracy: float
    by_luck: float
    heads: Behavior


@pytest.fixture(scope="module")
def ask():
    """Answers to a dataset's test prompts, the labels of their demonstrations changed."""
    path = builtin_model_path()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )

    def changed(prompt, relabel):
        shown = (
            replace(example, label=relabel(example.label)) for example in prompt.demonstrations
        )
        return replace(prompt, demonstrations=tuple(shown))

    def answer(dataset, relabel=None):
        prompts = dataset.test_prompts(4)
        if relabel is not None:
            prompts = [changed(prompt, relabel) for prompt in prompts]
        encoded = PromptEncoder(tokenizer, dataset).encode(prompts)
        logits, heads = predict_labels(model, encoded, CPU_TOKENS, behavior=relabel is None)
        found, truth = logits.argmax(dim=1).numpy(), np.array(encoded.labels)
        assert len(truth) == 1024
        classes = range(logits.shape[1])
        by_luck = sum((found == c).mean() * (truth == c).mean() for c in classes)
        return Answers((found == truth).mean(), by_luck, heads.result())

    return answer


@pytest.fixture(scope="module")
def as_they_are(ask):
    """By dataset."""
    return {name: ask(data.load(name)) for name in DATASETS}


def standard_error(share: float, answers: int = 1024) -> float:
    return (share * (1 - share) / answers) ** 0.5


def test_it_is_above_chance_on_three_datasets(as_they_are):
    above = []
    for name, found in as_they_are.items():
        chance = max(found.by_luck, 1 / len(data.load(name).label_words))
        if found.accuracy - chance > 2 * standard_error(chance):
            above.append(name)
    assert len(above) >= 3, above


def test_random_labels_leave_it_at_chance(ask):
    """Each dataset, and all together: bounds are 2.7 standard errors."""
    random, above = np.random.default_rng(0), []
    for dataset in map(data.load, DATASETS):
        labels = len(dataset.label_words)
        answers = ask(dataset, lambda _, labels=labels: int(random.integers(labels)))
        above.append(answers.accuracy - answers.by_luck)
    assert max(map(abs, above)) <= 2.7 * standard_error(0.5)
    assert abs(fmean(above)) <= 2.7 * standard_error(0.5, answers=1024 * len(DATASETS))


@pytest.mark.parametrize("name", [n for n in DATASETS if len(data.load(n).label_words) == 2])
def test_swapped_labels_are_followed(ask, as_they_are, name):
    """Where it is above chance it falls below; elsewhere there is nothing to turn around."""
    swapped = ask(data.load(name), lambda label: 1 - label).accuracy
    error = standard_error(0.5)
    if as_they_are[name].accuracy > 0.5 + 2 * error:
        assert swapped < 0.5
    else:
        assert abs(swapped - 0.5) <= 3 * error


def test_its_induction_heads_prefer_correct_labels(as_they_are):
    heads = [found.heads for found in as_they_are.values()]
    assert all(each.induction_heads > 1 for each in heads)
    assert np.mean([each.correct_share_above_chance for each in heads]) > 0


@pytest.fixture(scope="module")
def after():
    """Rows of ABFT with the defaults, by dataset: three seeds."""
    found = {}
    for row in rows_of("builtin_study"):
        if row["setting_name"] == "ABFT" and row["evaluated_on"] == row["dataset"]:
            found.setdefault(row["dataset"], []).append(row)
    assert all({row["seed"] for row in rows} == {"0", "1", "2"} for rows in found.values())
    return found


def test_after_abft_it_is_above_chance_on_five_datasets(after):
    """Above the share of the largest class, which no way of guessing exceeds."""
    above = []
    for name in DATASETS:
        chance = largest_class(name)
        accuracy = fmean(float(row["accuracy"]) for row in after[name])
        if accuracy - chance > 2 * standard_error(chance, answers=512):
            above.append(name)
    assert len(above) >= 5, above


def test_the_default_job_shows_the_method(as_they_are, after):
    """Of every seed: more right answers, more attention on correct labels, as many heads."""
    name = TrainConfig().dataset
    before, rows = as_they_are[name], after[name]
    gains = [float(row["accuracy"]) - before.accuracy for row in rows]
    assert fmean(gains) >= max(0.03, 2 * stdev(gains)) and min(gains) > 0
    for row in rows:
        share = float(row["correct_share_above_chance"])
        assert share > before.heads.correct_share_above_chance
        assert abs(float(row["induction_heads"]) / before.heads.induction_heads - 1) < 0.1
