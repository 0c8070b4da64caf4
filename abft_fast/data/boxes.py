"""Generate entity-tracking prompts: objects are in boxes, and one box is asked for.

`The apple is in Box F, the book is in Box A, the key is in Box Q. Box F contains the`
Source: Prakash et al. 2024, "Fine-tuning enhances existing mechanisms", section 2.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from abft_fast.data.dataset import Dataset, Example, Prompt
from abft_fast.errors import UserError

BOXES = {"boxes3": 3, "boxes5": 5, "boxes7": 7}
"""Boxes in a prompt, by the dataset's name."""

OBJECTS = (
    "apple", "bag", "ball", "bell", "bill", "bird", "boat", "book", "boot", "bottle", "bowl",
    "brain", "bread", "brick", "brush", "bus", "cake", "camera", "candle", "cap", "card",
    "cash", "cat", "chain", "chair", "cheese", "clock", "cloth", "coat", "coffee", "coin",
    "computer", "cross", "cup", "disk", "document", "dog", "doll", "dress", "drink", "drug",
    "egg", "engine", "fan", "file", "fish", "flower", "fork", "game", "gift", "glass", "glove",
    "guitar", "gun", "hat", "ice", "iron", "jacket", "key", "knife", "lamp", "leaf", "letter",
    "lock", "machine", "magazine", "magnet", "map", "medicine", "milk", "mirror", "money",
    "newspaper", "note", "paper", "pen", "pencil", "phone", "picture", "pillow", "plane",
    "plant", "plate", "pot", "radio", "ring", "rock", "rope", "rose", "shell", "ship", "shirt",
    "shoe", "soap", "sock", "spoon", "stone", "string", "suit", "sword", "tea", "ticket", "tie",
    "toy", "train", "tree", "umbrella", "video", "watch", "water", "wheel", "wine", "wire",
)  # fmt: skip
"""Nouns that may be in a box; a run uses those that its tokenizer makes one token of."""


@dataclass(frozen=True)
class Boxes(Dataset):
    """A dataset without texts: a demonstration's text is a box's letter, its label an object.

    The label words are the objects. Which of them may answer differs from prompt to prompt: those
    in the prompt.

    Attributes:
        queries: the number of test prompts.
    """

    queries: int = 512

    @classmethod
    def of(cls, name: str) -> Boxes:
        """Return the dataset of one of the names of `BOXES`, with all objects."""
        return cls(name, "", "", OBJECTS, OBJECTS, (), (), ())

    @property
    def boxes(self) -> int:
        """Return how many boxes a prompt has."""
        return BOXES[self.name]

    @property
    def example(self) -> Example:
        """Return a box with an object."""
        return Example("A", 0)

    def check_training(self, k: int, seen_labels_only: bool = False) -> None:
        """Check that prompts of k boxes can be drawn; each has the box that is asked for.

        Raises:
            UserError: k is not the dataset's number of boxes, or there are too few objects.
        """
        if k != self.boxes:
            raise UserError(f"k={k}: {self.name} has {self.boxes} boxes in each prompt")
        if len(self.label_words) < self.boxes:
            raise UserError(
                f"{self.name}: {len(self.label_words)} of the {len(OBJECTS)} objects are single "
                f"tokens of this tokenizer, but a prompt needs {self.boxes}: use another model"
            )

    def check_test(self, k: int) -> None:
        """Check that prompts of k boxes can be drawn.

        Raises:
            UserError: as `check_training`.
        """
        self.check_training(k)

    def training_prompts(
        self, k: int, count: int, seed: int, seen_labels_only: bool = False
    ) -> list[Prompt]:
        """Draw `count` prompts, none of which is a test prompt.

        Raises:
            UserError: as `check_training`.
        """
        tested = set(self.test_prompts(k))
        drawn = self._draw(f"{self.name}-{seed}")
        untested = (prompt for prompt in drawn if prompt not in tested)
        return [next(untested) for _ in range(count)]

    def with_queries(self, count: int) -> Self:
        """Return the dataset with the first `count` of its test prompts, or with all."""
        return replace(self, queries=min(count, self.queries))

    def test_prompts(self, k: int) -> list[Prompt]:
        """Return as many prompts as there are queries, the same in every call.

        Raises:
            UserError: as `check_test`.
        """
        self.check_test(k)
        drawn = self._draw(f"{self.name}-test")
        return [next(drawn) for _ in range(self.queries)]

    def _draw(self, seed: str) -> Iterator[Prompt]:
        """Draw prompts without end; letters, objects and the box that is asked for are random."""
        generator = random.Random(seed)
        objects = range(len(self.label_words))
        while True:
            pairs = zip(
                generator.sample(string.ascii_uppercase, self.boxes),
                generator.sample(objects, self.boxes),
                strict=True,
            )
            filled = tuple(Example(letter, label) for letter, label in pairs)
            yield Prompt(filled, generator.choice(filled))
