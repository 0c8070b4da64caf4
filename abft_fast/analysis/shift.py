"""How far W_Q and W_K moved, by layer and head (paper, App. B and Figs 17-19)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.analysis.head_rows import HeadRows, head_rows


class Shift(NamedTuple):
    """The change of one projection's weight, of a layer or of one head of it.

    Attributes:
        layer: index of the layer.
        projection: `q` or `k`.
        head: query head or key head; None for the whole layer.
        change: Frobenius norm of the change.
        weight: Frobenius norm of the weight before.
    """

    layer: int
    projection: str
    head: int | None
    change: float
    weight: float


def shifts(model: PreTrainedModel, changes: Mapping[str, Tensor]) -> list[Shift]:
    """Return the change of every layer's W_Q and W_K, and of each of their heads.

    Args:
        model: the base.
        changes: what is added to its weights, by name.
    """
    found = []
    for rows in head_rows(model):
        weight = rows.of(model.get_parameter(rows.name)).double()
        change = torch.zeros_like(weight)
        if rows.name in changes:
            change = rows.of(changes[rows.name]).double()
        found += _of_projection(rows, change, weight)
    return sorted(found, key=lambda s: (s.layer, s.projection != "q", s.head is not None))


def _of_projection(rows: HeadRows, change: Tensor, weight: Tensor) -> list[Shift]:
    heads: list[int | None] = [None, *range(len(weight))]
    parts = [(change, weight), *zip(change, weight, strict=True)]
    return [
        Shift(rows.layer, rows.projection, head, float(c.norm()), float(w.norm()))
        for head, (c, w) in zip(heads, parts, strict=True)
    ]
