"""Evaluate a model, with or without an adapter, on test prompts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from abft_fast import data
from abft_fast.commands import adapter_origin
from abft_fast.commands.session import Session, check_same_data
from abft_fast.core.label_logits import keep_label_rows
from abft_fast.evaluation import inference
from abft_fast.evaluation.behavior import BehaviorMean
from abft_fast.evaluation.evaluation_set import EvaluationSet, Outcome
from abft_fast.options import EvalConfig
from abft_fast.prompts import EncodedPrompts, PromptEncoder
from abft_fast.runtime import processes
from abft_fast.runtime.environment import uses_cpu
from abft_fast.runtime.files import write_json
from abft_fast.runtime.progress import Progress
from abft_fast.runtime.token_budget import tokens_at_once

Scores = dict[str, dict[str, float | None]]
"""Figures by dataset and name."""


def evaluate(config: EvalConfig, progress: Progress) -> tuple[Scores, Scores]:
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
            if config.stream:
                from abft_fast.commands.streamed import evaluate_streamed  # it uses this module

                metrics, attention = evaluate_streamed(config, session, tests)
            else:
                _load(config, session, tests)
        if not config.stream:
            metrics, attention, _ = run_tests(session, tests, "evaluating")
        if config.output is not None:
            processes.run_on_main(write_json, config.output, metrics)
    return metrics, attention


def _load(config: EvalConfig, session: Session, tests: Sequence[EvaluationSet]) -> None:
    """Read the model with its adapter, and check its attention."""
    session.load()
    if config.adapter_is_a_sum:
        session.add_adapters(config.adapters)
    elif config.adapter_folders:
        session.load_adapter(config.adapter_folders[0])
    keep_rows_of_labels(session, tests)
    session.check_attention(tests[0].prompts)


def prepare_tests(session: Session) -> list[EvaluationSet]:
    """Return the tests that the options ask for, their prompts tokenized.

    Raises:
        UserError: a dataset does not allow the test, or a prompt is too long.
    """
    config, name = session.config, session.dataset.name
    names = [name]
    if config.generalization_test:
        names += [other for other in data.PAPER_DATASETS if other != name]
    tests = []
    for dataset_name in names:
        dataset, encoder = session.dataset, session.encoder
        if dataset_name != name:
            dataset = data.load(dataset_name)
            encoder = PromptEncoder.by_options(
                config, encoder.tokenizer, dataset, encoder.max_length, encoder.vocabulary
            )
        test = EvaluationSet(config, dataset, encoder)
        for encoded in test.encoded:
            session.say_too_long(encoded, f"{dataset_name}: test", "with fewer demonstrations")
        tests.append(test)
    return tests


def keep_rows_of_labels(session: Session, tests: Sequence[EvaluationSet]) -> None:
    """Free the rows of the LM head that belong to no label word of the dataset or the tests."""
    wanted = set(session.encoder.label_ids).union(*(test.label_ids for test in tests))
    keep_label_rows(session.model, sorted(wanted))


def run_tests(
    session: Session, tests: Sequence[EvaluationSet], title: str
) -> tuple[Scores, Scores, list[Outcome]]:
    """Test the session's model in its current state.

    Args:
        session: the model and its device.
        tests: what to test.
        title: the title of the progress bar.

    Returns:
        Metrics and attention behavior, by dataset, and the outcome of each test.
    """
    outcomes = []
    for test in tests:
        lengths = ([len(prompt) for prompt in encoded.prompts] for encoded in test.encoded)
        own = [each[i] for each in lengths for i in processes.own_share(each)]
        bar_title = title if len(tests) == 1 else f"{title}, {test.dataset}"
        with session.progress.bar(bar_title, len(own), sum(own)) as advance:
            outcome = test.run(functools.partial(_predict, session, advance))
        outcomes.append((test, outcome))
    return *as_scores(outcomes), [outcome for _, outcome in outcomes]


def as_scores(outcomes: Sequence[tuple[EvaluationSet, Outcome]]) -> tuple[Scores, Scores]:
    """Return metrics and attention behavior by dataset, of tests and what they found."""
    metrics = {test.dataset: outcome.metrics for test, outcome in outcomes}
    behaviors = ((test.dataset, outcome.behavior.result()) for test, outcome in outcomes)
    return metrics, {dataset: dataclasses.asdict(behavior) for dataset, behavior in behaviors}


def _predict(
    session: Session, advance: Callable[[int, int], None], encoded: EncodedPrompts, behavior: bool
) -> tuple[Tensor, BehaviorMean]:
    config = session.config
    return inference.predict_labels(
        session.model,
        encoded,
        tokens_at_once(config.token_budget),
        advance,
        session.accelerator.autocast,
        config.attention_backend,
        behavior,
    )
