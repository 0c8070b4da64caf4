"""Control a factor of the loss so that the number of induction heads stays steady.

In the objective `mass` the factor is the penalty A (paper, A.3). In `share` it is that of ln S, S
the attention on all labels of a head: the hold, which is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from abft_fast.options import TrainConfig
from abft_fast.options.methods import METHODS


@dataclass
class PenaltyController:
    """Store the factor and change it by the induction heads of each step; A stays at least 0.

    Attributes:
        kind: which terms act: `pid` for all, `p` for the first one, or `none`; `hold` for `share`.
        penalty: the current A, or the current factor of ln S.
        p, i, d: the factors C_p, C_i, C_d; p is the weight of the hold.
        first, last, before_last: induction heads a prompt, at steps 1, t - 1 and t - 2.
        steps: number of observed steps.
    """

    kind: str
    penalty: float
    p: float
    i: float
    d: float
    first: float = 0.0
    last: float = 0.0
    before_last: float = 0.0
    steps: int = 0

    @classmethod
    def from_options(cls, config: TrainConfig) -> PenaltyController:
        """Return the controller of a run; it changes nothing where the method has no penalty."""
        uses_penalty = METHODS[config.method].uses_penalty
        if config.objective == "share" and uses_penalty:
            return cls("hold", 0.0, config.hold, 0.0, 0.0)
        kind = config.adaptation if uses_penalty else "none"
        factors = config.proportional_factor, config.pid_i, config.pid_d
        return cls(kind, config.penalty, *factors)

    def update(self, heads: float) -> None:
        """Observe step t's induction heads a prompt; change A from t > 2 on (equation 3).

        The hold is p (n_t / n_1 - 1): p times the relative change of the heads since step 1.
        """
        self.steps += 1
        if self.steps == 1:
            self.first = heads
        if self.kind == "hold":
            self.penalty = self.p * (heads / self.first - 1) if self.first else 0.0
        elif self.steps > 2 and self.kind != "none":
            change = self.p * (heads - self.last)
            if self.kind == "pid":
                # The sum over i = 2..t of n_i - n_(i-1) telescopes to n_t - n_1.
                change += self.i * (heads - self.first)
                change += self.d * (heads - 2 * self.last + self.before_last)
            self.penalty = max(0.0, self.penalty + change)
        self.before_last, self.last = self.last, heads
