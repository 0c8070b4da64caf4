"""`abft-fast analyze attention`: what every head attends to, before and after."""

from __future__ import annotations

from typing import Any

from abft_fast.analysis.attention import HeadMeans, head_means
from abft_fast.commands.analyze import pictures
from abft_fast.commands.analyze.models import AnalysisSession
from abft_fast.commands.analyze.results import Results
from abft_fast.options import AttentionConfig
from abft_fast.runtime.progress import Progress


def attention(config: AttentionConfig, progress: Progress) -> Results:
    """Write what the heads attend to, by layer and head.

    Raises:
        UserError: the options, the model or the data do not allow it.
    """
    session = AnalysisSession(config, progress)
    pair = session.pair()
    session.check_attention(session.encoded.prompts)
    sides = session.sides(pair)
    prompts = session.encoded.prompts
    means = {}
    with session.progress.bar(
        "attention", len(sides) * len(prompts), len(sides) * sum(map(len, prompts))
    ) as advance:
        for side, model_of in sides.items():
            with model_of() as model, session.accelerator.autocast():
                means[side] = head_means(
                    model, prompts, session.token_budget, config.attention_backend, advance
                )
    results = Results(config.output_dir, "attention")
    results.table([row for side, one in means.items() for row in _rows(side, pair.layers, one)])
    with_correct = config.test_type != "UnseenLabel"
    results.picture(pictures.attention, pair.layers, means, with_correct)
    return results


def _rows(side: str, layers: list[int], means: HeadMeans) -> list[dict[str, Any]]:
    """Return a row for each head, and one for each layer's mean, which has no head."""
    rows = []
    for index, layer in enumerate(layers):
        heads: list[int | None] = [None, *range(means.label_mass.shape[1])]
        for head in heads:
            at = (index, slice(None) if head is None else head)
            label, correct = (
                float(means.label_mass[at].mean()),
                float(means.correct_mass[at].mean()),
            )
            rows.append(
                {
                    "model": side,
                    "layer": layer,
                    "head": head,
                    "label_mass": label,
                    "label_mass_above_threshold": float(means.above_threshold[at].mean()),
                    "correct_mass": correct,
                    "correct_share": correct / label if label else None,
                    "induction_share": float(means.induction[at].mean()),
                    "first_token_mass": float(means.first_token[at].mean()),
                }
            )
    return rows
