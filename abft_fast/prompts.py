"""Prompts: texts become token ids, label positions, and which labels are the query's own."""

from __future__ import annotations

import copy
import itertools
import re
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


class _LabelsAlikeError(UserError):
    """Labels cannot be told apart; the message does not say yet what to do."""


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

    Special tokens, such as `</s>`, that stand in a text stay text: they are tokenized as other
    characters are. Only where the template itself holds a special token, texts may hold some, too.

    Attributes:
        label_ids: the token of each label word at the query, in the order of the label words.

    Raises:
        UserError: a label word is several tokens or outside the vocabulary, two label words are the
            same token, or a word is not the same token in a demonstration and at the query.
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
        if not tokenizer.is_fast:
            raise UserError(
                f"tokenizer {type(tokenizer).__name__} reports no character offsets, so label "
                "positions are unknown: use the model's fast tokenizer"
            )
        self.dataset = dataset.name
        self.template = Template.of(dataset, form)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.vocabulary = vocabulary
        self._data = dataset
        self._special = _special_tokens(tokenizer)
        self._any_special = re.compile("|".join(map(re.escape, self._special)) or "(?!)")
        template = self.template
        written = (template.input_prefix, template.label_prefix, *template.label_words)
        self._texts_stay_text = not any(map(self._any_special.search, written))
        self.on_long_prompt = on_long_prompt
        self._label_token = label_token
        self._name_flags = name_flags
        self._another = "another model"
        if dataset.name not in DATASETS:
            self._another += " or other words" + (" by --template" if name_flags else "")
        self._example = dataset.training[0]
        try:
            self._demonstration_ids, self.label_ids = self._tell_labels_apart()
        except _LabelsAlikeError as error:
            raise UserError(f"{error}: {self._remedy()}") from None
        for ids, where in ((self._demonstration_ids, "demonstrations"), (self.label_ids, "query")):
            self.check_vocabulary(ids, f"{self.dataset}, a label word in a prompt's {where}")

    @classmethod
    def by_options(
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

    def special_token_in(self, text: str) -> str | None:
        """Return a special token of the model that a text's own characters become; None if none."""
        found = [match[0] for match in self._any_special.finditer(text)]
        ids = self.plain_ids(text) if found else []
        return next((token for token in found if self._special[token] in ids), None)

    def plain_ids(self, text: str) -> list[int]:
        """Return the token ids of a text alone, without special tokens around it."""
        options = {"add_special_tokens": False, "split_special_tokens": self._texts_stay_text}
        return self.tokenizer(text, verbose=False, **options)["input_ids"]

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
    ) -> EncodedPrompts:
        """Tokenize prompts; those beyond the context length are refused, dropped or shortened.

        Args:
            prompts: demonstrations and a query each.
            template: how prompts are written, if not by the dataset's own template; label words are
                then predicted by their tokens under this template, which may differ from those in
                demonstrations.
            places: where each query is, for messages, if it is not in the dataset.

        Raises:
            UserError: a prompt is too long and `on_long_prompt` is `refuse`, or none is left, or
                labels cannot be told apart under the template, or a token is outside the
                vocabulary.
        """
        template = template or self.template
        label_ids = self.label_ids
        if template != self.template:
            try:
                label_ids = self._check_query_labels(template)
            except _LabelsAlikeError as error:
                raise UserError(f"{error}: use {self._another}") from None
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

    def _refuse_outside(
        self, prompt: Prompt, encoded: EncodedPrompt, query_place: str | None
    ) -> None:
        """Name the text that holds a token outside the vocabulary."""
        for example in prompt.demonstrations:
            self.check_vocabulary(self.plain_ids(example.text), self._data.place_of(example))
        query = query_place or self._data.place_of(prompt.query)
        self.check_vocabulary(self.plain_ids(prompt.query.text), query)
        self.check_vocabulary(encoded.input_ids, f"{self.dataset}: a prompt")

    def _tokenize(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return token ids and character offsets, without special tokens at the end."""
        batch = self.tokenizer(
            texts,
            return_offsets_mapping=True,
            split_special_tokens=self._texts_stay_text,
            verbose=False,
        )
        result = []
        for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
            end = len(ids)
            while end > 1 and offsets[end - 1][0] == offsets[end - 1][1]:
                end -= 1
            result.append((ids[:end], offsets[:end]))
        return result

    def _tell_labels_apart(self) -> tuple[list[int], list[int]]:
        """Return the token of each label word, in demonstrations and at the query."""
        in_demonstrations = self._check_demonstration_labels()
        at_query = self._check_query_labels(self.template)
        for word, id_, query_id in zip(
            self.template.label_words, in_demonstrations, at_query, strict=True
        ):
            if self.template.form == "ours" and query_id != id_:
                raise _LabelsAlikeError(
                    f"{self.dataset}: label word {word!r} is token {id_} in demonstrations but "
                    f"{query_id} at the query in this tokenizer"
                )
        return in_demonstrations, at_query

    def _remedy(self) -> str:
        """Return what tells the labels apart: the setting that changes least, found by trying."""
        now = {"form": self.template.form, "label_token": self._label_token}
        settings = [
            {"form": form, "label_token": label_token}.items() - now.items()
            for label_token in ("first", "single")
            for form in ("ours", "staicc")
        ]
        for changed in sorted(filter(None, settings), key=len):
            trial = copy.copy(self)
            setting = now | dict(changed)
            trial.template = Template.of(self._data, setting["form"])
            trial._label_token = setting["label_token"]
            try:
                trial._tell_labels_apart()
            except _LabelsAlikeError:
                continue
            given = " and ".join(self._setting(name, value) for name, value in sorted(changed))
            return f"pass {given}, or use {self._another}"
        other = {"label_token": "first", "form": "staicc"}.items() - now.items()
        tried = " and ".join(self._setting(*pair) for pair in sorted(other, reverse=True))
        without_help = f"no help is in {tried}; " if tried else ""
        return f"{without_help}use {self._another}"

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
            alone = [self.plain_ids(word)[::-1] for word in template.label_words]
            return self._distinct_tokens(alone, "at the query")
        question, _ = template.render(Prompt((), self._example))
        before, _ = self._tokenize([question])[0]
        tokens = []
        for word in template.label_words:
            ids, _ = self._tokenize([f"{question} {word}"])[0]
            if ids[: len(before)] != before:
                raise _LabelsAlikeError(
                    f"{self.dataset}: label word {word!r} merges with the text before it in this "
                    "tokenizer, so it cannot be predicted"
                )
            tokens.append(ids[len(before) :])
        return self._distinct_tokens(tokens, "at the query")

    def _distinct_tokens(self, tokens: list[list[int]], where: str) -> list[int]:
        """Return each label word's token, given the tokens of all words; refuse equal ones."""
        shown = [
            f"{w!r} -> {ids}" for w, ids in zip(self.template.label_words, tokens, strict=True)
        ]
        several = [text for text, ids in zip(shown, tokens, strict=True) if len(ids) != 1]
        if self._label_token == "single" and several:
            more = f", and {len(several) - 2} more" if len(several) > 2 else ""
            raise _LabelsAlikeError(
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
            raise _LabelsAlikeError(
                f"{self.dataset}: label words share a token {where} ({earlier}, {later}{more}), so "
                "they cannot be told apart"
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


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of the tokens that steer a model, by their text; `<unk>` is none of them."""
    names = tokenizer.all_special_tokens
    named = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    added = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return {token: i for token, i in (named | added).items() if token != tokenizer.unk_token}


def _overlapping(offsets: Sequence[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """Return the tokens that share a character with a span; offsets never go back."""
    first = bisect_right(offsets, span[0], key=lambda offset: offset[1])
    tokens = range(first, len(offsets))
    return list(itertools.takewhile(lambda i: offsets[i][0] < span[1], tokens))
