"""`abft-fast analyze cmap`: which heads of the tuned model carry the gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abft_fast.analysis.cmap import Effects, Patcher, Way, curve_ways, halves, ways_of
from abft_fast.commands.analyze import pictures
from abft_fast.commands.analyze.models import AnalysisSession
from abft_fast.commands.analyze.results import Results
from abft_fast.errors import UserError
from abft_fast.options import CmapConfig
from abft_fast.runtime.progress import Progress


def cmap(config: CmapConfig, progress: Progress) -> Results:
    """Patch heads group by group, and write what each group recovers.

    The curve over the best n heads ranks heads on one half of the prompts and tests them on the
    other half.

    Raises:
        UserError: the options, the models or the data do not allow it.
    """
    session = AnalysisSession(config, progress)
    pair = session.pair()
    session.check_attention(session.encoded.prompts)
    session.check_can_patch(session.encoded.prompts, config.what)
    pair.keep_label_rows(session.encoder.label_ids)
    patcher = Patcher(
        pair, config.what, config.reverse, config.attention_backend, session.accelerator.autocast
    )
    groups = config.groups.split(",")
    encoded, (_, second) = session.encoded, halves(session.encoded)
    curve_wanted = "head" in groups and len(second.prompts) > 0
    parts = [encoded, second] if curve_wanted else [encoded]
    prompts = [prompt for part in parts for prompt in part.prompts]
    with progress.bar("patching", len(prompts), sum(map(len, prompts))) as advance:
        effects = patcher.measure(encoded, ways_of(groups, len(pair.layers), pair.heads), advance)
        curve = None
        if curve_wanted:
            ranking = effects.of_prompts(slice(0, None, 2)).ranking()
            ways = [*curve_ways(ranking, config.random_draws)]
            curve = patcher.measure(second, ways, advance)
    results = Results(config.output_dir, "cmap")
    results.table([row for part in (effects, curve) if part for row in rows_of(part, pair.layers)])
    results.picture(pictures.cmap, effects, curve, pair.layers, pair.heads, config)
    for line in summary(effects, curve):
        progress.say(line)
    return results


def rows_of(effects: Effects, layers: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row of the CSV for each way to patch, and for both models as they are."""
    prompts = len(effects.log_odds)
    ends = {"receiver": effects.receiver, "giver": effects.giver}
    rows = [
        _row(name, prompts, float(figures[:, 0].mean()), float(figures[:, 1].mean()))
        for name, figures in ends.items()
    ]
    columns = zip(
        effects.ways,
        effects.log_odds.mean(axis=0),
        effects.right.mean(axis=0),
        effects.heads.mean(axis=0),
        effects.recovered(),
        strict=True,
    )
    for way, odds, right, heads, (of_odds, of_right) in columns:
        row = _row(way.group, prompts, float(odds), float(right))
        layer, head = _place(way, layers)
        row |= {"layer": layer, "head": head, "heads": float(heads), "draw": way.draw}
        for name, figure in (("log_odds", of_odds), ("accuracy", of_right)):
            row |= {
                f"recovered_{name}": figure.share,
                f"recovered_{name}_low": figure.low,
                f"recovered_{name}_high": figure.high,
            }
        rows.append(row)
    return rows


def _row(group: str, prompts: int, odds: float, right: float) -> dict[str, Any]:
    return {
        "group": group, "layer": None, "head": None, "draw": None, "heads": None,
        "prompts": prompts, "log_odds": odds, "accuracy": right,
        "recovered_log_odds": None, "recovered_log_odds_low": None, "recovered_log_odds_high": None,
        "recovered_accuracy": None, "recovered_accuracy_low": None, "recovered_accuracy_high": None,
    }  # fmt: skip


def _place(way: Way, layers: Sequence[int]) -> tuple[int | None, int | None]:
    if way.group not in ("head", "layer") or not way.heads:
        return None, None
    index, head = min(way.heads)
    return layers[index], head if way.group == "head" else None


def summary(
    effects: Effects,
    curve: Effects | None,
    ends: tuple[str, str] = ("unpatched", "of the other model"),
) -> list[str]:
    """Return lines on the two models and on what groups of heads recover of the log-odds.

    Args:
        effects: of groups of heads.
        curve: of the best heads; None without a ranking.
        ends: what to call the accuracies of the model that receives and of the one that gives.
    """
    accuracy = [
        f"{100 * figures[:, 1].mean():.1f} % {end}"
        for figures, end in zip((effects.receiver, effects.giver), ends, strict=True)
    ]
    lines = [f"accuracy: {', '.join(accuracy)}"]
    wanted = ("all", "induction", "other", "chosen")
    pairs = [(effects, way) for way in effects.ways if way.group in wanted]
    if curve is not None:
        pairs += [(curve, way) for way in curve.ways if way.group == "top"]
    for part, way in pairs:
        share, low, high = part.recovered_of(way)
        if share is None:
            return [*lines, "the two models answer alike: there is nothing to recover"]
        heads = part.heads[:, part.ways.index(way)].mean()
        title = (
            f"the best {heads:.0f}" if way.group == "top" else f"{way.group} ({heads:.1f} heads)"
        )
        if low is None or high is None:
            interval = "(the gain is not distinguishable from 0)"
        else:
            interval = f"[{100 * low:.0f}, {100 * high:.0f}]"
        lines.append(f"{title}: {100 * share:.0f} % of the log-odds {interval}")
    return lines


def refuse_no_gain(effects: Effects) -> None:
    """Refuse heads ranked by a gain that is not there.

    Raises:
        UserError: the two models answer alike.
    """
    if not (effects.giver[:, 0] - effects.receiver[:, 0]).any():
        raise UserError("the two models answer alike, so no head can be ranked: name --heads")
