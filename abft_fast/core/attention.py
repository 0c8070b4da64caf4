"""The attention function that transformers calls: packed prompts, each attending to itself alone.

It is registered once under a name of its own. What a forward needs beyond tensors (where prompts
end, where labels are, where to put the losses) travels with the call as the keyword `abft`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from abft_kernels import (
    Scores,
    attention_after_prefix,
    choose_attention,
    choose_backend,
    explicit_attention,
    flash_attention_with_last_row_loss,
    last_row_loss,
)
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from abft_fast.core.autocast import product_dtype
from abft_fast.core.packed_forward import LastQueries, LossComplete, PackedForward
from abft_fast.errors import UnsupportedModel

NAME = "abft"


class AttentionLayer(Protocol):
    """What is read of a model's attention layer."""

    layer_idx: int
    config: PreTrainedConfig


def packed_attention(
    module: AttentionLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    abft: PackedForward | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention of packed prompts; without `abft`, that of an ordinary batch.

    Args:
        module: the model's attention layer.
        query: (1, Hq, T, D) of packed prompts.
        key: (1, Hkv, T, D).
        value: (1, Hkv, T, D).
        attention_mask: of an ordinary batch; packed prompts need none.
        scaling: factor of the scores; None is 1 / sqrt(D).
        dropout: probability of dropping an attention weight.
        sliding_window: keys that a row sees, its own among them.
        softcap: bound of the scores.
        s_aux: (Hq,) attention sinks (transformers' name).
        abft: the packed forward; it receives the layer's losses.
        **kwargs: what else transformers hands over for an ordinary batch.

    Returns:
        (1, T, Hq, D), and the attention weights where an ordinary batch asks for them.

    Raises:
        UnsupportedModel: the layer is windowed but its window did not arrive.
        LossComplete: the loss needs nothing after this layer's scores.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if abft is None:
        return _ordinary_attention(
            module, query, key, value, attention_mask, scale, dropout, softcap, s_aux, **kwargs
        )
    _check_window(module, sliding_window, abft.context)
    packed = abft.on(query.device)
    dtype = product_dtype(value)  # RoPE may leave queries and keys in float32
    query, key, value = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))
    scores: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "window": sliding_window,
        "sinks": s_aux,
    }
    if abft.keep is not None:
        abft.keep[module.layer_idx] = key, value
    if abft.queries is not None:
        abft.queries[module.layer_idx] = LastQueries(
            query[packed.cu_seqlens[1:].long() - 1], Scores(scale, softcap, sliding_window), s_aux
        )
    if abft.prefix is not None:
        out = attention_after_prefix(
            query,
            key,
            value,
            *abft.prefix[module.layer_idx],
            packed.cu_seqlens,
            longest=abft.longest,
            bounds=packed.bounds,
            attention=abft.attention,
            **scores,
        )
        abft.store(module.layer_idx, None)
        return out[None], None
    options = {**scores, **abft.loss_options_on(query.device)}
    labels = packed.label_positions, packed.label_offsets, packed.label_is_correct
    if abft.ends_in(module.layer_idx):
        starts, ends = packed.cu_seqlens[:-1], packed.cu_seqlens[1:]
        result = last_row_loss(query[ends.long() - 1], key, starts, ends, *labels, **options)
        abft.store(module.layer_idx, result)
        raise LossComplete
    name, reasons = choose_attention(
        query, softcap=softcap, dropout=dropout, requested=abft.attention
    )
    abft.attentions[name, choose_backend(query)] = reasons
    out, result = flash_attention_with_last_row_loss(
        query,
        key,
        value,
        packed.cu_seqlens,
        *labels,
        longest=abft.longest,
        bounds=packed.bounds,
        dropout=dropout,
        attention=name,
        **options,
    )
    abft.store(module.layer_idx, result)
    return out[None], None


def _check_window(module: AttentionLayer, window: int | None, longest: int) -> None:
    """Refuse a layer whose mask is windowed but whose window does not arrive as an argument."""
    layer_types = getattr(module.config, "layer_types", None)
    if layer_types:
        layer_type = layer_types[module.layer_idx]
    else:
        masked = getattr(module.config, "sliding_window", None)
        layer_type = "sliding_attention" if masked and longest > masked else "full_attention"
    if layer_type == "chunked_attention" or (layer_type == "sliding_attention" and window is None):
        raise UnsupportedModel(
            f"{type(module).__name__}: layer {module.layer_idx} is {layer_type} "
            "but does not hand its window to the attention function; this family is not supported"
        )


def _ordinary_attention(
    module: AttentionLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention for a caller outside this library, such as `generate`."""
    wanted = kwargs.get("output_attentions", module.config.output_attentions)
    if softcap is None and sinks is None and not wanted:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs
        )
    if mask is None:
        rows, columns = query.shape[2], key.shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        mask = mask.tril(columns - rows)
    scores = Scores(scale, softcap, window=None)  # the mask has it
    out, alpha = explicit_attention(query, key, value, mask, scores, sinks, dropout)
    return out.transpose(1, 2).contiguous(), alpha if wanted else None


# Without a mask function of the same name, transformers hands over no mask at all.
AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
