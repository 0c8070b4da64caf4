"""What a model does at a prompt's last row: queries, attention, head outputs and label logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft_fast.core.attention_rows import attention_rows
from abft_fast.core.backbone import output_projections
from abft_fast.core.label_logits import only_label_logits
from abft_fast.core.packed_forward import KeysAndValues, LastQueries, PackedForward
from abft_fast.core.packing import EncodedPrompt, pack
from abft_fast.core.run_packed import run_packed


@dataclass(frozen=True)
class LastRow:
    """One model's forward on one prompt of n tokens, seen from its last token.

    What has all layers is on the device of `logits`, where a model is split over several.

    Attributes:
        logits: (labels,) logits of the label words.
        outputs: (layers, Hq, D) outputs of the heads, the input of the output projection.
        kept: every token's keys and values by layer index, (n, Hkv, D) each.
        queries: the last token's queries by layer index.
    """

    logits: Tensor
    outputs: Tensor
    kept: KeysAndValues
    queries: dict[int, LastQueries]

    @property
    def layers(self) -> list[int]:
        """Return the indices of the layers, in the order of `outputs`."""
        return sorted(self.kept)

    def attention(self) -> Tensor:
        """Return the last row of every head's attention, (layers, Hq, n)."""
        rows = [attention_rows(self.queries[i], self.kept[i][0])[0] for i in self.layers]
        return torch.stack([row.to(self.logits.device) for row in rows])

    def values(self) -> Tensor:
        """Return the values that each query head reads, (layers, Hq, n, D)."""
        heads = self.outputs.shape[1]
        values = [_by_query_head(self.kept[i][1], heads) for i in self.layers]
        return torch.stack([value.to(self.logits.device) for value in values])

    def before_last(self) -> KeysAndValues:
        """Return the keys and values of all tokens but the last one."""
        return {i: (key[:-1], value[:-1]) for i, (key, value) in self.kept.items()}


def _by_query_head(value: Tensor, heads: int) -> Tensor:
    """Return (n, Hkv, D) as (Hq, n, D): query heads of a group share keys and values."""
    return value.transpose(0, 1).repeat_interleave(heads // value.shape[1], dim=0)


def induction_threshold(labels: int, tokens: int) -> float:
    """Return T = k / (k + ln n); a head whose label mass is above it is an induction head."""
    return labels / (labels + math.log(tokens)) if labels else 0.0


def is_induction(row: LastRow, prompt: EncodedPrompt) -> Tensor:
    """Return which heads are induction heads for a prompt, (layers, Hq) bool, on the CPU."""
    mass = row.attention()[..., prompt.label_positions].sum(dim=-1)
    return (mass > induction_threshold(len(prompt.label_positions), len(prompt))).cpu()


@torch.no_grad()
def run_prompt(
    model: PreTrainedModel, prompt: EncodedPrompt, label_ids: Sequence[int], attention: str = "auto"
) -> LastRow:
    """Run a model on one whole prompt.

    Raises:
        UnsupportedModel: the family is outside this library.
    """
    return run_prompt_at(model, prompt, label_ids, (), attention)[0]


@torch.no_grad()
def run_prompt_at(
    model: PreTrainedModel,
    prompt: EncodedPrompt,
    label_ids: Sequence[int],
    positions: Sequence[int],
    attention: str = "auto",
) -> tuple[LastRow, dict[int, Tensor]]:
    """Run a model on one whole prompt; return head outputs at further positions too.

    Returns:
        What the last row does, and (layers, Hq, D) for each position.

    Raises:
        UnsupportedModel: the family is outside this library.
    """
    forward = PackedForward(
        pack([EncodedPrompt(prompt.input_ids, [], [])]), attention=attention, keep={}, queries={}
    )
    with head_outputs(model) as outputs, only_label_logits(model, label_ids) as columns:
        logits = run_packed(model, forward, logits_to_keep=1).logits[0, -1, columns]
    assert forward.keep is not None and forward.queries is not None
    heads = next(iter(forward.queries.values())).query.shape[1]
    by_layer = [outputs[layer].to(logits.device) for layer in sorted(outputs)]
    stacked = {
        position: torch.stack([output[0, position].view(heads, -1) for output in by_layer])
        for position in (*positions, -1)
    }
    last = LastRow(logits, stacked.pop(-1), forward.keep, forward.queries)
    return last, stacked


def run_rows(
    model: PreTrainedModel,
    tokens: Sequence[int],
    position: int,
    prefix: KeysAndValues,
    label_ids: Sequence[int],
    attention: str = "auto",
) -> tuple[Tensor, PackedForward]:
    """Run one-token rows, each after the same prefix.

    Args:
        model: a decoder with LM head, with hooks that make the rows differ.
        tokens: the token of each of R rows.
        position: where all rows are in the prompt.
        prefix: keys and values of the tokens before it; none where it is the first one.
        label_ids: the label words' tokens.
        attention: which attention runs.

    Returns:
        The label words' logits, (R, labels), and the forward with each row's keys,
        values and queries.
    """
    packed = pack([EncodedPrompt([token], [], []) for token in tokens])
    packed = replace(packed, position_ids=packed.position_ids + position)
    kept = prefix if position else None
    forward = PackedForward(packed, attention=attention, keep={}, queries={}, prefix=kept)
    with only_label_logits(model, label_ids) as columns:
        return run_packed(model, forward).logits[0][:, columns], forward


@contextmanager
def head_outputs(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Collect the input of each layer's output projection, (1, T, Hq * D), for the block."""
    outputs: dict[int, Tensor] = {}

    def collect(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            outputs[layer] = inputs[0]

        return hook

    handles = [
        module.register_forward_pre_hook(collect(layer))
        for layer, module in output_projections(model).items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
