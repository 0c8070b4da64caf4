"""A classification dataset, and the prompts that are drawn from it."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from abft_fast.errors import UserError

_MOST_DRAWS = 1000  # for each prompt, with `seen_labels_only`


@dataclass(frozen=True)
class Example:
    """One labelled text; `label` indexes the dataset's label words, or is `NO_LABEL`."""

    NO_LABEL: ClassVar[int] = -1

    text: str
    label: int


@dataclass(frozen=True)
class Prompt:
    """k demonstrations and a query, before any text is rendered."""

    demonstrations: tuple[Example, ...]
    query: Example


def text_key(text: str) -> str:
    """Return what copies of a text have in common: its letters and digits, in lower case."""
    return "".join(filter(str.isalnum, text.lower()))


@dataclass(frozen=True)
class Dataset:
    """A classification dataset with StaICC's split; `own.OwnDataset` has the user's own split.

    Attributes:
        name: the paper's short name, e.g. `"sst2"`.
        input_prefix: what stands before a text, e.g. `"sentence: "`.
        label_prefix: what stands before a label, e.g. `"sentiment: "`.
        label_words: in prompts of form `ours`; of StaICC's datasets the paper's (Table 5).
        staicc_label_words: the words StaICC itself uses; they differ for `subj`.
        training: StaICC's 1,024 calibration examples; only these are trained on.
        demonstrations: the pool test prompts draw their demonstrations from.
        test: the 512 test queries.
        files: path and SHA-256 of each file it was made of, where they are the user's own.
        alternate_template: three values of each of four parts of the template, by StaICC's names;
            None where there are none.
    """

    name: str
    input_prefix: str
    label_prefix: str
    label_words: tuple[str, ...]
    staicc_label_words: tuple[str, ...]
    training: tuple[Example, ...]
    demonstrations: tuple[Example, ...]
    test: tuple[Example, ...]
    files: tuple[tuple[str, str], ...] = ()
    alternate_template: Mapping[str, Sequence] | None = None

    @property
    def example(self) -> Example:
        """Return any example, to try label words with."""
        return self.training[0]

    def without(self, keys: Collection[str]) -> Self:
        """Return the dataset without training examples whose `text_key` is among these."""
        kept = tuple(each for each in self.training if text_key(each.text) not in keys)
        return replace(self, training=kept)

    def with_queries(self, count: int) -> Self:
        """Return the dataset with `count` of its test queries, always the same ones, or with all.

        They are drawn at random, as a file may be sorted by its labels.
        """
        return replace(self, test=tuple(self.test[i] for i in self._drawn_queries(count)))

    def _drawn_queries(self, count: int) -> list[int]:
        everything = range(len(self.test))
        return sorted(random.Random(0).sample(everything, min(count, len(everything))))

    def place_of(self, example: Example) -> str:
        """Return where an example is, for a message."""
        return f"{self.name}, the text {example.text[:60]!r}"

    def check_training(self, k: int, seen_labels_only: bool = False) -> None:
        """Check that prompts of k demonstrations can be drawn to train on.

        Raises:
            UserError: k + 1 is more than the training examples there are; or, with
                `seen_labels_only`, k is 0 or no two training examples have the same label.
        """
        if seen_labels_only and k == 0:
            raise UserError("--seen-labels-only needs a demonstration: use --k 1 or more")
        if k + 1 > len(self.training):
            raise UserError(
                f"k={k}: {self.name} has {len(self.training)} training examples, "
                f"so k is at most {len(self.training) - 1}"
            )
        labels = {example.label for example in self.training}
        if seen_labels_only and len(labels) == len(self.training):
            raise UserError(
                f"--seen-labels-only: no two training examples of {self.name} have the same label"
            )

    def check_test(self, k: int) -> None:
        """Check that prompts of k demonstrations can be drawn to test on.

        Raises:
            UserError: k is more than the pool of demonstrations.
        """
        if k > len(self.demonstrations):
            raise UserError(
                f"k={k}: {self.name} has {len(self.demonstrations)} demonstrations to draw from, "
                f"so k is at most {len(self.demonstrations)}"
            )

    def training_prompts(
        self, k: int, count: int, seed: int, seen_labels_only: bool = False
    ) -> list[Prompt]:
        """Draw `count` prompts of k + 1 distinct training examples each (paper, A.1).

        With `seen_labels_only` a prompt is drawn again until a demonstration has the query's label
        (ours).

        Raises:
            UserError: as `check_training`, or fewer than 1 of 1,000 prompts are of that kind.
        """
        self.check_training(k, seen_labels_only)
        generator = random.Random(f"{self.name}-{seed}")
        prompts: list[Prompt] = []
        draws = 0
        while len(prompts) < count:
            draws += 1
            if draws > _MOST_DRAWS * count:
                raise UserError(
                    f"--seen-labels-only: in {len(prompts)} of {draws:,} prompts drawn from "
                    f"{self.name}, a demonstration has the query's label: use a larger --k, or "
                    "leave the option out"
                )
            *demonstrations, query = generator.sample(self.training, k + 1)
            is_seen = any(each.label == query.label for each in demonstrations)
            if is_seen or not seen_labels_only:
                prompts.append(Prompt(tuple(demonstrations), query))
        return prompts

    def test_prompts(self, k: int) -> list[Prompt]:
        """Return every test query twice, each time with its own k demonstrations.

        StaICC's accuracy test (`Normal`) asks for the same prompts in the same order. For
        StaICC's datasets these are 1,024 prompts.

        Raises:
            UserError: k is more than the pool of demonstrations.
        """
        from abft_fast.data.sampling import Sampler  # StaICC is imported when it is needed

        self.check_test(k)
        queries = 2 * self.test
        sampler = Sampler(k, len(self.demonstrations), len(queries))
        return [
            Prompt(tuple(self.demonstrations[index] for index in sampler[position]), query)
            for position, query in enumerate(queries)
        ]
