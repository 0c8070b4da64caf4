"""Attention behavior averaged over prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from abft_fast.core.behavior import AttentionBehavior
from abft_fast.core.packing import PackedPrompts


@dataclass(frozen=True)
class Behavior:
    """Attention behavior averaged over prompts.

    Attributes:
        induction_heads: heads with S > T a prompt, over all layers.
        correct_share_above_chance: part of the induction heads' label mass that lies on correct
            labels, less the part of the labels that are correct. The mean is over the prompts that
            have an induction head, a correct and a wrong demonstration: where all labels are of one
            kind, the figure is 0 whatever the heads do. None without such a prompt.
        label_mass: attention on all labels, the mean over all heads.
    """

    induction_heads: float
    correct_share_above_chance: float | None
    label_mass: float


@dataclass
class BehaviorMean:
    """Running mean of attention behavior over batches of prompts.

    Attributes:
        prompts: how many there are.
        share_prompts: how many of them the correct share is a mean of.
        heads_sum: sum over prompts of their induction heads.
        share_sum: sum over prompts of their correct shares above chance.
        wrong_mass: sum over induction heads of their attention on wrong labels.
        missing_mass: sum of 1 - alpha over induction heads and correct labels.
        by_layer: sums over prompts and the layer's heads: label mass, correct mass, induction
            heads; (3, layers).
        heads_a_layer: query heads of a layer.
    """

    prompts: int = 0
    share_prompts: int = 0
    heads_sum: float = 0.0
    share_sum: float = 0.0
    wrong_mass: float = 0.0
    missing_mass: float = 0.0
    by_layer: list[list[float]] = field(default_factory=list)
    heads_a_layer: int = 0

    def add(self, behavior: AttentionBehavior, packed: PackedPrompts) -> None:
        """Add a batch; it takes one transfer from the device."""
        is_induction = behavior.is_induction
        label = (behavior.label_mass * is_induction).sum(dim=(0, 2)).double()
        correct = (behavior.correct_mass * is_induction).sum(dim=(0, 2)).double()
        heads = is_induction.sum(dim=(0, 2)).double()
        counts = packed.label_offsets.diff()
        owner = torch.repeat_interleave(
            torch.arange(len(packed), device=counts.device),
            counts,
            output_size=len(packed.label_positions),  # counting would wait for the device
        )
        right = torch.zeros(len(packed), dtype=torch.float64, device=counts.device)
        right.index_add_(0, owner, packed.label_is_correct.double())
        right, counts = right.to(label.device), counts.to(label.device)
        counted = (heads > 0) & (right > 0) & (right < counts)
        share = torch.where(counted, correct / label - right / counts, 0.0)
        totals = [heads, share, counted.double(), label - correct, right * heads - correct]
        fields = (behavior.label_mass, behavior.correct_mass, is_induction)
        layers = [each.sum(dim=(1, 2)).double() for each in fields]
        sums = torch.cat([torch.stack([t.sum() for t in totals]), *layers]).tolist()
        count = len(is_induction)
        self.join(
            BehaviorMean(
                prompts=len(packed),
                share_prompts=round(sums[2]),
                heads_sum=sums[0],
                share_sum=sums[1],
                wrong_mass=sums[3],
                missing_mass=sums[4],
                by_layer=[sums[5 + i * count : 5 + (i + 1) * count] for i in range(3)],
                heads_a_layer=is_induction.shape[2],
            )
        )

    def join(self, other: BehaviorMean) -> None:
        """Add the prompts of another mean."""
        self.prompts += other.prompts
        self.share_prompts += other.share_prompts
        self.heads_sum += other.heads_sum
        self.share_sum += other.share_sum
        self.wrong_mass += other.wrong_mass
        self.missing_mass += other.missing_mass
        if not self.by_layer:
            self.by_layer, self.heads_a_layer = other.by_layer, other.heads_a_layer
        elif other.by_layer:
            self.by_layer = [
                [a + b for a, b in zip(own, others, strict=True)]
                for own, others in zip(self.by_layer, other.by_layer, strict=True)
            ]

    def result(self) -> Behavior:
        """Return the mean so far."""
        share = self.share_sum / self.share_prompts if self.share_prompts else None
        layers = self.layers()["label_mass"]
        mass = sum(layers) / len(layers) if layers else 0.0
        return Behavior(self.heads_sum / max(self.prompts, 1), share, mass)

    def layers(self) -> dict[str, list[float]]:
        """Return means by layer.

        Returns:
            `label_mass` and `correct_mass`, attention of the last row on all and on correct labels,
            the mean over heads and prompts; `induction_heads`, how many a prompt.
        """
        label, correct, heads = self.by_layer or ([], [], [])
        prompts = max(self.prompts, 1)
        rows = prompts * max(self.heads_a_layer, 1)
        return {
            "label_mass": [mass / rows for mass in label],
            "correct_mass": [mass / rows for mass in correct],
            "induction_heads": [count / prompts for count in heads],
        }

    def attention_loss(self, penalty: float, reward: float) -> float:
        """Return the paper's loss of these prompts with its head filter (section 3).

        Args:
            penalty: A.
            reward: B.
        """
        total = penalty * self.wrong_mass + reward * self.missing_mass
        return total / max(self.prompts, 1)
