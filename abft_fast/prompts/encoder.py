"""Encode a dataset's prompts for one model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from abft_fast.core.packing import EncodedPrompt
from abft_fast.data import NAMES, Boxes, Dataset, Prompt
from abft_fast.errors import UserError
from abft_fast.options import PromptOptions, flag
from abft_fast.prompts.label_tokens import LabelsAlikeError, LabelTokens, settings_that_help
from abft_fast.prompts.symbols import Symbols, candidate_words, divide
from abft_fast.prompts.template import Template
from abft_fast.prompts.text_tokens import TextTokens, overlapping

_CHUNK = 64  # prompts tokenized at a time, so that too long ones are refused at once


@dataclass
class EncodedPrompts:
    """Tokenized prompts in the order asked for, and what happened to those too long.

    Attributes:
        prompts: the prompts kept.
        labels: index of each kept query's label word among those that may answer it.
        kept: index of each kept prompt among those given.
        label_ids: the token of each label word at these queries.
        answers: indices of the label words that may answer each kept query; empty where all may
            answer every one.
        dropped: prompts left out.
        shortened: prompts that lost demonstrations.
    """

    prompts: list[EncodedPrompt] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    label_ids: list[int] = field(default_factory=list)
    answers: list[Sequence[int]] = field(default_factory=list)
    dropped: int = 0
    shortened: int = 0

    def answer_ids(self, index: int) -> list[int]:
        """Return the tokens that may answer a kept query; `labels` indexes them."""
        if not self.answers:
            return self.label_ids
        return [self.label_ids[label] for label in self.answers[index]]

    def of_answers(self, logits: Tensor) -> Tensor:
        """Return the logits (P, answers) of what may answer each prompt, of (P, label words)."""
        return logits.gather(1, torch.tensor(self.answers)) if self.answers else logits


def label_among(prompt: Prompt, answers: Sequence[int] | None) -> int:
    """Return the index of the query's label among its answers; None stands for all labels."""
    label = prompt.query.label
    return label if answers is None else answers.index(label)


class PromptEncoder:
    """Tokenize one dataset's prompts for one model; check first that labels can be told apart.

    Args:
        tokenizer: the model's fast tokenizer.
        dataset: prompts are of this dataset.
        form: `"ours"` or `"staicc"`; see `Template`.
        label_token: `"single"` refuses label words of several tokens, `"first"` uses their first
            token (at the query in StaICC's form their last, as StaICC does).
        max_length: tokens a prompt may have at most; None for any number.
        on_long_prompt: what happens to a longer prompt: `"refuse"`, `"drop"` or
            `"fewer-demonstrations"`.
        vocabulary: tokens that the model has; None for any number.
        name_flags: name arguments in errors as the command line's flags.

    A special token's spelling in a text, such as `</s>`, is tokenized as ordinary characters. If
    the template itself holds a special token, spellings in texts become special tokens, too.

    Attributes:
        label_ids: the token of each label word at the query, in the order of the label words.

    Raises:
        UserError: the tokenizer is not a fast one; a label word is several tokens, outside the
            vocabulary, or merges with the text before it; or two label words are the same token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset,
        *,
        form: str = "ours",
        label_token: str = "single",
        max_length: int | None = None,
        on_long_prompt: str = "refuse",
        vocabulary: int | None = None,
        name_flags: bool = False,
    ):
        self.dataset = dataset.name
        self.template = Template.of(dataset, form)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.vocabulary = vocabulary
        self.on_long_prompt = on_long_prompt
        self._data = dataset
        self._name_flags = name_flags
        template = self.template
        written = (template.input_prefix, template.label_prefix, *template.label_words)
        self._text = TextTokens(tokenizer, written)
        self._labels = LabelTokens(self._text, dataset.name, dataset.example, template, label_token)
        try:
            self._demonstration_ids, self.label_ids = self._labels.tell_apart()
        except LabelsAlikeError as error:
            raise UserError(f"{error}: {self._remedy()}") from None
        for ids, where in ((self._demonstration_ids, "demonstrations"), (self.label_ids, "query")):
            self.check_vocabulary(ids, f"{self.dataset}, a label word in a prompt's {where}")

    @classmethod
    def from_options(
        cls,
        options: PromptOptions,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset,
        max_length: int | None,
        vocabulary: int | None = None,
    ) -> PromptEncoder:
        """Return the encoder of a run with these options."""
        return cls(
            tokenizer,
            dataset,
            form=options.prompt_form,
            label_token=options.label_token,
            max_length=max_length,
            on_long_prompt=options.on_long_prompt,
            vocabulary=vocabulary,
            name_flags=True,
        )

    def with_label_words(self, words: Sequence[str]) -> PromptEncoder:
        """Return an encoder of the same dataset with other label words, of any number.

        Raises:
            UserError: as the class.
        """
        words = tuple(words)
        return PromptEncoder(
            self.tokenizer,
            replace(self._data, label_words=words, staicc_label_words=words),
            form=self.template.form,
            max_length=self.max_length,
            on_long_prompt=self.on_long_prompt,
            vocabulary=self.vocabulary,
            name_flags=self._name_flags,
        )

    @functools.cached_property
    def symbols(self) -> Symbols:
        """Return words that may stand for labels though they mean nothing here."""
        template = self.template
        written = (*template.label_words, template.input_prefix, template.label_prefix)
        words = candidate_words(self.tokenizer, written, self.vocabulary)
        template = replace(self.template, label_words=tuple(words))
        return divide(replace(self._labels, template=template).of_one_token())

    def special_token_in(self, text: str) -> str | None:
        """Return a special token of the model that a text's own characters become; None if none."""
        return self._text.special_token_in(text)

    def check_vocabulary(self, ids: Sequence[int], place: str) -> None:
        """Refuse tokens that the model does not have.

        Args:
            ids: the tokens.
            place: where their text is, for the message.

        Raises:
            UserError: a token is outside the model's vocabulary.
        """
        largest = max(ids, default=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            token = self.tokenizer.decode([largest]).strip()
            raise UserError(
                f"{place}: {token!r} is token {largest} of the tokenizer, but the model has "
                f"{self.vocabulary} tokens: use the tokenizer that the model was saved with, or "
                f"leave {token!r} out"
            )

    def encode(
        self,
        prompts: Sequence[Prompt],
        template: Template | None = None,
        places: Sequence[str] | None = None,
        answers: Sequence[Sequence[int]] | None = None,
    ) -> EncodedPrompts:
        """Tokenize prompts; those beyond the context length are refused, dropped or shortened.

        Args:
            prompts: demonstrations and a query each.
            template: how prompts are written, if not by the dataset's own template; label words are
                then predicted by their tokens under this template, which may differ from those in
                demonstrations.
            places: where each query is, for messages, if it is not in the dataset.
            answers: label words that may answer each query, by index, equally many for each; None
                where all may.

        Returns:
            The prompts kept, in the order given.

        Raises:
            UserError: a prompt is too long and `on_long_prompt` is `refuse`, or none is left, or
                labels cannot be told apart under the template, or a token is outside the
                vocabulary.
        """
        template = template or self.template
        label_ids = self.label_ids
        if template != self.template:
            try:
                label_ids = replace(self._labels, template=template).at_query_apart()
            except LabelsAlikeError as error:
                raise UserError(f"{error}: use {self._another_model()}") from None
        result = EncodedPrompts(label_ids=label_ids)
        longest = 0
        for start in range(0, len(prompts), _CHUNK):
            chunk = prompts[start : start + _CHUNK]
            pairs = zip(chunk, self._encode(chunk, template), strict=True)
            for i, (prompt, encoded) in enumerate(pairs, start):
                if self.vocabulary is not None and max(encoded.input_ids) >= self.vocabulary:
                    self._refuse_outside(prompt, encoded, places[i] if places else None)
                kept: EncodedPrompt | None = encoded
                if self.max_length is not None and len(encoded) > self.max_length:
                    longest = max(longest, len(encoded))
                    kept = self._fit(prompt, template, self.max_length)
                    result.shortened += kept is not None
                    result.dropped += kept is None
                among = None if answers is None else answers[i]
                if kept is not None:
                    result.prompts.append(kept)
                    result.labels.append(label_among(prompt, among))
                    result.kept.append(i)
                    if among is not None:
                        result.answers.append(among)
            if longest and self.on_long_prompt == "refuse":
                others = ["drop"] + ["fewer-demonstrations"] * (not isinstance(self._data, Boxes))
                raise UserError(
                    f"{self.dataset}: a prompt of {longest} tokens is longer than the model's "
                    f"context of {self.max_length} tokens: {self._fewer_demonstrations()}, or pass "
                    f"{self._setting('on_long_prompt', *others)}"
                )
        if not result.prompts:
            raise UserError(
                f"{self.dataset}: all {len(prompts)} prompts are longer than the model's context "
                f"of {self.max_length} tokens: {self._fewer_demonstrations()}"
            )
        return result

    def tokens_at(self, prompt: Prompt, spans: Sequence[tuple[int, int]]) -> list[int]:
        """Return the position of the first token of each (start, end) of a prompt's text."""
        [(_, offsets)] = self._text.with_offsets([self.template.render(prompt)[0]])
        return [overlapping(offsets, span)[0] for span in spans]

    def _fit(self, prompt: Prompt, template: Template, max_length: int) -> EncodedPrompt | None:
        """Return the prompt with as many of its last demonstrations as fit; None to drop it."""
        if self.on_long_prompt != "fewer-demonstrations":
            return None
        for first in range(1, len(prompt.demonstrations)):
            shorter = Prompt(prompt.demonstrations[first:], prompt.query)
            encoded = self._encode([shorter], template)[0]
            if len(encoded) <= max_length:
                return encoded
        return None

    def _encode(self, prompts: Sequence[Prompt], template: Template) -> list[EncodedPrompt]:
        rendered = [template.render(prompt) for prompt in prompts]
        encoded = []
        for prompt, (_, spans), (ids, offsets) in zip(
            prompts, rendered, self._text.with_offsets([text for text, _ in rendered]), strict=True
        ):
            positions = [overlapping(offsets, span)[0] for span in spans]
            if template == self.template:
                self._check_demonstrations(prompt, [ids[position] for position in positions])
            correct = [d.label == prompt.query.label for d in prompt.demonstrations]
            encoded.append(EncodedPrompt(ids, positions, correct))
        return encoded

    def _check_demonstrations(self, prompt: Prompt, tokens: Sequence[int]) -> None:
        """Refuse a label word that is another token in this prompt than in the one tried first."""
        for demonstration, token in zip(prompt.demonstrations, tokens, strict=True):
            expected = self._demonstration_ids[demonstration.label]
            if token != expected:
                word = self.template.label_words[demonstration.label]
                raise UserError(
                    f"{self.dataset}: label word {word!r} is token {expected} in one "
                    f"prompt and {token} in another; this tokenizer is not supported"
                )

    def _refuse_outside(
        self, prompt: Prompt, encoded: EncodedPrompt, query_place: str | None
    ) -> None:
        """Name the text that holds a token outside the vocabulary."""
        for example in prompt.demonstrations:
            self.check_vocabulary(self._text.ids(example.text), self._data.place_of(example))
        query = query_place or self._data.place_of(prompt.query)
        self.check_vocabulary(self._text.ids(prompt.query.text), query)
        self.check_vocabulary(encoded.input_ids, f"{self.dataset}: a prompt")

    def _remedy(self) -> str:
        """Return what tells the labels apart: the setting that changes least."""
        if isinstance(self._data, Boxes):
            return "choose objects of one token by `abft_fast.prompts.for_tokenizer`"
        helps = settings_that_help(self._data, self._labels)
        if helps is not None:
            given = " and ".join(self._setting(name, value) for name, value in helps.items())
            return f"pass {given}, or use {self._another_model()}"
        now = {"form": self.template.form, "label_token": self._labels.label_token}
        other = {"label_token": "first", "form": "staicc"}.items() - now.items()
        tried = " and ".join(self._setting(*pair) for pair in sorted(other, reverse=True))
        without_help = f"{tried} would not help; " if tried else ""
        return f"{without_help}use {self._another_model()}"

    def _another_model(self) -> str:
        if self.dataset in NAMES:
            return "another model"
        if self._name_flags:
            return "other words by --template or another model"
        return "another model or other words"

    def _setting(self, argument: str, *values: str) -> str:
        """Name an argument and its values as the caller gives them."""
        if self._name_flags:
            name = "prompt_form" if argument == "form" else argument
            return f"{flag(name)} {' or '.join(values)}"
        return f"{argument}={' or '.join(map(repr, values))}"

    def _fewer_demonstrations(self) -> str:
        if isinstance(self._data, Boxes):
            return "use a dataset of fewer boxes"
        return "lower --k" if self._name_flags else "use fewer demonstrations"
