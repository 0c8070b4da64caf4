"""The quantities every backend of the loss takes and returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Which keys each of R rows sees, and which of them are labels; see `last_row_loss`."""

    key_start: Tensor
    key_end: Tensor
    label_positions: Tensor
    label_offsets: Tensor
    label_is_correct: Tensor


class Scores(NamedTuple):
    """How a query and a key become a score."""

    scale: float
    softcap: float | None
    window: int | None


class Normalizer(NamedTuple):
    """What makes a row's scores probabilities: `alpha = exp(score - peak) / total`, each (R, Hq).

    Their log-sum-exp, `peak + log(total)`, says the same, but as one float32 number it is off by
    half a unit in the last place of a value that may be 20 or 50, and so is every log-probability.

    Attributes:
        peak: the largest score, or the log-sum-exp itself.
        total: the sum of exp(score - peak), or 1.
    """

    peak: Tensor
    total: Tensor


class LabelLoss(NamedTuple):
    """What the label keys alone say, given each row's normalizer.

    With g the derivative of the loss by a key's probability alpha (penalty on wrong labels,
    -reward on right ones, 0 elsewhere) and c the slope of the soft-cap (1 without):

    Attributes:
        loss: (R, Hq).
        label_mass: (R, Hq), S.
        correct_mass: (R, Hq).
        is_induction: (R, Hq) bool.
        mean_weight: (R, Hq), G = sum_j alpha_j g_j.
        label_key: (R, Hq, D), sum_j alpha_j g_j c_j k_j; (0,) if it was not asked for.
    """

    loss: Tensor
    label_mass: Tensor
    correct_mass: Tensor
    is_induction: Tensor
    mean_weight: Tensor
    label_key: Tensor
