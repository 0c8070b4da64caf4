"""What a test is: prompts to predict, call by call, and metrics of the predictions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from abft_fast.data import Example, Prompt
from abft_fast.evaluation.staicc_adapter import Triplet
from abft_fast.prompts import EncodedPrompts, PromptEncoder, Template
from abft_fast.prompts.encoder import label_among

Probabilities = Sequence[Sequence[float]]
"""A distribution over the label words for each prompt; an empty one for a prompt left out."""


@dataclass(frozen=True)
class Call:
    """Prompts of one template, which are predicted together.

    Attributes:
        template: how they are written.
        prompts: the prompts.
        shows_behavior: whether attention on their labels counts as the model's behavior, if they
            have labels.
        answers: label words that may answer each prompt, by index; None where all may.
    """

    template: Template
    prompts: list[Prompt]
    shows_behavior: bool = True
    answers: Sequence[Sequence[int]] | None = None

    @property
    def labels(self) -> list[int]:
        """Return the index of each query's label among its answers."""
        answers: Iterable[Sequence[int] | None] = self.answers or itertools.repeat(None)
        return [label_among(*pair) for pair in zip(self.prompts, answers, strict=False)]

    def only(self, chosen: Sequence[int]) -> Call:
        """Return the call with some of its prompts, given their indices."""
        answers = None if self.answers is None else [self.answers[i] for i in chosen]
        return replace(self, prompts=[self.prompts[i] for i in chosen], answers=answers)

    def encode(self, encoder: PromptEncoder) -> EncodedPrompts:
        """Tokenize the prompts.

        Raises:
            UserError: as `PromptEncoder.encode`.
        """
        return encoder.encode(self.prompts, self.template, answers=self.answers)

    @property
    def measures_behavior(self) -> bool:
        """Return whether heads are looked at; queries that only show a bias have no labels."""
        labels = (prompt.query.label for prompt in self.prompts)
        return self.shows_behavior and any(label != Example.NO_LABEL for label in labels)


class Test(Protocol):
    """A test on one dataset."""

    @property
    def calls(self) -> Sequence[Call]:
        """The prompts, in the order in which predictions are wanted."""

    @property
    def triplet(self) -> Triplet:
        """The dataset as StaICC sees it."""

    @property
    def answer_words(self) -> Sequence[str]:
        """The names of the answers."""

    def score(self, predictions: Iterable[Probabilities]) -> dict[str, float | None]:
        """Return the metrics by name, given each call's predictions; None where undefined."""
