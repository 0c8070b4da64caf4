"""Desiderata: pairs of prompts that say what one kind of information does to the answer.

The source differs from the original prompt in one kind of information. A head carries it if the
answer becomes the target once the head's output in the source is put into the original.
Source: desiderata-based component masking, Prakash et al. 2024, "Fine-tuning enhances existing
mechanisms", there for entity tracking; the three desiderata for classification are ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from abft_fast.data import Example, Prompt
from abft_fast.prompts.symbols import with_labels


class Desideratum(NamedTuple):
    """What is put into a prompt, and what it should answer then.

    Attributes:
        source: the prompt whose head outputs are put into the original.
        target: the label expected, another than the original's.
    """

    source: Prompt
    target: int


def label_word(
    prompt: Prompt, answers: Sequence[int], queries: Sequence[Example], draw: random.Random
) -> Desideratum | None:
    """Rotate the label words of all demonstrations; the answer should be the rotated label."""
    if prompt.query.label not in _shown(prompt):
        return None
    rotated = list(range(max(answers) + 1))
    for label, following in zip(answers, [*answers[1:], answers[0]], strict=True):
        rotated[label] = following
    source = with_labels(prompt, rotated)
    return Desideratum(source, source.query.label)


def position(
    prompt: Prompt, answers: Sequence[int], queries: Sequence[Example], draw: random.Random
) -> Desideratum | None:
    """Exchange the right demonstrations with those of one wrong label.

    A head that says where the right demonstrations are then points to that wrong label.
    """
    right = _of_label(prompt, prompt.query.label)
    others = sorted(_shown(prompt) - {prompt.query.label})
    places = [_of_label(prompt, label) for label in others]
    enough = [
        (label, at) for label, at in zip(others, places, strict=True) if len(at) >= len(right)
    ]
    if not right or not enough:
        return None
    target, wrong = draw.choice(enough)
    demonstrations = list(prompt.demonstrations)
    for i, j in zip(right, draw.sample(wrong, len(right)), strict=True):
        demonstrations[i], demonstrations[j] = demonstrations[j], demonstrations[i]
    return Desideratum(Prompt(tuple(demonstrations), prompt.query), target)


def text_prior(
    prompt: Prompt, answers: Sequence[int], queries: Sequence[Example], draw: random.Random
) -> Desideratum | None:
    """Put another query behind the same demonstrations; the answer should be its label."""
    shown = _shown(prompt) - {prompt.query.label}
    others = [query for query in queries if query.label in shown]
    if not others:
        return None
    query = draw.choice(others)
    return Desideratum(Prompt(prompt.demonstrations, query), query.label)


Maker = Callable[[Prompt, Sequence[int], Sequence[Example], random.Random], Desideratum | None]

DESIDERATA: dict[str, Maker] = {
    "label-word": label_word,
    "position": position,
    "text-prior": text_prior,
}
"""Each takes a prompt, the labels that may answer it, other queries, and what draws at random.

It returns None where the prompt's demonstrations do not allow the exchange.
"""


def _shown(prompt: Prompt) -> set[int]:
    return {demonstration.label for demonstration in prompt.demonstrations}


def _of_label(prompt: Prompt, label: int) -> list[int]:
    return [i for i, each in enumerate(prompt.demonstrations) if each.label == label]
