"""What a prompt's last token attends to, token by token: the mean of its induction heads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from abft_fast.core.attention_rows import attention_rows
from abft_fast.core.packed_forward import PackedForward
from abft_fast.core.packing import EncodedPrompt, pack
from abft_fast.core.run_packed import run_packed
from abft_fast.runtime.float32_linear import fast_float32_linear


@torch.no_grad()
def mean_last_row(
    model: PreTrainedModel,
    prompt: EncodedPrompt,
    autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    attention: str = "auto",
) -> list[float]:
    """Return the last row of attention over a prompt's n tokens, from one forward.

    The mean is over the prompt's induction heads in all layers, or over all heads if the prompt has
    no induction head. Only last rows are computed, never a matrix.

    Args:
        model: a decoder with LM head.
        prompt: n tokens with their labels.
        autocast: context manager around the forward.
        attention: which attention runs; see `abft_kernels.choose_attention`.
    """
    forward = PackedForward(pack([prompt]), attention=attention, keep={}, queries={})
    with fast_float32_linear(), autocast():
        run_packed(model, forward, logits_to_keep=1)
    assert forward.keep is not None and forward.queries is not None
    kept, queries = forward.keep, forward.queries
    rows = torch.cat([attention_rows(queries[i], kept[i][0])[0].cpu() for i in sorted(kept)])
    chosen = forward.behavior().is_induction[:, 0].flatten().cpu()
    return rows[chosen if chosen.any() else ...].mean(dim=0).tolist()
