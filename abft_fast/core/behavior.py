"""What attention does on a batch of prompts: results layer by layer, and of the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from abft_kernels import LastRowLoss
from torch import Tensor


class AttentionBehavior(NamedTuple):
    """What a model's attention does on a batch of R prompts.

    Attributes:
        loss: scalar, sum over layers and heads, mean over prompts. Differentiable.
        label_mass: (layers, R, Hq) attention of the last row on all labels, S in the paper.
        correct_mass: (layers, R, Hq) attention of the last row on labels that are the query's own.
        is_induction: (layers, R, Hq) bool, S > T, whether or not the filter was on.
    """

    loss: Tensor
    label_mass: Tensor
    correct_mass: Tensor
    is_induction: Tensor


def mean_over_batches(batches: Sequence[AttentionBehavior]) -> AttentionBehavior:
    """Return the behavior on all prompts, given that on batches of equal size."""
    masses = (torch.cat(field, dim=1) for field in list(zip(*batches, strict=True))[1:])
    return AttentionBehavior(torch.stack([batch.loss for batch in batches]).mean(), *masses)


class LayerResults:
    """The results of one packed forward, by layer index, and which layers ran."""

    def __init__(self, prompts: int):
        self._prompts = prompts
        self._ran: set[int] = set()
        self._by_layer: dict[int, LastRowLoss] = {}

    def __contains__(self, index: int) -> bool:
        return index in self._ran

    def store(self, index: int, result: LastRowLoss | None) -> None:
        """Store the layer's losses, or None to record that it ran."""
        self._ran.add(index)
        if result is not None:
            self._by_layer[index] = result

    def missing(self, indices: Iterable[int]) -> list[int]:
        """Return which of these layers stored nothing, in order."""
        return sorted(set(indices) - self._ran)

    def clear(self) -> None:
        """Drop all results, as those of a failed forward keep its tensors alive."""
        self._ran.clear()
        self._by_layer.clear()

    def with_graph(self) -> list[int]:
        """Return the layers whose loss still has an autograd graph."""
        return [index for index, result in self._by_layer.items() if result.loss.requires_grad]

    def drop_graphs(self) -> None:
        """Detach every loss."""
        for index, result in self._by_layer.items():
            self._by_layer[index] = result._replace(loss=result.loss.detach())

    def mean_loss(self, indices: Iterable[int] | None = None) -> Tensor:
        """Return the loss of these layers, by default of all: sum over heads, mean over prompts."""
        chosen = sorted(self._by_layer if indices is None else indices)
        losses = [self._by_layer[index].loss.sum() for index in chosen]
        total = torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
        return total / self._prompts

    def in_order(self) -> list[LastRowLoss]:
        """Return the results of the layers, the first one first."""
        return [self._by_layer[index] for index in sorted(self._by_layer)]

    def behavior(self, loss: Tensor) -> AttentionBehavior:
        """Stack all layers, on the device of `loss`."""
        results = self.in_order()
        masses = (
            torch.stack([getattr(result, name).to(loss.device) for result in results])
            for name in ("label_mass", "correct_mass", "is_induction")
        )
        return AttentionBehavior(loss, *masses)
