"""Where each head's rows are in the weights of W_Q and W_K, separate or fused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abft_fast.core.backbone import backbone, query_key_projections
from abft_fast.errors import UserError


@dataclass(frozen=True)
class HeadRows:
    """The heads of one projection.

    Attributes:
        name: the weight's name in the model.
        layer: index of the layer.
        projection: `q` or `k`.
        rows: (heads, D) int64, the outputs that belong to each head.
        transposed: whether the weight is (in, out), as GPT-2 has it.
    """

    name: str
    layer: int
    projection: str
    rows: Tensor
    transposed: bool

    def of(self, weight: Tensor) -> Tensor:
        """Return each head's part of a weight, (heads, D, in)."""
        return (weight.detach().T if self.transposed else weight.detach())[self.rows]

    def keep(self, change: Tensor, heads: list[int]) -> Tensor:
        """Return a copy of a change, or of a bias's, that is 0 outside these heads' outputs."""
        chosen = self.rows[sorted(heads)].flatten()
        kept = torch.zeros_like(change)
        if self.transposed and change.ndim == 2:
            kept[:, chosen] = change[:, chosen]
        else:
            kept[chosen] = change[chosen]
        return kept


def head_rows(model: PreTrainedModel) -> list[HeadRows]:
    """Return the heads of W_Q and of W_K in every layer.

    Raises:
        UserError: the weights are quantized, so they have no rows.
    """
    config = backbone(model).config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    found = []
    for projection in query_key_projections(model):
        module = projection.module
        weight = module.get_parameter("weight")
        if not weight.is_floating_point() or weight.ndim != 2:
            raise UserError(
                f"{config.model_type}'s weights are quantized: they have no heads' rows"
            )
        transposed = type(module).__name__ == "Conv1D"
        outputs = weight.shape[1 if transposed else 0]
        for kind, rows in _rows(projection.name, config.model_type, outputs, heads, kv_heads):
            name = f"{projection.name}.weight"
            found.append(HeadRows(name, projection.layer, kind, rows, transposed))
    return found


def _rows(
    name: str, family: str, outputs: int, heads: int, kv_heads: int
) -> list[tuple[str, Tensor]]:
    """Return which outputs of a projection are Q's and K's, (heads, D) each."""
    every = torch.arange(outputs)
    last = name.rsplit(".", 1)[-1]
    if last == "q_proj":
        return [("q", every.view(heads, -1))]
    if last == "k_proj":
        return [("k", every.view(kv_heads, -1))]
    if family == "gpt_neox":  # Q, K, V of head 0, then of head 1, ...
        by_head = every.view(heads, 3, -1)
        return [("q", by_head[:, 0]), ("k", by_head[:, 1])]
    by_head = every.view(heads + 2 * kv_heads, -1)  # all Q, all K, all V
    return [("q", by_head[:heads]), ("k", by_head[heads : heads + kv_heads])]
