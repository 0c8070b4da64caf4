"""Find the token of each label word; refuse words that cannot be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from abft_fast.data import Dataset, Example, Prompt
from abft_fast.errors import UserError
from abft_fast.prompts.template import Template
from abft_fast.prompts.text_tokens import TextTokens, overlapping


class LabelsAlikeError(UserError):
    """Labels cannot be told apart; the message does not say yet what to do."""


@dataclass(frozen=True)
class LabelTokens:
    """Read label words in one dataset's prompts.

    Attributes:
        text: the tokenizer.
        dataset: the dataset's name, for messages.
        example: any example of the dataset; words are tried in a prompt made of it.
        template: how prompts are written.
        label_token: `"single"` refuses label words of several tokens, `"first"` uses their first
            token.
    """

    text: TextTokens
    dataset: str
    example: Example
    template: Template
    label_token: str

    def tell_apart(self) -> tuple[list[int], list[int]]:
        """Return the token of each label word, in demonstrations and at the query.

        Raises:
            LabelsAlikeError: a word is several tokens, two words share a token, or a word of form
                `ours` is another token at the query.
        """
        in_demonstrations = self._distinct(self.in_demonstrations(), "in demonstrations")
        at_query = self.at_query_apart()
        words = self.template.label_words
        for word, id_, query_id in zip(words, in_demonstrations, at_query, strict=True):
            if self.template.form == "ours" and query_id != id_:
                raise LabelsAlikeError(
                    f"{self.dataset}: label word {word!r} is token {id_} in demonstrations but "
                    f"{query_id} at the query in this tokenizer"
                )
        return in_demonstrations, at_query

    def at_query_apart(self) -> list[int]:
        """Return the token of each label word at the query.

        Raises:
            LabelsAlikeError: a word merges with the text before it, is several tokens, or two words
                share a token.
        """
        tokens = []
        for word, ids in zip(self.template.label_words, self.at_query(), strict=True):
            if ids is None:
                raise LabelsAlikeError(
                    f"{self.dataset}: label word {word!r} merges with the text before it in this "
                    "tokenizer, so it cannot be predicted"
                )
            tokens.append(ids)
        return self._distinct(tokens, "at the query")

    def of_one_token(self) -> list[str]:
        """Return the label words that are one token in demonstrations and one at the query.

        In form `ours` it has to be the same token.
        """
        same_token = self.template.form == "ours"
        tokens = zip(
            self.template.label_words, self.in_demonstrations(), self.at_query(), strict=True
        )
        return [
            word
            for word, ids, query_ids in tokens
            if len(ids) == 1
            and query_ids is not None
            and len(query_ids) == 1
            and (not same_token or ids == query_ids)
        ]

    def in_demonstrations(self) -> list[list[int]]:
        """Return all tokens of each label word in a demonstration."""
        labels = range(len(self.template.label_words))
        prompts = [Prompt((replace(self.example, label=i),), self.example) for i in labels]
        rendered = [self.template.render(prompt) for prompt in prompts]
        tokenized = self.text.with_offsets([text for text, _ in rendered])
        return [
            [ids[i] for i in overlapping(offsets, spans[0])]
            for (ids, offsets), (_, spans) in zip(tokenized, rendered, strict=True)
        ]

    def at_query(self) -> list[list[int] | None]:
        """Return all tokens of each label word after a query, the one that counts first.

        None stands for a word that merges with the text before it.
        """
        words = self.template.label_words
        if self.template.form == "staicc":  # its harness looks a word up alone, last token
            return [self.text.ids(word)[::-1] for word in words]
        question, _ = self.template.render(Prompt((), self.example))
        texts = [question, *(f"{question} {word}" for word in words)]
        before, *answered = (ids for ids, _ in self.text.with_offsets(texts))
        return [ids[len(before) :] if ids[: len(before)] == before else None for ids in answered]

    def _distinct(self, tokens: Sequence[list[int]], where: str) -> list[int]:
        """Return each label word's token, given the tokens of all words; refuse equal ones."""
        words = self.template.label_words
        shown = [f"{word!r} -> {ids}" for word, ids in zip(words, tokens, strict=True)]
        several = [text for text, ids in zip(shown, tokens, strict=True) if len(ids) != 1]
        if self.label_token == "single" and several:
            more = f", and {len(several) - 2} more" if len(several) > 2 else ""
            raise LabelsAlikeError(
                f"{self.dataset}: label words are several tokens {where} "
                f"({', '.join(several[:2])}{more})"
            )
        first = [ids[0] for ids in tokens]
        twins = [
            (shown[i], shown[first.index(id_)])
            for i, id_ in enumerate(first)
            if first.index(id_) != i
        ]
        if twins:
            later, earlier = twins[0]
            more = f", and {len(twins)} words in all are like an earlier one" if twins[1:] else ""
            raise LabelsAlikeError(
                f"{self.dataset}: label words share a token {where} ({earlier}, {later}{more}), so "
                "they cannot be told apart"
            )
        return first


def settings_that_help(dataset: Dataset, labels: LabelTokens) -> dict[str, str] | None:
    """Return the settings that tell a dataset's labels apart, found by trying.

    Args:
        dataset: the dataset.
        labels: its label words as they cannot be told apart.

    Returns:
        New values of `form`, `label_token` or both, as few as possible; None where none helps.
    """
    now = {"form": labels.template.form, "label_token": labels.label_token}
    settings = [
        {"form": form, "label_token": label_token}.items() - now.items()
        for label_token in ("first", "single")
        for form in ("ours", "staicc")
    ]
    for changed in sorted(filter(None, settings), key=len):
        setting = now | dict(changed)
        trial = replace(
            labels,
            template=Template.of(dataset, setting["form"]),
            label_token=setting["label_token"],
        )
        try:
            trial.tell_apart()
        except LabelsAlikeError:
            continue
        return dict(sorted(changed))
    return None
