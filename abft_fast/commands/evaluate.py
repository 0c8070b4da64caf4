"""Evaluate a model, with or without an adapter, on test prompts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abft_fast import data
from abft_fast.commands import adapter_origin
from abft_fast.commands.session import Session, check_same_data
from abft_fast.core.label_logits import keep_label_rows
from abft_fast.data import Dataset
from abft_fast.evaluation import inference
from abft_fast.evaluation.behavior import BehaviorMean
from abft_fast.evaluation.evaluation_set import EvaluationSet, Outcome
from abft_fast.options import EvalConfig, Options
from abft_fast.prompts import EncodedPrompts, PromptEncoder
from abft_fast.runtime import processes
from abft_fast.runtime.environment import uses_cpu
from abft_fast.runtime.files import write_json
from abft_fast.runtime.progress import Progress

Metrics = dict[str, Any]
"""Figures by dataset and name; with several tests, such figures by test."""

Outcomes = Sequence[tuple[EvaluationSet, Outcome]]
"""Tests and what they found."""


def evaluate(config: EvalConfig, progress: Progress) -> tuple[Metrics, Metrics]:
    """Test the model that the options name, and write `--output`.

    Returns:
        Metrics and attention behavior.

    Raises:
        UserError: an option, the data, the model or the adapter does not allow the evaluation.
    """
    with processes.running(uses_cpu(config.device)):
        check_same_data(config)
        with processes.fail_together():
            session = Session(config, progress)
            tests = prepare_tests(session)
            session.show_data(tests[0].prompts)
            for line in (*adapter_origin.differences(config), *config.without_effect):
                progress.say(line)
            if not config.stream:
                _load(config, session, tests)
        if config.stream:
            from abft_fast.commands.streamed.run import evaluate_streamed  # it uses this module

            metrics, attention = evaluate_streamed(config, session, tests)
        else:
            metrics, attention, _ = run_tests(session, tests, "evaluating")
        if config.output is not None:
            processes.run_on_main(write_json, config.output, metrics)
    return metrics, attention


def _load(config: EvalConfig, session: Session, tests: Sequence[EvaluationSet]) -> None:
    """Read the model with its adapter, and check its attention."""
    if config.adapter_is_a_sum:
        session.load_as(torch.float32)  # bfloat16 would round what is added
        session.add_adapters(config.adapters)
    else:
        session.load()
        if config.adapter_folders:
            session.load_adapter(config.adapter_folders[0])
    keep_rows_of_labels(session, tests)
    session.check_attention(tests[0].prompts)


def prepare_tests(session: Session) -> list[EvaluationSet]:
    """Return the tests that the options ask for, their prompts tokenized.

    Raises:
        UserError: a dataset does not allow the test, or a prompt is too long.
    """
    config = session.config
    tests = list(evaluation_sets(config, session.dataset, session.encoder))
    for test in tests:
        what = f"{test.dataset}: {'' if len(config.test_types) == 1 else f'{test.test_type} '}test"
        for encoded in test.encoded:
            session.say_too_long(encoded, what, "with fewer demonstrations")
    return tests


def evaluation_sets(
    config: Options, dataset: Dataset, encoder: PromptEncoder
) -> Iterator[EvaluationSet]:
    """Yield each test of a dataset, and of the other datasets that the options ask for.

    Raises:
        UserError: as `prepare_tests`.
    """
    places = [(dataset, encoder)]
    if config.generalization_test:
        for other in map(data.load, data.PAPER_DATASETS):
            if other.name != dataset.name:
                limits = encoder.max_length, encoder.vocabulary
                its = PromptEncoder.from_options(config, encoder.tokenizer, other, *limits)
                places.append((other, its))
    for kind in config.test_types:
        for place in places:
            yield EvaluationSet(config, *place, kind)


def keep_rows_of_labels(session: Session, tests: Sequence[EvaluationSet]) -> None:
    """Free the rows of the LM head that belong to no label word of the dataset or the tests."""
    wanted = set(session.encoder.label_ids).union(*(test.label_ids for test in tests))
    keep_label_rows(session.model, sorted(wanted))


def run_tests(
    session: Session, tests: Sequence[EvaluationSet], title: str
) -> tuple[Metrics, Metrics, Outcomes]:
    """Test the session's model in its current state.

    Args:
        session: the model and its device.
        tests: what to test.
        title: the title of the progress bar.

    Returns:
        Metrics, attention behavior, and the outcome of each test.
    """
    outcomes = []
    for test in tests:
        lengths = ([len(prompt) for prompt in encoded.prompts] for encoded in test.encoded)
        own = [each[i] for each in lengths for i in processes.own_share(each)]
        bar_title = ", ".join([title, *_distinction(test, tests)])
        with session.progress.bar(bar_title, len(own), sum(own)) as advance:
            outcome = test.run(functools.partial(_predict, session, advance))
        outcomes.append((test, outcome))
    return *as_metrics(outcomes), outcomes


def _distinction(test: EvaluationSet, tests: Sequence[EvaluationSet]) -> list[str]:
    """Return the test's dataset and the test itself, each where not all tests share it."""
    pairs = [(each.dataset, each.test_type) for each in tests]
    own = zip((test.dataset, test.test_type), zip(*pairs, strict=True), strict=True)
    return [name for name, names in own if len(set(names)) > 1]


def as_metrics(outcomes: Outcomes) -> tuple[Metrics, Metrics]:
    """Return metrics and attention behavior, as files keep them."""
    metrics: dict[str, Metrics] = {}
    attention: dict[str, Metrics] = {}
    for test, outcome in outcomes:
        behavior = dataclasses.asdict(outcome.behavior.result())
        metrics.setdefault(test.test_type, {})[test.dataset] = outcome.metrics
        attention.setdefault(test.test_type, {})[test.dataset] = behavior
    return as_kept(metrics), as_kept(attention)


def as_details(
    outcomes: Outcomes, describe: Callable[[EvaluationSet, Outcome], dict[str, Any]]
) -> dict[str, Any]:
    """Return the details of each test's first dataset, as files keep them."""
    first: dict[str, tuple[EvaluationSet, Outcome]] = {}
    for test, outcome in outcomes:
        first.setdefault(test.test_type, (test, outcome))
    return as_kept({kind: describe(*found) for kind, found in first.items()})


def as_kept(by_test: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the only test's entry, or the entries by test; `options.data.of_one_test` reads it."""
    return dict(by_test) if len(by_test) > 1 else next(iter(by_test.values()))


def _predict(
    session: Session, advance: Callable[[int, int], None], encoded: EncodedPrompts, behavior: bool
) -> tuple[Tensor, BehaviorMean]:
    config = session.config
    return inference.predict_labels(
        session.model,
        encoded,
        session.token_budget,
        advance,
        session.accelerator.autocast,
        config.attention_backend,
        behavior,
    )
