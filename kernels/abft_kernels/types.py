"""Define the named tuples that the modules of this package hand to each other."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Named = TypeVar("Named", bound=NamedTuple)

OBJECTIVES = ("mass", "share")
SMALLEST_MASS = 1e-30
"""Less attention on labels than this has no share: its inverse would leave float32's range."""


class LastRowLoss(NamedTuple):
    """The loss of one attention layer, by prompt and query head; every field is (R, Hq).

    Attributes:
        loss: the objective's loss; 0 for a head that the filter leaves out. Differentiable; float32
            (float64 for float64 inputs), as are the masses.
        label_mass: S, the attention that the last row pays to all label tokens.
        correct_mass: the part of S on labels that are the query's own.
        is_induction: S > T, whether or not the filter is applied.
    """

    loss: Tensor
    label_mass: Tensor
    correct_mass: Tensor
    is_induction: Tensor


class Rows(NamedTuple):
    """The keys that each of R rows sees, and the labels among them; see `last_row_loss`."""

    key_start: Tensor
    key_end: Tensor
    label_positions: Tensor
    label_offsets: Tensor
    label_is_correct: Tensor


def one_prompt_bounds(length: int, device: torch.device) -> Tensor:
    """Return `cu_seqlens` of one prompt, [0, length], made on the device: no copy waits for it."""
    return torch.arange(0, length + 1, length, dtype=torch.int32, device=device)


class Prompts(NamedTuple):
    """R prompts laid end to end: prompt r is `cu_seqlens[r]:cu_seqlens[r + 1]`.

    With `prefix`, queries attend, unmasked, to a shared prefix of this many keys instead of their
    own.
    """

    cu_seqlens: Tensor
    longest: int
    prefix: int | None = None

    @property
    def causal(self) -> bool:
        """Whether queries attend to their own keys."""
        return self.prefix is None

    @property
    def key_bounds(self) -> Tensor:
        """Bounds of the keys; with a prefix [0, prefix], because all queries read the same keys."""
        if self.prefix is None:
            return self.cu_seqlens
        return one_prompt_bounds(self.prefix, self.cu_seqlens.device)

    @property
    def bounds_and_lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """Bounds of queries and of keys, and the longest of each: flash attention's arguments."""
        return self.cu_seqlens, self.key_bounds, self.longest, self.prefix or self.longest


class Scores(NamedTuple):
    """How a query and a key become a score."""

    scale: float
    softcap: float | None
    window: int | None


class Normalizer(NamedTuple):
    """What turns a row's scores into probabilities: `alpha = exp(score - peak) / total`.

    The log-sum-exp, `peak + log(total)`, would do in exact arithmetic. As one float32 number it is
    off by half a unit in the last place of a value that may be 20 or 50, and so is every
    log-probability.

    Attributes:
        peak: (R, Hq), the largest score; or (T, Hq), the log-sum-exp of all packed queries.
        total: (R, Hq), the sum of exp(score - peak); None beside a log-sum-exp.
    """

    peak: Tensor
    total: Tensor | None


class LabelLoss(NamedTuple):
    """The losses and masses of all rows, and the few numbers that their backward needs.

    g is the derivative of the loss by a key's probability alpha: penalty on wrong labels, -reward
    on correct ones, 0 elsewhere. The objective `mass` has the same two factors for all heads, the
    objective `share` has two for each row and head.

    Attributes:
        loss: (R, Hq).
        label_mass: (R, Hq), S.
        correct_mass: (R, Hq).
        is_induction: (R, Hq) bool.
        peak: (R, Hq), of the row's Normalizer; (0,) if the caller knows the log-sum-exp.
        total: (R, Hq), of the row's Normalizer, or (0,).
        mean_weight: (R, Hq), G = sum_j alpha_j g_j.
        head_factors: (2, R, Hq), penalty and reward of `share`; (0,) for `mass`.
    """

    loss: Tensor
    label_mass: Tensor
    correct_mass: Tensor
    is_induction: Tensor
    peak: Tensor
    total: Tensor
    mean_weight: Tensor
    head_factors: Tensor

    @classmethod
    def empty(cls, query: Tensor, rows: int, known: bool, share: bool) -> LabelLoss:
        """Allocate the results of R rows.

        Args:
            query: whose heads, device and dtype decide; the arithmetic is float32 or wider.
            rows: R.
            known: whether the caller knows the rows' log-sum-exp.
            share: whether the objective is `share`.
        """
        dtype = torch.promote_types(query.dtype, torch.float32)
        heads = (rows, query.shape[1])
        figures = {
            name: query.new_empty(heads, dtype=dtype)
            for name in ("loss", "label_mass", "correct_mass", "mean_weight")
        }
        peak, total = (query.new_empty(0 if known else heads, dtype=dtype) for _ in range(2))
        return cls(
            **figures,
            is_induction=query.new_empty(heads, dtype=torch.bool),
            peak=peak,
            total=total,
            head_factors=query.new_empty((2, *heads) if share else 0, dtype=dtype),
        )


def pick(kind: type[Named], *sources: NamedTuple) -> Named:
    """Fill a named tuple with the fields of the same names in other named tuples.

    Example: `pick(Rows, inputs)` takes `key_start`, `key_end`, ... from an op's arguments.
    """
    values: dict[str, Any] = {}
    for source in sources:
        values |= source._asdict()
    return kind._make(values[name] for name in kind._fields)


def none_but(kind: type[Named], **known: Tensor | None) -> Named:
    """Fill a named tuple with the `known` fields, and None elsewhere."""
    values: dict[str, Tensor | None] = dict.fromkeys(kind._fields)
    return kind._make((values | known).values())
