"""Compute in plain torch what the kernels compute: for CPUs, float64, and where Triton is missing.

The functions and their results are those of `loss_triton`. Rows are taken one after the other, all
heads of a row at once. Keys are taken in blocks, so that their float64 copies stay in the caches;
apart from the results, only scores are as long as a row.

Arithmetic is float64. In float32 a label's score would be rounded differently from the same score
inside its row's sum, because the two matrix products differ in shape. Autocast must be off.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from abft_kernels.types import SMALLEST_MASS, LabelLoss, Normalizer, Rows, Scores

_KEYS_AT_ONCE = 512


def scan_keys(
    query: Tensor,
    key: Tensor,
    rows: Rows,
    scores: Scores,
    sinks: Tensor | None,
    *,
    active: Tensor | None = None,
    sum_keys: bool,
) -> tuple[Normalizer, Tensor]:
    """Compute every row's normalizer and sum_j alpha_j c_j k_j, (R, Hq, D).

    With `active`, (R, Hq) bool, key heads without an active head are not read; their sums are 0.
    """
    grouped = _grouped(query, key)
    dtype = _result_dtype(query)
    normalizer = Normalizer(*(query.new_zeros(query.shape[:2], dtype=dtype) for _ in range(2)))
    mean_key = query.new_zeros(query.shape if sum_keys else 0, dtype=dtype)
    groups = grouped.shape[1:3]
    wanted = range(len(query)) if active is None else active.any(dim=1).nonzero()[:, 0].tolist()
    for row in wanted:
        first, end = _visible(rows, scores, row)
        heads = slice(None) if active is None else active[row].view(groups).any(dim=1)
        keys = key[first:end]
        row_scores, slope = _cap(_products(grouped[row, heads], keys, heads), scores)
        peak = row_scores.amax(dim=-1)
        if sinks is not None:
            sink = sinks.to(peak.dtype).view(groups)[heads]
            peak = torch.maximum(peak, sink)
        peak = peak.to(dtype).to(row_scores.dtype)
        weight = torch.exp(row_scores - peak[..., None])
        total = weight.sum(dim=-1)
        if sinks is not None:
            total += torch.exp(sink - peak)
        normalizer.peak[row].view(groups)[heads] = peak.to(dtype)
        normalizer.total[row].view(groups)[heads] = total.to(dtype)
        if sum_keys:
            weight *= slope / total[..., None]
            blocks = zip(
                weight.split(_KEYS_AT_ONCE, dim=-1), _blocks(keys, heads, weight.dtype), strict=True
            )
            key_sum = functools.reduce(
                torch.add, (torch.einsum("hgn,nhd->hgd", *block) for block in blocks)
            )
            mean_key[row].unflatten(0, groups)[heads] = key_sum.to(dtype)
    return normalizer, mean_key


def label_loss(
    query: Tensor,
    key: Tensor,
    rows: Rows,
    scores: Scores,
    normalizer: Normalizer,
    penalty: Tensor,
    reward: Tensor,
    *,
    head_filter: bool,
    sum_keys: bool,
    hold: Tensor | None = None,
) -> LabelLoss:
    """Compute the losses and masses of all rows, given their normalizers.

    With `hold` the objective is `share`, else `mass`.
    """
    grouped = _grouped(query, key)
    counts = rows.label_offsets.diff().long()
    owner = torch.repeat_interleave(torch.arange(len(query), device=query.device), counts)
    positions = rows.label_positions.long()
    keys = key[positions].to(grouped.dtype)  # (M, Hkv, D)
    label_scores, slope = _cap(torch.einsum("mhgd,mhd->mhg", grouped[owner], keys), scores)
    # Rounding must not lift a probability above 1, where S = T = 1 is no induction head.
    alpha = torch.exp(label_scores.flatten(1) - normalizer.peak[owner]) / normalizer.total[owner]
    alpha = alpha.clamp_max(1.0)
    seen = torch.ones_like(positions, dtype=torch.bool)
    if scores.window is not None:
        seen = positions >= rows.key_end[owner].long() - scores.window
        alpha = alpha * seen[:, None]

    def by_row(values: Tensor) -> Tensor:
        return values.new_zeros(len(query), *values.shape[1:]).index_add_(0, owner, values)

    is_correct = rows.label_is_correct.to(alpha.dtype)[:, None]
    correct_mass, wrong_mass = by_row(alpha * is_correct), by_row(alpha * (1 - is_correct))
    label_mass = correct_mass + wrong_mass
    lengths = (rows.key_end - rows.key_start).to(alpha.dtype)
    threshold = torch.where(counts > 0, counts / (counts + lengths.log()), 0.0)
    is_induction = label_mass > threshold[:, None]
    dtype = _result_dtype(query)
    head_factors = alpha.new_empty(0)
    if hold is None:
        loss = penalty * wrong_mass + reward * (by_row(is_correct) - correct_mass)
        mean_weight = penalty * wrong_mass - reward * correct_mass
    else:
        both_kinds = by_row(is_correct * seen[:, None]) * by_row((1 - is_correct) * seen[:, None])
        has_share = (both_kinds > 0) & (label_mass >= SMALLEST_MASS)
        mass = torch.where(has_share, label_mass, 1.0)
        loss = torch.where(has_share, wrong_mass / mass + hold * mass.log(), 0.0)
        penalty = torch.where(has_share, (correct_mass / mass + hold) / mass, 0.0)
        reward = torch.where(has_share, (wrong_mass / mass - hold) / mass, 0.0)
        head_factors = torch.stack([penalty, reward])
        mean_weight = torch.where(has_share, hold.to(mass.dtype), 0.0)
    if head_filter:
        loss = torch.where(is_induction, loss, 0.0)

    label_key = alpha.new_empty(0)
    if sum_keys:
        wrong, correct = (penalty, reward) if hold is None else (penalty[owner], reward[owner])
        weight = alpha * slope.flatten(1) * (wrong - (wrong + correct) * is_correct)
        weight = weight.unflatten(1, grouped.shape[1:3])
        label_key = by_row(torch.einsum("mhg,mhd->mhgd", weight, keys).flatten(1, 2))
    return LabelLoss(
        loss.to(dtype),
        label_mass.to(dtype),
        correct_mass.to(dtype),
        is_induction,
        mean_weight.to(dtype),
        label_key.to(dtype),
        head_factors.to(dtype),
    )


def grad_key(
    query: Tensor,
    key: Tensor,
    rows: Rows,
    scores: Scores,
    normalizer: Normalizer,
    mean_weight: Tensor,
    coefficient: Tensor,
    penalty: Tensor,
    reward: Tensor,
    *,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of the keys, (T, Hkv, D), or add it in place to `accumulate_into`.

    `coefficient`, (R, Hq), is the incoming gradient times the scale, 0 for heads without a loss.
    `penalty` and `reward` are 0-d, or (R, Hq).
    """
    grouped = _grouped(query, key)
    groups = grouped.shape[1:3]
    grad = key.new_zeros(key.shape) if accumulate_into is None else accumulate_into
    offsets = rows.label_offsets.tolist()
    wrong, correct = (
        part.to(grouped.dtype).expand(query.shape[:2]).unflatten(1, groups)
        for part in (penalty, reward)
    )
    for row in (coefficient != 0).any(dim=1).nonzero()[:, 0].tolist():
        first, end = _visible(rows, scores, row)
        heads = (coefficient[row] != 0).view(groups).any(dim=1).nonzero()[:, 0]
        queries = grouped[row, heads]
        row_scores, slope = _cap(_products(queries, key[first:end], heads), scores)
        peak, total = (part[row].view(groups)[heads, :, None] for part in normalizer)
        alpha = torch.exp(row_scores - peak) / total
        owned = slice(offsets[row], offsets[row + 1])
        column = rows.label_positions[owned].long() - first
        inside = column >= 0  # a window may hide labels
        is_correct = rows.label_is_correct[owned][inside]
        label_weight = torch.where(
            is_correct, -correct[row, heads, :, None], wrong[row, heads, :, None]
        )
        weight = torch.zeros_like(alpha).index_add_(2, column[inside], label_weight)
        grad_scores = alpha * (weight - mean_weight[row].view(groups)[heads, :, None]) * slope
        grad_scores *= coefficient[row].view(groups)[heads, :, None]
        for part in grad_scores.split(_KEYS_AT_ONCE, dim=-1):
            grad_block = torch.einsum("hgn,hgd->nhd", part, queries).to(grad.dtype)
            grad[first : first + len(grad_block)].index_add_(1, heads, grad_block)
            first += len(grad_block)
    return grad


def _blocks(keys: Tensor, heads: slice | Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield blocks of keys of these heads, in the dtype of the arithmetic."""
    return (block[:, heads].to(dtype) for block in keys.split(_KEYS_AT_ONCE))


def _products(queries: Tensor, keys: Tensor, heads: slice | Tensor) -> Tensor:
    """Multiply queries (H, group, D) with their `heads` of keys (n, Hkv, D): (H, group, n)."""
    blocks = _blocks(keys, heads, queries.dtype)
    return torch.cat([torch.einsum("hgd,nhd->hgn", queries, block) for block in blocks], dim=-1)


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """Group queries by key head, (R, Hkv, group, D), in the dtype of the arithmetic."""
    dtype = torch.float32 if query.device.type == "mps" else torch.float64  # mps has no float64
    return query.to(dtype).unflatten(1, (key.shape[1], -1))


def _result_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _cap(products: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Turn `query @ key` into scores and their slope c, d score / d (scale * query @ key)."""
    products = products * scores.scale
    if scores.softcap is None:
        return products, torch.ones_like(products)
    tanh = torch.tanh(products / scores.softcap)
    return scores.softcap * tanh, 1 - tanh * tanh


def _visible(rows: Rows, scores: Scores, row: int) -> tuple[int, int]:
    """Return the first key that a row sees, and one past the last."""
    first, end = int(rows.key_start[row]), int(rows.key_end[row])
    return first if scores.window is None else max(first, end - scores.window), end
