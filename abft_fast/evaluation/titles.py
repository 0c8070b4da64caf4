"""Titles of metrics, as the terminal, reports and figures show them."""

from __future__ import annotations

from collections.abc import Mapping

SHARES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "true_label_likelihood": "true-label likelihood",
    "expected_calibration_error": "expected calibration error",
    "consistency": "consistency",
    "own": "accuracy, own label words",
    "rotated": "accuracy, label words rotated",
    "symbols": "accuracy, new label words",
    "override_rate": "known queries answered by rotated labels",
    "prior_rate": "known queries answered by own labels though rotated",
    "one_label_share": "prompts whose demonstrations have one label",
}
"""Metrics of a test that are shown in per cent."""

ATTENTION = {
    "induction_heads": "induction heads a prompt",
    "correct_share_above_chance": "label mass on correct labels, above chance",
    "label_mass": "label mass, mean of all heads",
}
"""What heads do during a test; all but the number of heads is shown in per cent."""


def titled(name: str, value: float | None) -> tuple[str, str]:
    """Return a metric's title and its value as text."""
    metric, at, rate = name.partition("_at_")
    title = SHARES.get(metric) or ATTENTION.get(name)
    if title is None:
        return name.replace("_", " "), "-" if value is None else f"{value:.4f}"
    if name == "induction_heads":
        return title, "-" if value is None else f"{value:.2f}"
    wrong = f", {rate.removesuffix('_percent_wrong')} % wrong labels" if at else ""  # GLER
    sign = "+" if name == "correct_share_above_chance" else ""
    return f"{title} (%){wrong}", percent(value, sign)


def rows_of(scores: Mapping[str, float | None]) -> dict[str, str]:
    """Return the text of each metric by its title; one that has an interval is shown with it."""
    rows = {}
    for name, value in scores.items():
        if name.endswith(("_low", "_high")):
            continue
        title, text = titled(name, value)
        low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
        if low is not None and high is not None:
            text += f" ({percent(low)} to {percent(high)})"
        rows[title] = text
    return rows


def percent(value: float | None, sign: str = "") -> str:
    """Return a share in per cent, or a dash."""
    return "-" if value is None else f"{100 * value:{sign}.1f}"
