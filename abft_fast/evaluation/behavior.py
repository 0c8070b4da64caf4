"""Attention behavior averaged over prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from abft_fast.core.behavior import AttentionBehavior
from abft_fast.core.packing import PackedPrompts


@dataclass(frozen=True)
class Behavior:
    """Attention behavior averaged over prompts.

    Attributes:
        induction_heads: heads with S > T a prompt, over all layers.
        correct_share_above_chance: part of the induction heads' label mass that lies on correct
            labels, less the part of the labels that are correct; None without induction heads.
    """

    induction_heads: float
    correct_share_above_chance: float | None


class BehaviorMean:
    """Running mean of attention behavior over batches of prompts."""

    def __init__(self) -> None:
        self._prompts = self._with_heads = 0
        self._heads = self._share = 0.0

    def add(self, behavior: AttentionBehavior, packed: PackedPrompts) -> None:
        """Add a batch; it takes one transfer from the device."""
        is_induction = behavior.is_induction
        label = (behavior.label_mass * is_induction).sum(dim=(0, 2)).double()
        correct = (behavior.correct_mass * is_induction).sum(dim=(0, 2)).double()
        counts = packed.label_offsets.diff()
        owner = torch.repeat_interleave(
            torch.arange(len(packed), device=counts.device),
            counts,
            output_size=len(packed.label_positions),  # counting would wait for the device
        )
        right = torch.zeros(len(packed), dtype=torch.float64, device=counts.device)
        right.index_add_(0, owner, packed.label_is_correct.double())
        with_heads = is_induction.any(dim=2).any(dim=0)
        share = correct / label - right.to(label.device) / counts.to(label.device)
        share = torch.where(with_heads, share, 0.0)
        heads, shares, prompts_with = torch.stack(
            [is_induction.sum().double(), share.sum(), with_heads.sum().double()]
        ).tolist()
        self._prompts += len(packed)
        self._with_heads += round(prompts_with)
        self._heads += heads
        self._share += shares

    def join(self, other: BehaviorMean) -> None:
        """Add the prompts of another mean."""
        self._prompts += other._prompts
        self._with_heads += other._with_heads
        self._heads += other._heads
        self._share += other._share

    def result(self) -> Behavior:
        """Return the mean so far."""
        share = self._share / self._with_heads if self._with_heads else None
        return Behavior(self._heads / max(self._prompts, 1), share)
