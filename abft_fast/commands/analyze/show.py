"""`abft-fast analyze show`: the last row of every head's attention on one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from numpy.typing import NDArray

from abft_fast.analysis.last_row import run_prompt
from abft_fast.commands.analyze import pictures
from abft_fast.commands.analyze.models import ComparedModels, call_of_test
from abft_fast.commands.analyze.results import Results
from abft_fast.commands.session import PromptSession
from abft_fast.core.backbone import attention_layers
from abft_fast.core.packing import EncodedPrompt
from abft_fast.errors import UserError
from abft_fast.options import ShowConfig
from abft_fast.prompts.template import BoxTemplate
from abft_fast.prompts.text_tokens import TextTokens
from abft_fast.runtime.freed_memory import collect_and_give_back
from abft_fast.runtime.progress import Progress

_TEMPLATE = Path(__file__).with_name("show.html.jinja")
_LAYERS = 2  # that are shown where none are named


@dataclass(frozen=True)
class Token:
    """One token of the prompt.

    Attributes:
        text: its characters.
        shown: the same with visible spaces and line ends.
        mark: `right` or `wrong` for labels, `asked` for the letter of the box that is asked for,
            else empty.
    """

    text: str
    shown: str
    mark: str


class ShowSession(PromptSession, ComparedModels):
    """Hold one prompt.

    Attributes:
        prompt: the prompt.
        letters: positions of the letter of the box that is asked for; none without boxes.
    """

    config: ShowConfig
    letters: Sequence[int] = ()

    def __init__(self, config: ShowConfig, progress: Progress):
        super().__init__(config, progress)
        self.prompt = self._of_text() if config.text is not None else self._of_dataset()

    def _of_dataset(self) -> EncodedPrompt:
        config = self.config
        call = call_of_test(config, self.dataset)
        if config.prompt_index >= len(call.prompts):
            raise UserError(
                f"--prompt-index {config.prompt_index}: the test has the prompts 0 to "
                f"{len(call.prompts) - 1}"
            )
        encoded = call.only([config.prompt_index]).encode(self.encoder)
        if isinstance(call.template, BoxTemplate):
            prompt = call.prompts[config.prompt_index]
            self.letters = self.encoder.tokens_at(prompt, call.template.letters(prompt))
        self.say_too_long(encoded, "test", "with fewer demonstrations")
        return encoded.prompts[0]

    def _of_text(self) -> EncodedPrompt:
        text = self.config.text or ""
        [(ids, _)] = TextTokens(self.encoder.tokenizer, [text]).with_offsets([text])
        if not ids:
            raise UserError("--text is empty: give a prompt")
        self.encoder.check_vocabulary(ids, "--text")
        most = self.encoder.max_length
        if most is not None and len(ids) > most:
            raise UserError(
                f"--text has {len(ids)} tokens, but the model's context has {most}: shorten it"
            )
        return EncodedPrompt(list(ids), [], [])

    def tokens(self) -> list[Token]:
        """Return the prompt's tokens with the marks of its labels."""
        decode = self.encoder.tokenizer.decode
        pairs = zip(self.prompt.label_positions, self.prompt.label_is_correct, strict=True)
        marks = {position: "right" if correct else "wrong" for position, correct in pairs}
        marks |= dict.fromkeys(self.letters, "asked")
        texts = [decode([token]) for token in self.prompt.input_ids]
        return [
            Token(text, text.replace("\n", "⏎").replace(" ", "␣"), marks.get(i, ""))
            for i, text in enumerate(texts)
        ]


@torch.no_grad()
def show(config: ShowConfig, progress: Progress) -> Results:
    """Write the attention of one prompt's last token: a table, a picture and a page.

    Raises:
        UserError: the options, the models or the data do not allow it.
    """
    session = ShowSession(config, progress)
    rows, layers = _rows_by_model(session)
    chosen = _chosen_layers(session, rows, layers)
    tokens = session.tokens()
    shown = {
        name: {layer: values[layers.index(layer)] for layer in chosen}
        for name, values in rows.items()
    }
    results = Results(config.output_dir, "show")
    results.table(_table(shown, tokens))
    results.picture(pictures.show, shown, tokens)
    results.page(_page(session, shown, tokens))
    return results


def _rows_by_model(session: ShowSession) -> tuple[dict[str, NDArray], list[int]]:
    """Return each model's last rows, (layers, Hq, n), by the model's name, and the layers.

    Models of `--also` are in memory one at a time.
    """
    rows = _rows_of_pair(session)
    for folder in session.config.also:
        del session.model
        collect_and_give_back()
        session.load()
        session.load_adapter(folder)
        rows[str(folder)] = _attention(session, session.model)
    return rows, list(attention_layers(session.model))


def _rows_of_pair(session: ShowSession) -> dict[str, NDArray]:
    pair = session.pair()
    names = {"before": "base", "after": "tuned"}
    rows = {}
    for side, model_of in session.sides(pair).items():
        with model_of() as model:
            rows[names[side]] = _attention(session, model)
    return rows


def _attention(session: ShowSession, model: Any) -> NDArray:
    with session.accelerator.autocast():
        row = run_prompt(
            model.eval(), session.prompt, session.encoder.label_ids,
            session.config.attention_backend,
        )  # fmt: skip
    return row.attention().float().cpu().numpy()


def _chosen_layers(
    session: ShowSession, rows: dict[str, NDArray], layers: Sequence[int]
) -> list[int]:
    """Return the layers that are named, or those that attend most to labels, or the last ones."""
    unknown = [layer for layer in session.config.chosen_layers if layer not in layers]
    if unknown:
        raise UserError(
            f"--layers {unknown[0]}: the layers with attention are {min(layers)} to {max(layers)}"
        )
    if session.config.chosen_layers:
        return session.config.chosen_layers
    positions = session.prompt.label_positions
    if not positions:
        return list(layers)[-_LAYERS:]
    mass = list(rows.values())[-1][:, :, positions].sum(axis=(1, 2))
    return sorted(layers[index] for index in mass.argsort()[::-1][:_LAYERS])


def _table(shown: dict[str, dict[int, NDArray]], tokens: Sequence[Token]) -> list[dict[str, Any]]:
    return [
        {
            "model": name, "layer": layer, "head": head, "position": position,
            "token": token.text, "label": token.mark, "attention": float(value),
        }
        for name, by_layer in shown.items()
        for layer, heads in by_layer.items()
        for head, row in enumerate(heads)
        for position, (token, value) in enumerate(zip(tokens, row, strict=True))
    ]  # fmt: skip


def _page(
    session: ShowSession, shown: dict[str, dict[int, NDArray]], tokens: Sequence[Token]
) -> str:
    config = session.config
    what = "a text" if config.text is not None else f"prompt {config.prompt_index}"
    source = "" if config.text is not None else f" of {session.dataset.name}"
    blocks = [
        {
            "layer": layer,
            "model": name,
            "heads": [
                [_cell(token, float(value), head) for token, value in zip(tokens, row, strict=True)]
                for head, row in enumerate(by_layer[layer])
            ],
        }
        for layer in next(iter(shown.values()))
        for name, by_layer in shown.items()
    ]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=f"Attention of the last token: {what}{source}",
        about=f"Model {config.model}, {len(tokens)} tokens.",
        labels=bool(session.prompt.label_positions),
        letters=bool(session.letters),
        tokens=tokens,
        blocks=blocks,
    )


def _cell(token: Token, value: float, head: int) -> dict[str, Any]:
    shade = round(100 * value**0.5, 1)
    return {"shade": f"{shade:g}", "title": f"head {head}, “{token.shown}”: {value:.4f}"}
