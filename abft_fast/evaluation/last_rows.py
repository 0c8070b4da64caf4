"""What a prompt's last token attends to, token by token: the mean of its induction heads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from abft_kernels import explicit_attention, visible_keys
from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.core.packed_forward import LastQueries, PackedForward
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

    The mean is over the prompt's induction heads in all layers, or over all heads where none is
    one. Only last rows are computed, never a matrix.

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
    rows = torch.cat([_rows(forward.queries[i], forward.keep[i][0]) for i in sorted(forward.keep)])
    chosen = forward.behavior().is_induction[:, 0].flatten().cpu()
    return rows[chosen if chosen.any() else ...].mean(dim=0).tolist()


def _rows(queries: LastQueries, key: Tensor) -> Tensor:
    """Return one layer's last row of every head, (Hq, n), on the CPU in float32."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    keys = key.to(dtype).transpose(0, 1)[None]
    visible = visible_keys(len(key), queries.scores.window, key.device, rows=1)
    query = queries.query.to(dtype)[:, :, None]
    _, alpha = explicit_attention(query, keys, keys, visible, queries.scores, queries.sinks)
    return alpha[0, :, 0].float().cpu()
