"""Predictions of prompts' labels, packed, and what the heads do on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from abft_fast.core.attention import NO_LOSS, AttentionBehavior, PackedForward
from abft_fast.core.backbone import must_run_alone, prepare
from abft_fast.core.label_logits import label_columns
from abft_fast.core.objective import join, run_packed
from abft_fast.core.packing import EncodedPrompt, PackedPrompts, pack
from abft_fast.prompts import EncodedPrompts
from abft_fast.runtime import processes
from abft_fast.runtime.batching import micro_batches
from abft_fast.runtime.token_budget import in_halves


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
    """Running mean of what heads do, over batches of prompts."""

    def __init__(self) -> None:
        self._prompts = self._with_heads = 0
        self._heads = self._share = 0.0

    def add(self, behavior: AttentionBehavior, packed: PackedPrompts) -> None:
        """Count a batch in; one transfer from the device."""
        found = behavior.is_induction
        label = (behavior.label_mass * found).sum(dim=(0, 2)).double()
        correct = (behavior.correct_mass * found).sum(dim=(0, 2)).double()
        counts = packed.label_offsets.diff()
        owner = torch.repeat_interleave(torch.arange(len(packed), device=counts.device), counts)
        right = torch.zeros(len(packed), dtype=torch.float64, device=counts.device)
        right.index_add_(0, owner, packed.label_is_correct.double())
        with_heads = found.any(dim=2).any(dim=0)
        share = correct / label - right.to(label.device) / counts.to(label.device)
        share = torch.where(with_heads, share, 0.0)
        heads, shares, prompts_with = torch.stack(
            [found.sum().double(), share.sum(), with_heads.sum().double()]
        ).tolist()
        self._prompts += len(packed)
        self._with_heads += round(prompts_with)
        self._heads += heads
        self._share += shares

    def join(self, other: BehaviorMean) -> None:
        """Count in what another has counted."""
        self._prompts += other._prompts
        self._with_heads += other._with_heads
        self._heads += other._heads
        self._share += other._share

    def result(self) -> Behavior:
        """The mean so far."""
        share = self._share / self._with_heads if self._with_heads else None
        return Behavior(self._heads / max(self._prompts, 1), share)


def predict(
    model: nn.Module,
    encoded: EncodedPrompts,
    token_budget: int,
    on_batch: Callable[[int], None] = lambda prompts: None,
    autocast: Callable = contextlib.nullcontext,
    attention: str = "auto",
    behavior: bool = True,
) -> tuple[Tensor, BehaviorMean]:
    """Predict every prompt's label, each process for its share; all have all of them in the end.

    Args:
        model: a decoder with LM head.
        encoded: prompts, and the tokens of the label words at their queries.
        token_budget: tokens a packed batch.
        on_batch: called with the number of prompts this process has done after each batch.
        autocast: context manager around each forward.
        attention: what computes attention, by `abft_kernels.choose_attention`.
        behavior: whether to look at heads too.

    Returns:
        Logits of the label words, (prompts, labels), on the CPU in float32, and the heads, of no
        prompt where they were not looked at.

    Raises:
        FloatingPointError: a label's logit is not finite.
    """
    lengths = [len(prompt) for prompt in encoded.prompts]
    mine = processes.own_share(lengths)
    logits = torch.empty(len(encoded.prompts), len(encoded.label_ids))
    heads = BehaviorMean()
    model.eval()
    with processes.fail_together(), torch.no_grad():
        for micro in micro_batches([lengths[i] for i in mine], token_budget):
            batch = [mine[i] for i in micro]
            prompts = [encoded.prompts[i] for i in batch]
            if not behavior:  # nothing to look at
                prompts = [EncodedPrompt(prompt.input_ids, [], []) for prompt in prompts]
            with autocast():
                found = _within_memory(model, prompts, encoded.label_ids, attention)
            logits[batch] = torch.cat([rows.float().cpu() for rows, _, _ in found])
            for _, seen, packed in found:
                if behavior:
                    heads.add(seen, packed)
            on_batch(len(batch))
        if not logits[mine].isfinite().all():
            raise FloatingPointError("the model's logits of the label words are not finite")
    everyone = BehaviorMean()
    for indices, rows, seen in processes.gather((mine, logits[mine], heads)):
        logits[indices] = rows
        everyone.join(seen)
    return logits, everyone


def _within_memory(model, prompts, label_ids, attention):
    """`label_logits` of all prompts at once, or, out of memory, of halves of them."""
    return in_halves(lambda part: label_logits(model, part, label_ids, attention), prompts)


def label_logits(
    model: nn.Module,
    prompts: Sequence[EncodedPrompt],
    label_ids: Sequence[int],
    attention: str = "auto",
) -> tuple[Tensor, AttentionBehavior, PackedPrompts]:
    """Logits of the label words after each prompt, (R, labels), and the heads on the way."""
    packed = pack(prompts)
    forward = PackedForward(packed, NO_LOSS, attention)
    if len(prompts) > 1 and must_run_alone(prepare(model), forward.longest):
        alone = [label_logits(model, [prompt], label_ids, attention) for prompt in prompts]
        behaviors = [behavior for _, behavior, _ in alone]
        return torch.cat([rows for rows, _, _ in alone]), join(behaviors), packed
    last = packed.cu_seqlens[1:].long() - 1
    output = run_packed(model, forward, logits_to_keep=last)
    return output.logits[0][:, label_columns(model, label_ids)], forward.behavior(), packed
