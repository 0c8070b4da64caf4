"""Tokenize texts; a special token that is spelled out in a text stays text."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from abft_fast.errors import UserError


class TextTokens:
    """Turn texts into tokens, for prompts whose template is known.

    Args:
        tokenizer: the model's fast tokenizer.
        written: what the template writes around texts. Only where a special token, such as `</s>`,
            stands in it, special tokens may be spelled out in texts, too.

    Raises:
        UserError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: Sequence[str]):
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer {type(tokenizer).__name__} reports no character offsets, so label "
                "positions are unknown: use the model's fast tokenizer"
            )
        self.tokenizer = tokenizer
        self._special = _special_tokens(tokenizer)
        self._any_special = re.compile("|".join(map(re.escape, self._special)) or "(?!)")
        self._texts_stay_text = not any(map(self._any_special.search, written))

    def special_token_in(self, text: str) -> str | None:
        """Return a special token of the model that a text's own characters become; None if none."""
        spelled = [match[0] for match in self._any_special.finditer(text)]
        ids = self.ids(text) if spelled else []
        return next((token for token in spelled if self._special[token] in ids), None)

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text alone, without special tokens around it."""
        options = {"add_special_tokens": False, "split_special_tokens": self._texts_stay_text}
        return self.tokenizer(text, verbose=False, **options)["input_ids"]

    def with_offsets(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return token ids and character offsets, without special tokens at the end."""
        batch = self.tokenizer(
            texts,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            split_special_tokens=self._texts_stay_text,
            verbose=False,
        )
        result = []
        columns = (batch[n] for n in ("input_ids", "offset_mapping", "special_tokens_mask"))
        for ids, offsets, is_special in zip(*columns, strict=True):
            end = len(ids)
            while end > 1 and is_special[end - 1]:  # a token of spaces may have no width, too
                end -= 1
            result.append((ids[:end], offsets[:end]))
        return result


def overlapping(offsets: Sequence[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """Return the positions of the tokens that share a character with a span.

    Args:
        offsets: (start, end) of each token in the text; no end is before the one before it.
        span: (start, end).
    """
    first = bisect_right(offsets, span[0], key=lambda offset: offset[1])
    tokens = range(first, len(offsets))
    return list(itertools.takewhile(lambda i: offsets[i][0] < span[1], tokens))


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of the tokens that steer a model, by their text; `<unk>` is none of them."""
    names = tokenizer.all_special_tokens
    named = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return {token: i for token, i in (named | added).items() if token != tokenizer.unk_token}
