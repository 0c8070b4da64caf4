"""Compute in plain torch what the kernels compute: for CPUs, float64, and where Triton is missing.

The functions and their results are those of `loss_triton`. Rows are taken one after the other, all
heads of a row at once. Keys are taken in blocks, so that their float64 copies stay in the caches;
apart from the results, only scores are as long as a row.

Arithmetic is float64. In float32 a label's score would be rounded differently from the same score
inside its row's sum, because the two matrix products differ in shape. Autocast must be off.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from abft_kernels.types import SMALLEST_MASS, LabelLoss, Normalizer, Rows, Scores

_KEYS_AT_ONCE = 512


def scan_keys(
    query: Tensor, key: Tensor, rows: Rows, scores: Scores, sinks: Tensor | None
) -> Normalizer:
    """Compute the normalizers of queries (R, Hq, D), reading all keys."""
    grouped = _grouped(query, key)
    dtype = _result_dtype(query)
    peaks, totals = [], []
    for row in range(len(query)):
        first, end = _visible(rows, scores, row)
        heads = slice(None)
        row_scores, _ = _cap(_products(grouped[row], key[first:end], heads), scores)
        row_scores = row_scores.flatten(0, 1)
        peak = row_scores.amax(dim=-1)
        if sinks is not None:
            peak = torch.maximum(peak, sinks.to(peak.dtype))
        peak = peak.to(dtype).to(row_scores.dtype)
        total = torch.exp(row_scores - peak[..., None]).sum(dim=-1)
        if sinks is not None:
            total += torch.exp(sinks.to(peak.dtype) - peak)
        peaks.append(peak.to(dtype))
        totals.append(total.to(dtype))
    return Normalizer(torch.stack(peaks), torch.stack(totals))


def of_last_rows(normalizer: Normalizer, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return peak and total of the rows, (R, Hq); a log-sum-exp is taken at each row's last key."""
    if normalizer.total is not None:
        return normalizer.peak, normalizer.total
    peak = normalizer.peak[rows.key_end.long() - 1]
    return peak, torch.ones_like(peak)


def incoming_gradient(grad_loss: Tensor, is_induction: Tensor, head_filter: bool) -> Tensor:
    """Return the gradient that arrives at each head's loss; 0 for heads the filter leaves out."""
    return torch.where(is_induction, grad_loss, 0.0) if head_filter else grad_loss


def label_loss(
    query: Tensor,
    key: Tensor,
    rows: Rows,
    scores: Scores,
    sinks: Tensor | None,
    lse: Tensor | None,
    penalty: Tensor,
    reward: Tensor,
    *,
    head_filter: bool,
    hold: Tensor | None = None,
    packed: bool = False,
) -> LabelLoss:
    """Compute the losses and masses of all rows.

    With `lse`, (T, Hq), the log-sum-exp of packed queries, only label keys are read. With `hold`
    the objective is `share`, else `mass`.
    """
    query = _last_queries(query, rows, packed)
    if lse is None:
        normalizer = scan_keys(query, key, rows, scores, sinks)
    else:
        normalizer = Normalizer(lse, None)
    peak, total = of_last_rows(normalizer, rows)
    grouped = _grouped(query, key)
    counts = rows.label_offsets.diff().long()
    owner = torch.repeat_interleave(torch.arange(len(query), device=query.device), counts)
    positions = rows.label_positions.long()
    keys = key[positions].to(grouped.dtype)  # (M, Hkv, D)
    label_scores, _ = _cap(torch.einsum("mhgd,mhd->mhg", grouped[owner], keys), scores)
    # Rounding must not lift a probability above 1, where S = T = 1 is no induction head.
    alpha = torch.exp(label_scores.flatten(1) - peak[owner]) / total[owner]
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

    if lse is not None:
        peak, total = alpha.new_empty(0), alpha.new_empty(0)
    return LabelLoss(
        loss.to(dtype),
        label_mass.to(dtype),
        correct_mass.to(dtype),
        is_induction,
        peak.to(dtype),
        total.to(dtype),
        mean_weight.to(dtype),
        head_factors.to(dtype),
    )


def add_gradients(
    grad_query: Tensor,
    grad_key: Tensor,
    query: Tensor,
    key: Tensor,
    rows: Rows,
    scores: Scores,
    normalizer: Normalizer,
    mean_weight: Tensor,
    is_induction: Tensor,
    grad_loss: Tensor,
    penalty: Tensor,
    reward: Tensor,
    *,
    head_filter: bool,
    packed: bool,
    longest: int,
) -> None:
    """Add the gradients of queries and keys in place.

    Keys that only heads without a loss share are not read. `penalty` and `reward` are 0-d, or
    (R, Hq).
    """
    grouped = _grouped(_last_queries(query, rows, packed), key)
    groups = grouped.shape[1:3]
    offsets, ends = rows.label_offsets.tolist(), rows.key_end.tolist()
    coefficient = scores.scale * incoming_gradient(grad_loss, is_induction, head_filter)
    peaks, totals = of_last_rows(normalizer, rows)
    wrong, correct, mean_weight, coefficient, peaks, totals = (
        part.to(grouped.dtype).expand(is_induction.shape).unflatten(1, groups)
        for part in (penalty, reward, mean_weight, coefficient, peaks, totals)
    )
    for row in (coefficient != 0).any(dim=(1, 2)).nonzero()[:, 0].tolist():
        first, end = _visible(rows, scores, row)
        heads = (coefficient[row] != 0).any(dim=1).nonzero()[:, 0]
        queries = grouped[row, heads]
        row_scores, slope = _cap(_products(queries, key[first:end], heads), scores)
        alpha = torch.exp(row_scores - peaks[row, heads, :, None]) / totals[row, heads, :, None]
        owned = slice(offsets[row], offsets[row + 1])
        column = rows.label_positions[owned].long() - first
        inside = column >= 0  # a window may hide labels
        label_weight = torch.where(
            rows.label_is_correct[owned][inside],
            -correct[row, heads, :, None],
            wrong[row, heads, :, None],
        )
        weight = torch.zeros_like(alpha).index_add_(2, column[inside], label_weight)
        grad_scores = alpha * (weight - mean_weight[row, heads, :, None]) * slope
        grad_scores *= coefficient[row, heads, :, None]
        grad_queries = torch.zeros_like(queries)
        blocks = _blocks(key[first:end], heads, queries.dtype)
        for part, keys in zip(grad_scores.split(_KEYS_AT_ONCE, dim=-1), blocks, strict=True):
            grad_queries += torch.einsum("hgn,nhd->hgd", part, keys)
            grad_block = torch.einsum("hgn,hgd->nhd", part, queries).to(grad_key.dtype)
            grad_key[first : first + len(grad_block)].index_add_(1, heads, grad_block)
            first += len(grad_block)
        grad_row = grad_query[ends[row] - 1 if packed else row].unflatten(0, groups)
        grad_row[heads] = (grad_row[heads] + grad_queries).to(grad_row.dtype)


def _last_queries(query: Tensor, rows: Rows, packed: bool) -> Tensor:
    """Return the rows' queries, (R, Hq, D)."""
    return query[rows.key_end.long() - 1] if packed else query


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
