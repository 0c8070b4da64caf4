"""`abft-fast analyze path`: what each head does to the answer, by the path its output takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abft_fast.analysis.path import PathEffects, path_effects, permuted
from abft_fast.commands.analyze import pictures
from abft_fast.commands.analyze.models import AnalysisSession
from abft_fast.commands.analyze.results import Results
from abft_fast.core.packing import EncodedPrompt
from abft_fast.errors import UserError
from abft_fast.options import PathConfig
from abft_fast.runtime.progress import Progress


class _Case(NamedTuple):
    """The first arguments of `path_effects` after the model."""

    prompt: EncodedPrompt
    corrupted: EncodedPrompt
    label: int
    label_ids: list[int]


def path(config: PathConfig, progress: Progress) -> Results:
    """Write the mean effect of every head on three paths, in the base and in the tuned model.

    Prompts whose labels are all alike are left out: permuting them changes nothing.

    Raises:
        UserError: the options, the models or the data do not allow it.
    """
    session = AnalysisSession(config, progress)
    cases = _cases(session)
    pair = session.pair()
    session.check_attention(session.encoded.prompts)
    session.check_can_patch(session.encoded.prompts, "paths")
    pair.keep_label_rows(session.encoder.label_ids)
    sides = session.sides(pair)
    tokens = sum(len(case.prompt) for case in cases)
    effects = {}
    with progress.bar("paths", len(sides) * len(cases), len(sides) * tokens) as advance:
        for side, model_of in sides.items():
            by_prompt = []
            with model_of() as model, session.accelerator.autocast():
                for case in cases:
                    by_prompt.append(path_effects(model, *case, config.attention_backend))
                    advance(1, len(case.prompt))
            effects[side] = by_prompt
    results = Results(config.output_dir, "path")
    rows = [
        row for side, by_prompt in effects.items() for row in _rows(side, pair.layers, by_prompt)
    ]
    results.table(rows)
    means = {
        side: PathEffects(*(_stacked(by_prompt, name).mean(0) for name in PathEffects._fields))
        for side, by_prompt in effects.items()
    }
    results.picture(pictures.paths, pair.layers, means)
    return results


def _cases(session: AnalysisSession) -> list[_Case]:
    """Return each prompt that can be corrupted."""
    encoded = session.encoded
    cases = [
        _Case(prompt, corrupted, encoded.labels[i], encoded.answer_ids(i))
        for i, prompt in enumerate(encoded.prompts)
        if (corrupted := permuted(prompt)) is not None
    ]
    left = len(encoded.prompts) - len(cases)
    if left:
        session.progress.say(f"{left} prompts whose labels are all alike are left out")
    if not cases:
        raise UserError("no prompt has two different labels: use more --prompts, or a larger --k")
    return cases


def _stacked(by_prompt: Sequence[PathEffects], name: str) -> Tensor:
    return torch.stack([getattr(effects, name) for effects in by_prompt])


def _rows(
    side: str, layers: Sequence[int], by_prompt: Sequence[PathEffects]
) -> list[dict[str, Any]]:
    """Return a row for each path and head, with the standard error over prompts."""
    rows = []
    for name in PathEffects._fields:
        values = _stacked(by_prompt, name)
        errors = values.std(0) / len(by_prompt) ** 0.5 if len(by_prompt) > 1 else None
        for index, layer in enumerate(layers):
            for head in range(values.shape[2]):
                rows.append(
                    {
                        "model": side,
                        "path": name,
                        "layer": layer,
                        "head": head,
                        "prompts": len(by_prompt),
                        "effect": float(values[:, index, head].mean()),
                        "standard_error": None if errors is None else float(errors[index, head]),
                    }
                )
    return rows
