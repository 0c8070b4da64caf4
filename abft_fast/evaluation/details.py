"""What a test leaves for its report: every prediction, attention by layer, and ten prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from abft_fast.core.packing import EncodedPrompt
from abft_fast.evaluation.evaluation_set import EvaluationSet, Outcome

_SHOWN = 10  # prompts of which tokens and attention are kept


def describe_test(
    test: EvaluationSet,
    outcome: Outcome,
    prompts: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return the details of one run of a test, as JSON has them.

    Args:
        test: the test.
        outcome: what it found.
        prompts: a few of its prompts, by `some_prompts`.

    Returns:
        `dataset` and `label_words`. By prompt, `queries`, `labels` and `probabilities`, an empty
        list for a prompt left out. `layers`, by `BehaviorMean.layers`. `prompts`.
    """
    return {
        "dataset": test.dataset,
        "label_words": test.label_words,
        "queries": outcome.queries,
        "labels": outcome.labels,
        "probabilities": [[round(value, 6) for value in row] for row in outcome.probabilities],
        "layers": outcome.behavior.layers(),
        "prompts": list(prompts),
    }


def some_prompts(
    test: EvaluationSet,
    tokenizer: PreTrainedTokenizerBase,
    last_row: Callable[[EncodedPrompt], list[float]],
) -> list[dict[str, Any]]:
    """Return ten prompts from all over the test, with the attention of their last tokens.

    Args:
        test: the test.
        tokenizer: turns tokens into text.
        last_row: returns what the last token of a prompt attends to.

    Returns:
        Each prompt's `index`, `tokens`, `attention`, `label_positions` and `label_is_correct`.
    """
    encoded = test.encoded[0]
    count = min(_SHOWN, len(encoded.prompts))
    shown = []
    for i in range(count):
        place = i * len(encoded.prompts) // count
        prompt = encoded.prompts[place]
        shown.append(
            {
                "index": encoded.kept[place],
                "tokens": [tokenizer.decode([token]) for token in prompt.input_ids],
                "attention": [round(value, 6) for value in last_row(prompt)],
                "label_positions": list(prompt.label_positions),
                "label_is_correct": list(map(bool, prompt.label_is_correct)),
            }
        )
    return shown
