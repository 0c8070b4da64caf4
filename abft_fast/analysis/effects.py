"""What patched heads do to the answers: accuracy, log-odds, and the share of the gain recovered."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_SAMPLES = 2000
Floats = NDArray[np.float64]


class Recovered(NamedTuple):
    """A share of the gain with its 95 % interval.

    All are None where there is no gain to recover. The interval's ends are None where the gain is
    not distinguishable from 0.
    """

    share: float | None
    low: float | None
    high: float | None


def log_odds(logits: Tensor, label: int) -> Floats:
    """Return the log-odds of one label word against all others together, (R,), of (R, labels)."""
    wide = logits.double().cpu()
    others = [i for i in range(wide.shape[1]) if i != label]
    return (wide[:, label] - wide[:, others].logsumexp(dim=1)).numpy()


def is_right(logits: Tensor, label: int) -> Floats:
    """Return 1.0 where the label word has the largest logit, else 0.0, (R,), of (R, labels)."""
    return (logits.argmax(dim=1) == label).double().cpu().numpy()


def recovered(patched: Floats, before: Floats, after: Floats, seed: int = 0) -> list[Recovered]:
    """Return (patched - before) / (after - before), of means over prompts, for each way to patch.

    The interval is the bootstrap's: prompts are drawn again, 2,000 times. There is none where the
    same samples' 95 % interval of the gain itself includes 0: one prompt of 128 whose answer
    changed would else give 1 [1, 1]. A sample in which nothing is gained is left out.

    Args:
        patched: (prompts, ways), a figure of each prompt.
        before: (prompts,), the figure of the model that receives.
        after: (prompts,), the figure of the model that gives.
        seed: of the bootstrap.
    """
    gains, gain = patched - before[:, None], after - before
    if not len(gain) or not gain.any() or gain.mean() == 0:
        return [Recovered(None, None, None)] * gains.shape[1]
    weights = np.random.default_rng(seed).multinomial(
        len(gain), np.full(len(gain), 1 / len(gain)), size=_SAMPLES
    )
    totals = weights @ gain
    shares = gains.mean(axis=0) / gain.mean()
    least, most = np.percentile(totals, [2.5, 97.5])
    if least <= 0 <= most:
        return [Recovered(float(share), None, None) for share in shares]
    useful = totals != 0
    ratios = (weights[useful] @ gains) / totals[useful, None]
    low, high = np.percentile(ratios, [2.5, 97.5], axis=0)
    return [Recovered(*map(float, each)) for each in zip(shares, low, high, strict=True)]
