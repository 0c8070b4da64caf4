"""Compute a model's own eager attention in float32, to check packed attention against it.

In bfloat16 a family's eager attention rounds scores before the softmax. Where keys have large
biases, as Qwen2.5's, scores are in the hundreds and rounding moves them by whole units; fused
attention keeps them in float32.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from abft_fast.core.autocast import product_dtype
from abft_fast.errors import UnsupportedModel

NAME = "abft-eager"


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention as the family's `eager_attention_forward`, from the same rounded inputs.

    Args:
        module: the model's attention layer.
        query: (B, Hq, T, D).
        key: (B, Hkv, T, D).
        value: (B, Hkv, T, D).
        attention_mask: that is added to scores.
        **kwargs: what else transformers hands over.

    Returns:
        (B, T, Hq, D) in the dtype of `value`, and the attention weights.

    Raises:
        UnsupportedModel: the family's code has no eager attention of this name.
    """
    code = sys.modules[type(module).__module__]
    own = getattr(code, "eager_attention_forward", None)
    if own is None:
        raise UnsupportedModel(f"{code.__name__} has no eager attention to check packed prompts by")
    dtype = product_dtype(value)
    with torch.autocast(value.device.type, enabled=False):
        exact = torch.promote_types(dtype, torch.float32)
        rounded = (tensor.to(dtype).to(exact) for tensor in (query, key, value))
        out, weights = own(module, *rounded, attention_mask, **kwargs)
    return out.to(dtype), weights


AttentionInterface.register(NAME, eager_attention)
AttentionMaskInterface.register(NAME, eager_mask)
