"""The attention of query rows over all keys of one prompt, in plain torch."""

from __future__ import annotations

import torch
from abft_kernels import explicit_attention, visible_keys
from torch import Tensor

from abft_fast.core.packed_forward import LastQueries


def attention_rows(queries: LastQueries, key: Tensor) -> Tensor:
    """Return the attention of R query rows over n keys, (R, Hq, n); each query is at the last key.

    The arithmetic is float32 or wider, as in the loss, even under autocast. Sinks take their part
    of the softmax and have no column.

    Args:
        queries: (R, Hq, D), of one layer.
        key: (n, Hkv, D), of that layer.
    """
    query = queries.query
    dtype = torch.promote_types(query.dtype, torch.float32)
    visible = visible_keys(len(key), queries.scores.window, key.device, rows=1)
    heads_first = key.to(dtype).transpose(0, 1)[None].expand(len(query), -1, -1, -1)
    with torch.autocast(key.device.type, enabled=False):
        _, alpha = explicit_attention(
            query.to(dtype)[:, :, None], heads_first, heads_first, visible, queries.scores,
            queries.sinks,
        )  # fmt: skip
    return alpha[:, :, 0]
