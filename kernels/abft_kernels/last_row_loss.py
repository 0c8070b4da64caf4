"""Loss on the last row of attention, with its gradient in closed form.

Source: Cho et al. 2025, "Mechanistic Fine-tuning for In-context Learning", section 3. With
alpha = softmax(s), g = penalty on wrong labels, -reward on right ones, 0 elsewhere, and
G = sum_j alpha_j g_j, the gradient of one head's loss is ds_j = alpha_j (g_j - G).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abft_kernels.reference import LastRowLoss

BACKENDS = ("auto", "torch")


class _LastRowLossTorch(torch.autograd.Function):
    """Rows are padded to the longest one; nothing loops over rows or heads."""

    @staticmethod
    def forward(
        ctx,
        query,
        key,
        sinks,
        key_start,
        key_end,
        label_positions,
        label_offsets,
        label_is_correct,
        penalty,
        reward,
        scale,
        head_filter,
        softcap,
        window,
    ):
        rows, query_heads, _ = query.shape
        lengths = key_end - key_start
        column = torch.arange(int(lengths.max()), device=key.device)
        visible = column < lengths[:, None]
        if window is not None:
            visible &= column >= lengths[:, None] - window
        index = (key_start[:, None] + column).clamp_max(key.shape[0] - 1)

        keys, grouped_query = _gather_keys(query, key, index)
        scores = torch.einsum("rhgd,rnhd->rhgn", grouped_query, keys).flatten(1, 2) * scale
        if softcap is not None:
            tanh = torch.tanh(scores / softcap)
            scores = softcap * tanh
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        if sinks is not None:
            sink_scores = sinks.to(scores.dtype).expand(rows, query_heads)[..., None]
            alpha = torch.softmax(torch.cat([scores, sink_scores], dim=-1), dim=-1)
            alpha, sink_alpha = alpha[..., :-1], alpha[..., -1]
        else:
            alpha = torch.softmax(scores, dim=-1)

        # (R, n): how often a key is a correct, or a wrong, label of its row.
        counts = label_offsets.diff().long()
        label_row = torch.repeat_interleave(torch.arange(rows, device=key.device), counts)
        label_column = label_positions.long() - key_start.long()[label_row]
        is_correct = label_is_correct.to(alpha.dtype)
        correct, wrong = (
            alpha.new_zeros(rows, len(column)).index_put_(
                (label_row, label_column), values, accumulate=True
            )
            for values in (is_correct, 1 - is_correct)
        )
        correct_mass = torch.einsum("rhn,rn->rh", alpha, correct)
        wrong_mass = torch.einsum("rhn,rn->rh", alpha, wrong)
        label_mass = correct_mass + wrong_mass
        k = counts.to(alpha.dtype)
        threshold = torch.where(counts > 0, k / (k + lengths.to(alpha.dtype).log()), 0.0)
        is_induction = label_mass > threshold[:, None]
        kept = is_induction if head_filter else torch.ones_like(is_induction)

        loss = penalty * wrong_mass + reward * (correct.sum(dim=-1, keepdim=True) - correct_mass)
        loss = torch.where(kept, loss, 0.0)

        weight = (penalty * wrong - reward * correct)[:, None]
        mean_weight = (alpha * weight).sum(dim=-1, keepdim=True)
        grad_scores = alpha * (weight - mean_weight) * kept[..., None]
        if softcap is not None:
            grad_scores = grad_scores * (1 - tanh * tanh)
        grad_sinks = None if sinks is None else -sink_alpha * mean_weight[..., 0] * kept

        ctx.save_for_backward(query, key, sinks, grad_scores, grad_sinks, index, visible)
        ctx.scale = scale
        ctx.mark_non_differentiable(label_mass, correct_mass, is_induction)
        return loss, label_mass, correct_mass, is_induction

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        query, key, sinks, grad_scores, grad_sinks, index, visible = ctx.saved_tensors
        keys, grouped_query = _gather_keys(query, key, index)
        group = (keys.shape[2], grouped_query.shape[2])
        grad_scores = (grad_scores * grad_loss[..., None] * ctx.scale).unflatten(1, group)

        grad_query = grad_key = None
        if ctx.needs_input_grad[0]:
            grad_query = torch.einsum("rhgn,rnhd->rhgd", grad_scores, keys)
            grad_query = grad_query.flatten(1, 2).to(query.dtype)
        if ctx.needs_input_grad[1]:
            per_row = torch.einsum("rhgn,rhgd->rnhd", grad_scores, grouped_query)
            grad_key = torch.zeros_like(key, dtype=per_row.dtype)
            grad_key.index_add_(0, index[visible], per_row[visible])  # rows may share keys
            grad_key = grad_key.to(key.dtype)
        if ctx.needs_input_grad[2]:
            grad_sinks = (grad_sinks * grad_loss).sum(dim=0).to(sinks.dtype)
        else:
            grad_sinks = None
        return (grad_query, grad_key, grad_sinks, *[None] * 11)


def _gather_keys(query: Tensor, key: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (R, n, Hkv, D) and queries (R, Hkv, group, D) in the dtype of the arithmetic."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key_heads = key.shape[1]
    return key[index].to(dtype), query.to(dtype).unflatten(1, (key_heads, -1))


def last_row_loss(
    query: Tensor,
    key: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    label_positions: Tensor,
    label_offsets: Tensor,
    label_is_correct: Tensor,
    *,
    penalty: float | Tensor,
    reward: float | Tensor,
    scale: float | None = None,
    head_filter: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> LastRowLoss:
    """Attention-behavior loss of one attention layer (paper, section 3 and equation 1).

    A head of row r pays attention `alpha = softmax(scale * query @ key.T)` to the keys
    `key_start[r] <= j < key_end[r]`, n of them, k of which are label tokens. With S the attention
    on all labels, the head is an induction head when `S > k / (k + ln n)`. Its loss is then
    `penalty * sum(alpha of wrong labels) + reward * sum(1 - alpha of correct labels)`, else 0.

    Args:
        query: (R, Hq, D), one query row a prompt, already rotated and normalized.
        key: (T, Hkv, D), packed keys, same dtype; Hq is a multiple of Hkv.
        key_start: (R,) int32, first key the row sees.
        key_end: (R,) int32, one past the last key the row sees.
        label_positions: (M,) int32, absolute indices into `key`.
        label_offsets: (R + 1,) int32; row r owns `label_positions[offsets[r]:offsets[r + 1]]`.
        label_is_correct: (M,) bool, whether the label is the query's own.
        penalty: A in the paper, >= 0; a float or a 0-d tensor.
        reward: B in the paper, >= 0; a float or a 0-d tensor.
        scale: factor on the scores; None is `D ** -0.5`.
        head_filter: False gives every head its loss.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        window: the row sees its last `window` keys only; n stays the prompt's length.
        sinks: (Hq,) logits that take part in the softmax and are then dropped (GPT-OSS).
        backend: `"torch"`, or `"auto"` for the best one there is.

    Returns:
        LastRowLoss of four (R, Hq) tensors. A row without labels has loss 0. The gradient reaches
        query, key and sinks; none passes through the filter.

    Raises:
        ValueError: an argument is malformed; the message names it.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    _check_tensors(
        query, key, key_start, key_end, label_positions, label_offsets, label_is_correct, sinks
    )
    _check_options(penalty, reward, scale, softcap, window)
    _check_values(key, key_start, key_end, label_positions, label_offsets)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    # Under autocast einsum would round scores and probabilities to half precision.
    with torch.autocast(query.device.type, enabled=False):
        results = _LastRowLossTorch.apply(
            query,
            key,
            sinks,
            key_start,
            key_end,
            label_positions,
            label_offsets,
            label_is_correct,
            penalty,
            reward,
            scale,
            head_filter,
            softcap,
            window,
        )
    return LastRowLoss(*results)


def _check_tensors(
    query, key, key_start, key_end, label_positions, label_offsets, label_is_correct, sinks
) -> None:
    if query.ndim != 3 or query.shape[0] == 0:
        raise ValueError(f"query must be (R, Hq, D) with R >= 1, not {tuple(query.shape)}")
    if not query.is_floating_point():
        raise ValueError(f"query must be of a floating-point dtype, not {query.dtype}")
    rows, query_heads, head_dim = query.shape
    if key.ndim != 3 or key.shape[2] != head_dim:
        raise ValueError(f"key must be (T, Hkv, D={head_dim}), not {tuple(key.shape)}")
    if key.dtype != query.dtype:
        raise ValueError(f"key must have query's dtype {query.dtype}, not {key.dtype}")
    if key.shape[1] == 0 or query_heads % key.shape[1]:
        raise ValueError(
            f"query has {query_heads} heads, not a multiple of key's {key.shape[1]} heads"
        )
    labels = label_positions.shape[0] if label_positions.ndim else 0
    expected = {
        "key": (key, key.shape, key.dtype),
        "key_start": (key_start, (rows,), torch.int32),
        "key_end": (key_end, (rows,), torch.int32),
        "label_positions": (label_positions, (labels,), torch.int32),
        "label_offsets": (label_offsets, (rows + 1,), torch.int32),
        "label_is_correct": (label_is_correct, (labels,), torch.bool),
    }
    if sinks is not None:
        if not sinks.is_floating_point():
            raise ValueError(f"sinks must be of a floating-point dtype, not {sinks.dtype}")
        expected["sinks"] = (sinks, (query_heads,), sinks.dtype)
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}")


def _check_options(penalty, reward, scale, softcap, window) -> None:
    for name, value in (("penalty", penalty), ("reward", reward)):
        if isinstance(value, Tensor):
            if value.ndim:
                raise ValueError(f"{name} must be a float or a 0-d tensor")
        elif not value >= 0:
            raise ValueError(f"{name} must be at least 0, not {value}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be above 0, not {scale}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, not {softcap}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")


def _check_values(key, key_start, key_end, label_positions, label_offsets) -> None:
    key_start, key_end = key_start.cpu(), key_end.cpu()
    label_positions, label_offsets = label_positions.cpu(), label_offsets.cpu()
    if (key_start < 0).any() or (key_start >= key_end).any():
        raise ValueError("key_start must be at least 0 and below key_end: every row sees a key")
    if (key_end > key.shape[0]).any():
        raise ValueError(f"key_end must be at most the number of keys, {key.shape[0]}")
    counts = label_offsets.diff()
    if label_offsets[0] != 0 or label_offsets[-1] != len(label_positions) or (counts < 0).any():
        raise ValueError(
            f"label_offsets must rise from 0 to the number of labels, {len(label_positions)}"
        )
    first = torch.repeat_interleave(key_start, counts)
    last = torch.repeat_interleave(key_end, counts)
    if (label_positions < first).any() or (label_positions >= last).any():
        raise ValueError("label_positions must lie inside their row's key_start:key_end")
