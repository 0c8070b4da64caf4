"""Path patching: what each head does to the answer directly, and through induction heads.

The corrupted prompt has the same demonstrations, with their labels permuted. A sender's output in
it takes the place of its output in the clean prompt. All other heads stay as they are in the clean
prompt, except on the path that is measured.
Source: Prakash et al. 2024, "Fine-tuning enhances existing mechanisms", section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.analysis.effects import log_odds
from abft_fast.analysis.last_row import LastRow, is_induction, run_prompt_at, run_rows
from abft_fast.analysis.patching import patched_logits, replaced
from abft_fast.core.attention_rows import attention_rows
from abft_fast.core.packed_forward import PackedForward
from abft_fast.core.packing import EncodedPrompt


class PathEffects(NamedTuple):
    """How much log-odds of the right label a prompt loses when a sender is corrupted on one path.

    Attributes:
        direct: (layers, Hq), from the sender's output at the last row to the logits.
        queries: (layers, Hq), through the queries of the induction heads after it.
        values: (layers, Hq), from its outputs at the label positions, through the values that the
            induction heads after it read there.
    """

    direct: Tensor
    queries: Tensor
    values: Tensor


def permuted(prompt: EncodedPrompt) -> EncodedPrompt | None:
    """Return the prompt with each label in the place of the one before; None if they are all alike.

    The first label takes the place of the last.
    """
    positions = prompt.label_positions
    labels = [prompt.input_ids[i] for i in positions]
    if len(set(labels)) < 2:
        return None
    ids = list(prompt.input_ids)
    correct = prompt.label_is_correct[1:] + prompt.label_is_correct[:1]
    for position, label in zip(positions, labels[1:] + labels[:1], strict=True):
        ids[position] = label
    return EncodedPrompt(ids, positions, correct)


@torch.no_grad()
def path_effects(
    model: PreTrainedModel,
    prompt: EncodedPrompt,
    corrupted: EncodedPrompt,
    label: int,
    label_ids: Sequence[int],
    attention: str = "auto",
) -> PathEffects:
    """Return the effects of every head of a model on one prompt.

    Receivers are the prompt's induction heads. They keep the keys, and for values the attention, of
    the clean prompt.

    Args:
        model: a decoder with LM head.
        prompt: the clean prompt.
        corrupted: the same prompt with other labels at the same positions.
        label: index of the right label among those that may answer.
        label_ids: the tokens of what may answer.
        attention: which attention runs.
    """
    at = sorted({*prompt.label_positions, len(prompt) - 1})
    clean, clean_at = run_prompt_at(model, prompt, label_ids, at, attention)
    _, corrupted_at = run_prompt_at(model, corrupted, label_ids, at, attention)
    sender = _Senders(model, prompt, clean, clean_at, corrupted_at, label_ids, attention)
    receivers = is_induction(clean, prompt)
    base = float(log_odds(clean.logits[None], label)[0])

    def effect(logits: Tensor) -> Tensor:
        return torch.from_numpy(base - log_odds(logits, label)).view(receivers.shape)

    direct, last = sender.corrupt(len(prompt) - 1)
    queries = sender.received(receivers, sender.outputs_by_queries(last))
    values = sender.received(receivers, sender.outputs_by_values())
    return PathEffects(effect(direct), effect(queries), effect(values))


class _Senders:
    """Every head as the sender, a row each, of one model on one pair of prompts."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: EncodedPrompt,
        clean: LastRow,
        clean_at: dict[int, Tensor],
        corrupted_at: dict[int, Tensor],
        label_ids: Sequence[int],
        attention: str,
    ):
        self.model, self.prompt, self.clean = model, prompt, clean
        self.clean_at, self.corrupted_at = clean_at, corrupted_at
        self.label_ids, self.attention = label_ids, attention
        self.layers, self.heads = clean.outputs.shape[:2]
        self.count = self.layers * self.heads

    def corrupt(self, position: int) -> tuple[Tensor, PackedForward]:
        """Corrupt each sender at a position, all other heads frozen; return logits and states."""
        outputs = self.clean_at[position].repeat(self.count, 1, 1, 1)
        for row in range(self.count):
            layer, head = divmod(row, self.heads)
            outputs[row, layer, head] = self.corrupted_at[position][layer, head]
        every = torch.ones(self.count, self.layers, self.heads, dtype=torch.bool)
        before = {i: (k[:position], v[:position]) for i, (k, v) in self.clean.kept.items()}
        tokens = [self.prompt.input_ids[position]] * self.count
        with replaced(self.model, outputs, every):
            return run_rows(self.model, tokens, position, before, self.label_ids, self.attention)

    def outputs_by_queries(self, last: PackedForward) -> Tensor:
        """Return heads' outputs with the queries of corrupted rows, (senders, layers, Hq, D)."""
        assert last.queries is not None
        values = self.clean.values()
        by_layer = [
            torch.einsum(
                "rhn,hnd->rhd",
                attention_rows(last.queries[layer], self.clean.kept[layer][0]).to(values),
                values[index],
            )
            for index, layer in enumerate(self.clean.layers)
        ]
        return torch.stack(by_layer, dim=1)

    def outputs_by_values(self) -> Tensor:
        """Return heads' outputs with corrupted values at labels, (senders, layers, Hq, D)."""
        outputs = self.clean.outputs.repeat(self.count, 1, 1, 1)
        weights = self.clean.attention().to(outputs.dtype)
        for position in self.prompt.label_positions:
            _, forward = self.corrupt(position)
            assert forward.keep is not None
            for index, layer in enumerate(self.clean.layers):
                change = forward.keep[layer][1] - self.clean.kept[layer][1][position]
                change = change.to(outputs.device)
                by_head = change.repeat_interleave(self.heads // change.shape[1], dim=1)
                outputs[:, index] += weights[index, :, position, None] * by_head
        return outputs

    def received(self, receivers: Tensor, outputs: Tensor) -> Tensor:
        """Return the logits with the receivers' outputs in layers after each sender's."""
        senders = torch.arange(self.count) // self.heads
        later = torch.arange(self.layers)[None, :] > senders[:, None]
        masks = later[:, :, None] & receivers
        return patched_logits(
            self.model, self.prompt, self.clean, outputs, masks, self.label_ids, self.attention
        )
