"""Prompts: texts become token ids, label positions, and which labels are the query's own."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from abft_fast.core.packing import EncodedPrompt
from abft_fast.data import DATASETS, Dataset, Prompt
from abft_fast.errors import UserError
from abft_fast.options import PromptOptions, flag

_CHUNK = 64  # prompts tokenized at a time, so that too long ones are refused at once


@dataclass(frozen=True)
class Template:
    """How a dataset's prompts are written.

    Form `ours`: texts are stripped and one space belongs to the label token, in demonstrations
    and at the query alike. Form `staicc`: StaICC's own string, whose query ends in a space, so a
    label is predicted without one.
    """

    input_prefix: str
    label_prefix: str
    label_words: tuple[str, ...]
    form: str
    instruction: str = ""
    input_affix: str = " "
    label_affix: str = "\n"
    query_prefix: str = ""

    @classmethod
    def of(cls, dataset: Dataset, form: str) -> Template:
        """Return the template of a dataset in form `ours` or `staicc`."""
        words = dataset.label_words if form == "ours" else dataset.staicc_label_words
        return cls(dataset.input_prefix, dataset.label_prefix, words, form)

    def render(self, prompt: Prompt) -> tuple[str, list[tuple[int, int]]]:
        """Return the prompt's text and the (start, end) of each demonstration's label word."""
        text, spans = self.instruction, []
        for example in prompt.demonstrations:
            text += self._question(example.text)
            if self.form == "ours":
                text += " "
            word = self.label_words[example.label]
            spans.append((len(text), len(text) + len(word)))
            text += word + self.label_affix
        return text + self.query_prefix + self._question(prompt.query.text), spans

    def _question(self, text: str) -> str:
        label_prefix = self.label_prefix
        if self.form == "ours":
            text, label_prefix = text.strip(), label_prefix.rstrip()
        return f"{self.input_prefix}{text}{self.input_affix}{label_prefix}"


@dataclass
class EncodedPrompts:
    """Tokenized prompts in the order asked for, and what happened to those too long.

    Attributes:
        prompts: the prompts kept.
        labels: index of each kept query's label word.
        kept: index of each kept prompt among those given.
        label_ids: the token each label word is at these queries.
        dropped: prompts left out.
        shortened: prompts that lost demonstrations.
    """

    prompts: list[EncodedPrompt] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    label_ids: list[int] = field(default_factory=list)
    dropped: int = 0
    shortened: int = 0


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
        name_flags: name arguments in errors as the command line's flags.

    Attributes:
        label_ids: the token of each label word at the query, in the order of the label words.

    Raises:
        UserError: a label word is several tokens, two label words are the same token, or a word
            is not the same token in a demonstration and at the query.
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
        name_flags: bool = False,
    ):
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer {type(tokenizer).__name__} reports no character offsets, so label "
                "positions are unknown: use the model's fast tokenizer"
            )
        self.dataset = dataset.name
        self.template = Template.of(dataset, form)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.on_long_prompt = on_long_prompt
        self._label_token = label_token
        self._name_flags = name_flags
        self._another = "another model"
        if dataset.name not in DATASETS:
            self._another += " or other words" + (" by --template" if name_flags else "")
        self._example = dataset.training[0]
        self._demonstration_ids = self._check_demonstration_labels()
        self.label_ids = self._check_query_labels(self.template)
        for word, query_id, id_ in zip(
            self.template.label_words, self.label_ids, self._demonstration_ids, strict=True
        ):
            if form == "ours" and query_id != id_:
                raise UserError(
                    f"{self.dataset}: label word {word!r} is token {id_} in demonstrations but "
                    f"{query_id} at the query in this tokenizer; use "
                    f"{self._setting('form', 'staicc')}"
                )

    @classmethod
    def by_options(
        cls,
        options: PromptOptions,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset,
        max_length: int | None,
    ) -> PromptEncoder:
        """Return the encoder of a run with these options."""
        return cls(
            tokenizer,
            dataset,
            form=options.prompt_form,
            label_token=options.label_token,
            max_length=max_length,
            on_long_prompt=options.on_long_prompt,
            name_flags=True,
        )

    def encode(self, prompts: Sequence[Prompt], template: Template | None = None) -> EncodedPrompts:
        """Tokenize prompts; those beyond the context length are refused, dropped or shortened.

        Args:
            prompts: demonstrations and a query each.
            template: how prompts are written, if not by the dataset's own template; label words are
                then predicted by their tokens under this template, which may differ from those in
                demonstrations.

        Raises:
            UserError: a prompt is too long and `on_long_prompt` is `refuse`, or none is left, or
                labels cannot be told apart under the template.
        """
        template = template or self.template
        label_ids = self.label_ids
        if template != self.template:
            label_ids = self._check_query_labels(template)
        result = EncodedPrompts(label_ids=label_ids)
        longest = 0
        for start in range(0, len(prompts), _CHUNK):
            chunk = prompts[start : start + _CHUNK]
            pairs = zip(chunk, self._encode(chunk, template), strict=True)
            for i, (prompt, encoded) in enumerate(pairs, start):
                kept: EncodedPrompt | None = encoded
                if self.max_length is not None and len(encoded) > self.max_length:
                    longest = max(longest, len(encoded))
                    kept = self._fit(prompt, template, self.max_length)
                    result.shortened += kept is not None
                    result.dropped += kept is None
                if kept is not None:
                    result.prompts.append(kept)
                    result.labels.append(prompt.query.label)
                    result.kept.append(i)
            if longest and self.on_long_prompt == "refuse":
                raise UserError(
                    f"{self.dataset}: a prompt of {longest} tokens is longer than the model's "
                    f"context of {self.max_length} tokens: {self._fewer_demonstrations()}, or pass "
                    f"{self._setting('on_long_prompt', 'drop', 'fewer-demonstrations')}"
                )
        if not result.prompts:
            raise UserError(
                f"{self.dataset}: all {len(prompts)} prompts are longer than the model's context "
                f"of {self.max_length} tokens: {self._fewer_demonstrations()}"
            )
        return result

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
            prompts, rendered, self._tokenize([text for text, _ in rendered]), strict=True
        ):
            positions = [_overlapping(offsets, span)[0] for span in spans]
            for position, demonstration in zip(positions, prompt.demonstrations, strict=True):
                expected = self._demonstration_ids[demonstration.label]
                if ids[position] != expected and template == self.template:
                    word = self.template.label_words[demonstration.label]
                    raise UserError(
                        f"{self.dataset}: label word {word!r} is token {expected} in one "
                        f"prompt and {ids[position]} in another; this tokenizer is not supported"
                    )
            correct = [d.label == prompt.query.label for d in prompt.demonstrations]
            encoded.append(EncodedPrompt(ids, positions, correct))
        return encoded

    def _tokenize(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return token ids and character offsets, without special tokens at the end."""
        batch = self.tokenizer(texts, return_offsets_mapping=True, verbose=False)
        result = []
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
            end = len(ids)
            while end > 1 and offsets[end - 1][0] == offsets[end - 1][1]:
                end -= 1
            result.append((ids[:end], offsets[:end]))
        return result

    def _check_demonstration_labels(self) -> list[int]:
        tokens = []
        query = self._example
        for label in range(len(self.template.label_words)):
            demonstration = type(query)(query.text, label)
            text, spans = self.template.render(Prompt((demonstration,), query))
            ids, offsets = self._tokenize([text])[0]
            tokens.append([ids[i] for i in _overlapping(offsets, spans[0])])
        return self._distinct_tokens(tokens, "in demonstrations")

    def _check_query_labels(self, template: Template) -> list[int]:
        if template.form == "staicc":  # its harness looks a word up alone, last token
            alone = [
                self.tokenizer(word, add_special_tokens=False)["input_ids"][::-1]
                for word in template.label_words
            ]
            return self._distinct_tokens(alone, "at the query")
        question, _ = template.render(Prompt((), self._example))
        before, _ = self._tokenize([question])[0]
        tokens = []
        for word in template.label_words:
            ids, _ = self._tokenize([f"{question} {word}"])[0]
            if ids[: len(before)] != before:
                raise UserError(
                    f"{self.dataset}: label word {word!r} merges with the text before it in this "
                    "tokenizer, so it cannot be predicted; use another model or "
                    f"{self._setting('form', 'staicc')}"
                )
            tokens.append(ids[len(before) :])
        return self._distinct_tokens(tokens, "at the query")

    def _distinct_tokens(self, tokens: list[list[int]], where: str) -> list[int]:
        """Return each label word's token, given the tokens of all words; refuse equal ones."""
        words = zip(self.template.label_words, tokens, strict=True)
        listing = ", ".join(f"{word!r} -> {ids}" for word, ids in words)
        if self._label_token == "single" and any(len(ids) != 1 for ids in tokens):
            raise UserError(
                f"{self.dataset}: label words are several tokens {where} ({listing}): "
                f"pass {self._setting('label_token', 'first')}, or use {self._another}"
            )
        first = [ids[0] for ids in tokens]
        if len(set(first)) != len(first):
            raise UserError(
                f"{self.dataset}: label words share a token {where} ({listing}), so they cannot "
                f"be told apart: use {self._another}"
            )
        return first

    def _setting(self, argument: str, *values: str) -> str:
        """Name an argument and its values as the caller gives them."""
        if self._name_flags:
            name = "prompt_form" if argument == "form" else argument
            return f"{flag(name)} {' or '.join(values)}"
        return f"{argument}={' or '.join(map(repr, values))}"

    def _fewer_demonstrations(self) -> str:
        return "lower --k" if self._name_flags else "use fewer demonstrations"


def _overlapping(offsets: Sequence[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """Return the tokens that share a character with a span; offsets never go back."""
    first = bisect_right(offsets, span[0], key=lambda offset: offset[1])
    tokens = range(first, len(offsets))
    return list(itertools.takewhile(lambda i: offsets[i][0] < span[1], tokens))
