"""How a dataset's prompts are written."""

from __future__ import annotations

from dataclasses import dataclass

from abft_fast.data import Boxes, Dataset, Prompt


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
        """Return the template of a dataset in form `ours` or `staicc`; boxes have `ours` only."""
        if isinstance(dataset, Boxes):
            return BoxTemplate("", "", dataset.label_words, "ours")
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
            text, label_prefix = text.strip(), label_prefix.rstrip(" ")
        return f"{self.input_prefix}{text}{self.input_affix}{label_prefix}"


@dataclass(frozen=True)
class BoxTemplate(Template):
    """How prompts of `data.Boxes` are written: each label word stands before its box's letter."""

    def render(self, prompt: Prompt) -> tuple[str, list[tuple[int, int]]]:
        """Return the prompt's text and the (start, end) of each box's object."""
        text, spans = "", []
        for box in prompt.demonstrations:
            text += ", the " if text else "The "
            word = self.label_words[box.label]
            spans.append((len(text), len(text) + len(word)))
            text += f"{word} is in Box {box.text}"
        return f"{text}{'. ' if text else ''}Box {prompt.query.text} contains the", spans

    def letters(self, prompt: Prompt) -> list[tuple[int, int]]:
        """Return the (start, end) of the asked box's letter: where its object is, and at the end.

        Raises:
            ValueError: the box that is asked for is not in the prompt.
        """
        text, _ = self.render(prompt)
        box = f"Box {prompt.query.text}"
        starts = [find(box) + len("Box ") for find in (text.index, text.rindex)]
        if starts[0] == starts[1]:
            raise ValueError(f"{box} is not in the prompt")
        return [(start, start + len(prompt.query.text)) for start in starts]
