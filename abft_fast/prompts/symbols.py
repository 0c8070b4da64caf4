"""Choose words that may stand for labels though they mean nothing there (Wei et al. 2023)."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from abft_fast import data
from abft_fast.data import Example, Prompt
from abft_fast.errors import UserError

_WORD = re.compile(r"[Ġ▁ ]([a-z]{4,})")  # a space, as tokenizers write it, and a word
_MOST_CANDIDATES = 2048
_ONE_IN = 8  # is a word for tests


class Symbols(NamedTuple):
    """Words of one token that are label words of no known dataset.

    A word is for training or for tests by its own hash. So no word of a test is ever trained on,
    whatever the dataset.
    """

    training: tuple[str, ...]
    test: tuple[str, ...]


def candidate_words(
    tokenizer: PreTrainedTokenizerBase, written: Sequence[str], size: int | None
) -> list[str]:
    """Return the words of a tokenizer's vocabulary that are no label word, the first ones first.

    Args:
        tokenizer: the model's tokenizer.
        written: the dataset's own label words, and what its template writes around them.
        size: tokens that the model has; None for any number.
    """
    taken = set(re.findall("[a-z]+", " ".join(written).lower()))
    for dataset in map(data.load, data.DATASETS):
        taken.update(map(str.lower, (*dataset.label_words, *dataset.staicc_label_words)))
    by_id = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items())
    matches = (_WORD.fullmatch(token) for id_, token in by_id if size is None or id_ < size)
    words = (match[1] for match in matches if match is not None)
    return [word for word in dict.fromkeys(words) if word not in taken][:_MOST_CANDIDATES]


def divide(words: Sequence[str]) -> Symbols:
    """Divide words into those for training and those for tests."""
    is_test = [hashlib.sha256(word.encode()).digest()[0] % _ONE_IN == 0 for word in words]
    return Symbols(
        tuple(word for word, test in zip(words, is_test, strict=True) if not test),
        tuple(word for word, test in zip(words, is_test, strict=True) if test),
    )


def draw_symbols(
    prompts: Sequence[Prompt], labels: int, words: Sequence[str], seed: str
) -> list[list[int]]:
    """Draw label words for each prompt, which none of its texts holds.

    Args:
        prompts: prompts of a dataset.
        labels: the number of the dataset's labels.
        words: words to draw from.
        seed: of the draw.

    Returns:
        For each prompt, the index in `words` of each label's word.

    Raises:
        UserError: there are not enough words.
    """
    generator = random.Random(seed)
    drawn = []
    for prompt in prompts:
        texts = " ".join(example.text for example in (*prompt.demonstrations, prompt.query))
        used = set(re.findall("[a-z]+", texts.lower()))
        free = [index for index, word in enumerate(words) if word not in used]
        if len(free) < labels:
            raise UserError(
                f"the tokenizer has {len(words)} words of one token that may stand for labels, "
                f"{len(free)} of them not in a prompt's own texts, but the dataset has {labels} "
                "labels: use another model"
            )
        drawn.append(generator.sample(free, labels))
    return drawn


def with_labels(prompt: Prompt, labels: Sequence[int]) -> Prompt:
    """Return a prompt whose label i is `labels[i]`, in the demonstrations and at the query."""

    def changed(example: Example) -> Example:
        return Example(example.text, labels[example.label])

    return Prompt(tuple(map(changed, prompt.demonstrations)), changed(prompt.query))
