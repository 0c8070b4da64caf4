"""`abft-fast analyze plane`: accuracy and loss between and around two solutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from abft_fast.analysis.pair import moved
from abft_fast.analysis.plane import (
    Coefficients,
    Score,
    barrier,
    combined,
    path_points,
    ray_points,
)
from abft_fast.commands.analyze import pictures
from abft_fast.commands.analyze.models import PlaneSession
from abft_fast.commands.analyze.results import Results
from abft_fast.evaluation.inference import predict_labels
from abft_fast.options import PlaneConfig
from abft_fast.options.analyze import is_adapter
from abft_fast.runtime.progress import Progress

_POINTS = 11  # of the path and of the ray


def plane(config: PlaneConfig, progress: Progress) -> Results:
    """Test the grid of coefficients, the path from E to A, and the ray from the base through A.

    Raises:
        UserError: the options, the models or the data do not allow it.
    """
    session = PlaneSession(config, progress)
    session.load_movable()
    a, e = (_changes(session, folder) for folder in config.artifacts)
    session.check_attention(session.encoded.prompts)
    numbers = config.coefficients
    parts = {
        "grid": [(x, y) for y in numbers for x in numbers],
        "path": path_points(_POINTS),
        "ray": ray_points(_POINTS),
    }
    points = list(dict.fromkeys(point for part in parts.values() for point in part))
    lengths = [len(prompt) for prompt in session.encoded.prompts]
    scores: dict[Coefficients, Score] = {}
    with progress.bar("points", len(points), len(points) * sum(lengths)) as advance:
        for point in points:
            scores[point] = _score(session, combined(point, e, a))
            advance(1, sum(lengths))
    results = Results(config.output_dir, "plane")
    results.table([_row(name, point, scores[point]) for name in parts for point in parts[name]])
    results.picture(pictures.plane, parts, scores)
    worst = barrier([scores[point] for point in parts["path"]])
    progress.say(
        f"barrier on the path from E to A: {100 * worst.accuracy:.1f} points of accuracy, "
        f"{worst.loss:.3f} of loss"
    )
    return results


def _changes(session: PlaneSession, folder: Path) -> dict[str, Tensor]:
    if is_adapter(folder):
        return session.changes_of_adapter(folder)
    return session.changes_of_model(str(folder))


def _score(session: PlaneSession, change: dict[str, Tensor]) -> Score:
    encoded, config = session.encoded, session.config
    with moved(session.model, change):
        logits, _ = predict_labels(
            session.model, encoded, session.token_budget, autocast=session.accelerator.autocast,
            attention=config.attention_backend, behavior=False,
        )  # fmt: skip
    right = [
        float(row.argmax() == label) for row, label in zip(logits, encoded.labels, strict=True)
    ]
    logs = logits.double().log_softmax(dim=1)
    losses = [-float(row[label]) for row, label in zip(logs, encoded.labels, strict=True)]
    return Score(sum(right) / len(right), sum(losses) / len(losses))


def _row(part: str, point: Coefficients, score: Score) -> dict[str, Any]:
    return {"part": part, "alpha_e": point[0], "alpha_a": point[1], **score._asdict()}
