"""Keep what training changed in the weights of chosen heads only."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.analysis.head_rows import head_rows
from abft_fast.core.backbone import attention_layers, backbone
from abft_fast.errors import UserError


def check_changes(model: PreTrainedModel, changes: Mapping[str, Tensor]) -> None:
    """Refuse changes of weights other than heads' W_Q and W_K.

    Raises:
        UserError: another weight has changed, such as V in a fused projection.
    """
    layers, heads = attention_layers(model), backbone(model).config.num_attention_heads
    every = restricted(model, changes, [(layer, head) for layer in layers for head in range(heads)])
    others = [
        name
        for name, change in changes.items()
        if (change - every[name] if name in every else change).any()
    ]
    if others:
        raise UserError(
            f"{min(others)} has changed, too, outside of W_Q and W_K: restrict works on runs that "
            "trained these only (--trainable lora or full, without --train-head)"
        )


def restricted(
    model: PreTrainedModel, changes: Mapping[str, Tensor], heads: Collection[tuple[int, int]]
) -> dict[str, Tensor]:
    """Return the changes of chosen heads' W_Q and W_K, and 0 elsewhere.

    A key head is shared by a group of query heads. Its change is kept where one of them is chosen.

    Args:
        model: the base.
        changes: what training adds to its weights, by name.
        heads: layer and query head each.
    """
    query_heads = backbone(model).config.num_attention_heads
    kept: dict[str, Tensor] = {}
    for rows in head_rows(model):
        group = query_heads // len(rows.rows)
        own = sorted({head // group for layer, head in heads if layer == rows.layer})
        for name in (rows.name, rows.name.removesuffix("weight") + "bias"):
            if name in changes:
                part = rows.keep(changes[name], own)
                kept[name] = kept[name] + part if name in kept else part
    return kept


def check_heads(model: PreTrainedModel, heads: Collection[tuple[int, int]]) -> None:
    """Refuse heads that the model does not have.

    Raises:
        UserError: there is no such layer with attention, or no such head in it.
    """
    layers, count = attention_layers(model), backbone(model).config.num_attention_heads
    for layer, head in heads:
        if layer not in layers or head >= count:
            raise UserError(
                f"--heads {layer}.{head}: the model has the heads 0 to {count - 1} in the layers "
                f"{min(layers)} to {max(layers)}"
            )
