"""The attention function transformers calls: packed prompts, each attending to itself alone.

It is registered once under a name of its own. What a forward needs beyond tensors (where prompts
end, where labels are, where to put the losses) travels with the call as the keyword `abft`, so
there is no global state and checkpointing's second run of a layer sees the same.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from abft_kernels import LastRowLoss, last_row_loss
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from abft_fast.packing import PackedPrompts

NAME = "abft"


class AttentionBehavior(NamedTuple):
    """What a model's attention does on a batch of R prompts.

    Attributes:
        loss: scalar, sum over layers and heads, mean over prompts. Differentiable.
        label_mass: (layers, R, Hq) attention of the last row on all labels, S in the paper.
        correct_mass: (layers, R, Hq) the part on labels that are the query's own.
        is_induction: (layers, R, Hq) bool, S > T, whether or not the filter was on.
    """

    loss: Tensor
    label_mass: Tensor
    correct_mass: Tensor
    is_induction: Tensor


@dataclass
class PackedForward:
    """One packed forward: its batch, what to ask of the last rows, and their answers by layer.

    Attributes:
        packed: the batch.
        loss_options: keywords of `last_row_loss`; None runs attention alone.
        block: layers a gradient may cross; None is all of them.
        layers: filled by the attention function, one entry a layer.
    """

    packed: PackedPrompts
    loss_options: dict | None = None
    block: int | None = None
    layers: dict[int, LastRowLoss] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bounds = self.packed.cu_seqlens.tolist()
        self.longest = max(b - a for a, b in itertools.pairwise(self.bounds))
        self._by_device: dict[torch.device, PackedPrompts] = {}

    def on(self, device: torch.device) -> PackedPrompts:
        """The batch on a layer's device; layers may live on several."""
        if device not in self._by_device:
            self._by_device[device] = self.packed.to(device)
        return self._by_device[device]

    def behavior(self) -> AttentionBehavior:
        """All layers' answers together, on the first layer's device."""
        layers = [self.layers[index] for index in sorted(self.layers)]
        device = layers[0].loss.device
        total = torch.stack([layer.loss.sum().to(device) for layer in layers]).sum()
        return AttentionBehavior(
            total / len(self.packed),
            *(
                torch.stack([getattr(layer, name).to(device) for layer in layers])
                for name in ("label_mass", "correct_mass", "is_induction")
            ),
        )


def packed_attention(
    module: nn.Module,
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
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention of (1, H, T, D) packed prompts; without `abft`, of an ordinary batch.

    `s_aux` are attention sinks (transformers' name). Returns (1, T, H, D), and
    weights only for an ordinary batch that asks for them.

    Raises:
        ValueError: the layer is said to be windowed but its window did not arrive.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if abft is None:
        return _ordinary_attention(
            module, query, key, value, attention_mask, scale, dropout, softcap, s_aux, **kwargs
        )
    _check_window(module, sliding_window, abft.longest)
    if abft.loss_options is not None:
        packed = abft.on(query.device)
        ends = packed.cu_seqlens[1:]
        result = last_row_loss(
            query[0, :, ends.long() - 1].transpose(0, 1),
            key[0].transpose(0, 1),
            packed.cu_seqlens[:-1],
            ends,
            packed.label_positions,
            packed.label_offsets,
            packed.label_is_correct,
            scale=scale,
            softcap=softcap,
            window=sliding_window,
            sinks=s_aux,
            **abft.loss_options,
        )
        # Checkpointing runs a layer twice; the second run only rebuilds what backward needs.
        abft.layers.setdefault(module.layer_idx, result)
    out = [
        _prompt_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b],
            scale, dropout, sliding_window, softcap, s_aux,
        )
        for a, b in itertools.pairwise(abft.bounds)
    ]  # fmt: skip
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _check_window(module: nn.Module, window: int | None, longest: int) -> None:
    """Refuse a layer whose mask is windowed but whose window does not arrive as an argument."""
    layer_types = getattr(module.config, "layer_types", None)
    if layer_types:
        layer_type = layer_types[module.layer_idx]
    else:
        masked = getattr(module.config, "sliding_window", None)
        layer_type = "sliding_attention" if masked and longest > masked else "full_attention"
    if layer_type == "chunked_attention" or (layer_type == "sliding_attention" and window is None):
        raise ValueError(
            f"{type(module).__name__}: layer {module.layer_idx} is {layer_type} "
            "but does not hand its window to the attention function; this family is not supported"
        )


def _prompt_attention(query, key, value, scale, dropout, window, softcap, sinks) -> Tensor:
    n = query.shape[2]
    windowed = window is not None and n > window
    mask = None
    if windowed or softcap is not None or sinks is not None:
        position = torch.arange(n, device=query.device)
        distance = position[:, None] - position
        mask = distance >= 0
        if windowed:
            mask &= distance < window
    if softcap is not None or sinks is not None:
        return _explicit_attention(query, key, value, mask, scale, dropout, softcap, sinks)[0]
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _explicit_attention(
    query, key, value, mask, scale, dropout, softcap, sinks
) -> tuple[Tensor, Tensor]:
    """Scores written out, for what `scaled_dot_product_attention` cannot do; and the weights."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, dim=1).transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    alpha = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        alpha = alpha[..., :-1]
    dropped = F.dropout(alpha, p=dropout, training=dropout > 0)
    return dropped @ value.repeat_interleave(group, dim=1), alpha


def _ordinary_attention(
    module, query, key, value, mask, scale, dropout, softcap, sinks, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """What a model set to this attention does outside this library, `generate` for one."""
    wanted = kwargs.get("output_attentions", module.config.output_attentions)
    if softcap is None and sinks is None and not wanted:
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs
        )
    if mask is None:
        rows, columns = query.shape[2], key.shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        mask = mask.tril(columns - rows)
    out, alpha = _explicit_attention(query, key, value, mask, scale, dropout, softcap, sinks)
    return out.transpose(1, 2).contiguous(), alpha if wanted else None


# Without a mask function of the same name transformers hands over no mask at all.
AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
