"""`abft-fast analyze restrict`: the change of weights of chosen heads only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

from abft_fast.analysis.cmap import Effects, Head, Patcher, Way, curve_ways, halves, ways_of
from abft_fast.analysis.effects import is_right, log_odds
from abft_fast.analysis.pair import ModelPair, moved
from abft_fast.analysis.restrict import check_changes, check_heads, restricted
from abft_fast.commands.analyze import pictures
from abft_fast.commands.analyze.cmap import refuse_no_gain, rows_of, summary
from abft_fast.commands.analyze.models import AnalysisSession
from abft_fast.commands.analyze.results import Results
from abft_fast.core.backbone import attention_layers
from abft_fast.core.label_logits import keep_label_rows
from abft_fast.errors import UserError
from abft_fast.evaluation.inference import predict_labels
from abft_fast.options import RestrictConfig
from abft_fast.prompts import EncodedPrompts
from abft_fast.runtime.progress import Progress


def restrict(config: RestrictConfig, progress: Progress) -> Results:
    """Keep the change of some heads' W_Q and W_K, test the model, and write what each keeps.

    Raises:
        UserError: the options, the models or the data do not allow it.
    """
    session = AnalysisSession(config, progress)
    if config.heads is None and len(session.encoded.prompts) < 2:
        raise UserError(
            "restrict ranks heads on one half of the prompts and tests them on the other: use "
            "--prompts 2 or more, or name --heads"
        )
    changes = session.changes()
    check_changes(session.model, changes)
    check_heads(session.model, config.chosen)
    session.check_attention(session.encoded.prompts)
    keep_label_rows(session.model, session.encoder.label_ids)
    layers = list(attention_layers(session.model))
    tested = session.encoded
    if config.heads is not None:
        ways = [Way("chosen", frozenset((layers.index(x), y) for x, y in config.chosen))]
    else:
        ranked, tested = halves(session.encoded)
        ranking = _ranking(session, changes, ranked)
        ways = list(curve_ways(ranking, config.random_draws))
        if config.top != "all":
            ways = [way for way in ways if len(way.heads or ()) <= int(config.top)]
    effects = _measure(session, changes, tested, ways, layers)
    results = Results(config.output_dir, "restrict")
    results.table(rows_of(effects, layers))
    results.picture(pictures.restrict, effects)
    for line in summary(effects, effects, ("of the base", "of the tuned model")):
        progress.say(line)
    return results


def _ranking(
    session: AnalysisSession, changes: Mapping[str, Tensor], ranked: EncodedPrompts
) -> list[Head]:
    """Return all heads, those first that carry most of the gain when they are patched alone."""
    pair = ModelPair(session.model, changes=changes)
    session.check_can_patch(session.encoded.prompts)
    patcher = Patcher(
        pair, attention=session.config.attention_backend, autocast=session.accelerator.autocast
    )
    lengths = [len(prompt) for prompt in ranked.prompts]
    with session.progress.bar("ranking heads", len(lengths), sum(lengths)) as advance:
        effects = patcher.measure(ranked, ways_of(["head"], len(pair.layers), pair.heads), advance)
    refuse_no_gain(effects)
    return effects.ranking()


def _measure(
    session: AnalysisSession,
    changes: Mapping[str, Tensor],
    encoded: EncodedPrompts,
    ways: Sequence[Way],
    layers: Sequence[int],
) -> Effects:
    """Test the base, the tuned model, and the model with each way's heads changed."""
    model, figures = session.model, []
    lengths = [len(prompt) for prompt in encoded.prompts]
    tests = len(ways) + 2
    with session.progress.bar("testing", tests * len(lengths), tests * sum(lengths)) as advance:
        for change in _all_changes(session, changes, ways, layers):
            with moved(model, change):
                logits, _ = predict_labels(
                    model, encoded, session.token_budget, advance,
                    session.accelerator.autocast, session.config.attention_backend, behavior=False,
                )  # fmt: skip
            pairs = list(zip(logits[:, None], encoded.labels, strict=True))
            odds = [log_odds(row, label)[0] for row, label in pairs]
            right = [is_right(row, label)[0] for row, label in pairs]
            figures.append(np.stack([odds, right], axis=1))
    base, tuned, *kept = figures
    both = np.stack(kept, axis=1)
    counts = np.broadcast_to([float(len(way.heads or ())) for way in ways], both.shape[:2])
    return Effects(ways, both[..., 0], both[..., 1], base, tuned, counts)


def _all_changes(
    session: AnalysisSession,
    changes: Mapping[str, Tensor],
    ways: Sequence[Way],
    layers: Sequence[int],
) -> Iterator[Mapping[str, Tensor]]:
    yield {}
    yield changes
    for way in ways:
        heads = [(layers[index], head) for index, head in way.heads or ()]
        yield restricted(session.model, changes, heads)
