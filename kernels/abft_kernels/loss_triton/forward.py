"""Find the rows' normalizers and label losses: helpers, kernels, launchers.

Long rows are split over programs. Where attention has left its log-sum-exp, nothing is scanned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.loss_triton.jit_helpers import (
    attention_scores,
    group_of,
    known_normalizer,
    load_query,
    own_labels,
    query_position,
    split_range,
    visible_keys,
)
from abft_kernels.loss_triton.launch import COUNTS, OPTIONS, Shape, on_device, readable
from abft_kernels.types import SMALLEST_MASS, LabelLoss, Rows, Scores

_TILE_BYTES = 16384  # of keys; the tiles of all stages but one are in flight
_STAGES = 3
_KEYS_PER_SPLIT = 512  # the fewest that are worth a program
_SPLIT_BLOCK = 16


@triton.jit
def _load_keys(
    key_ptr, positions, valid, key_head, token_stride, head_stride,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Load keys of one head at absolute positions, (N, DIM_BLOCK), zeros where not valid."""
    dim = tl.arange(0, DIM_BLOCK)
    return tl.load(
        key_ptr
        + key_head.to(tl.int64) * head_stride
        + positions.to(tl.int64)[:, None] * token_stride
        + dim[None, :],
        mask=valid[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _online_softmax_update(running_max, running_sum, scores, sums, AXIS: tl.constexpr):
    """Add a block of scores, along AXIS, to a running softmax (Milakov and Gimelshein 2018).

    A score s adds `sums * exp(s)`. `sums` is 1 if s is the score of a key; if s is the maximum of a
    split, it is the split's sum.

    Returns:
        The new maximum and the new sum.
    """
    new_max = tl.maximum(running_max, tl.max(scores, AXIS))
    rescale = tl.exp(running_max - new_max)
    weight = tl.exp(scores - tl.expand_dims(new_max, AXIS))
    return new_max, running_sum * rescale + tl.sum(sums * weight, AXIS)


@triton.jit
def _combined_normalizer(
    part_max_ptr, part_sum_ptr, sinks_ptr, offsets, heads, exists, splits,
    SPLIT_BLOCK: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Combine a row's splits, in their order, into the normalizer of a group of heads."""
    running_max = tl.where(exists, -float("inf"), 0.0)
    running_sum = tl.where(exists, 0.0, 1.0)
    if HAS_SINKS:
        running_max = tl.load(sinks_ptr + heads, mask=exists, other=0.0).to(tl.float32)
        running_sum = tl.full(heads.shape, 1.0, tl.float32)
    for block in range(0, splits, SPLIT_BLOCK):
        split = block + tl.arange(0, SPLIT_BLOCK)
        part = offsets.to(tl.int64)[:, None] * splits + split[None, :]
        there = exists[:, None] & (split < splits)[None, :]
        part_max = tl.load(part_max_ptr + part, mask=there, other=-float("inf"))
        part_sum = tl.load(part_sum_ptr + part, mask=there, other=0.0)
        running_max, running_sum = _online_softmax_update(
            running_max, running_sum, part_max, sums=part_sum, AXIS=1
        )
    return running_max, running_sum


@triton.jit(do_not_specialize=COUNTS)
def _scan_keys_kernel(
    query_ptr,  # (R, Hq, D), or (T, Hq, D) if PACKED
    key_ptr,  # (T, Hkv, D)
    key_start_ptr,  # (R,)
    key_end_ptr,  # (R,)
    part_max_ptr,  # (R, Hq, splits) out
    part_sum_ptr,  # (R, Hq, splits) out
    scale, softcap, window, tokens, splits,
    query_row_stride, query_head_stride, key_token_stride, key_head_stride,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, CAPPED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Scan one split of a row: find the maximum of its scores, and sum_j exp(s_j - max)."""
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    key_head = tl.program_id(1)
    heads, exists = group_of(key_head, GROUP, GROUP_BLOCK)
    query = load_query(
        query_ptr, query_position(key_end_ptr, row, tokens, PACKED), heads, exists,
        query_row_stride, query_head_stride, HEAD_DIM, DIM_BLOCK,
    )  # fmt: skip
    first, end = visible_keys(key_start_ptr, key_end_ptr, row, window, tokens)
    low, high = split_range(first, end, split, splits, KEY_BLOCK)

    running_max = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)
    running_sum = tl.zeros([GROUP_BLOCK], tl.float32)
    for block in range(low, high, KEY_BLOCK):
        positions = block + tl.arange(0, KEY_BLOCK)
        visible = positions < high
        key = _load_keys(
            key_ptr, positions, visible, key_head, key_token_stride, key_head_stride,
            HEAD_DIM, DIM_BLOCK,
        )  # fmt: skip
        scores, _ = attention_scores(query, key, scale, softcap, CAPPED)
        scores = tl.where(visible[None, :], scores, -float("inf"))
        running_max, running_sum = _online_softmax_update(
            running_max, running_sum, scores, sums=1.0, AXIS=1
        )

    offsets = row * tl.num_programs(1) * GROUP + heads
    part = offsets.to(tl.int64) * splits + split
    tl.store(part_max_ptr + part, running_max, mask=exists)
    tl.store(part_sum_ptr + part, running_sum, mask=exists)


@triton.jit(do_not_specialize=COUNTS)
def _label_loss_kernel(
    query_ptr, key_ptr, key_start_ptr, key_end_ptr,
    label_positions_ptr,  # (M,)
    label_offsets_ptr,  # (R + 1,)
    label_is_correct_ptr,  # (M,) bool
    part_max_ptr, part_sum_ptr,  # as the scan left them, read unless KNOWN_LSE
    sinks_ptr,  # (Hq,), read if HAS_SINKS
    peak_ptr,  # (R, Hq) out; if KNOWN_LSE the log-sum-exp, (T, Hq) with strides, in
    total_ptr,  # (R, Hq) out, unless KNOWN_LSE
    penalty_ptr, reward_ptr,  # scalars, read unless SHARE
    hold_ptr,  # scalar, read if SHARE
    loss_ptr, label_mass_ptr, correct_mass_ptr, is_induction_ptr, mean_weight_ptr,  # (R, Hq) out
    head_factors_ptr,  # (2, R, Hq) out, if SHARE
    scale, softcap, window, tokens, splits, rows, labels, head_filter,
    peak_token_stride, peak_head_stride,
    query_row_stride, query_head_stride, key_token_stride, key_head_stride,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    LABEL_BLOCK: tl.constexpr, SPLIT_BLOCK: tl.constexpr, CAPPED: tl.constexpr,
    PACKED: tl.constexpr, KNOWN_LSE: tl.constexpr, HAS_SINKS: tl.constexpr,
    SHARE: tl.constexpr, SMALLEST_MASS: tl.constexpr,
):  # fmt: skip
    """Compute loss, masses and filter of one row's group of heads, from its label keys alone.

    Tiles are as large as the scan's. A label's score is then rounded as it was in the row's sum,
    and the two errors cancel in its probability.
    """
    row = tl.program_id(0)
    key_head = tl.program_id(1)
    heads, exists = group_of(key_head, GROUP, GROUP_BLOCK)
    offsets = row * tl.num_programs(1) * GROUP + heads
    query_row = query_position(key_end_ptr, row, tokens, PACKED)
    query = load_query(
        query_ptr, query_row, heads, exists, query_row_stride, query_head_stride,
        HEAD_DIM, DIM_BLOCK,
    )  # fmt: skip
    if KNOWN_LSE:
        peak, total = known_normalizer(
            peak_ptr, query_row, heads, exists, peak_token_stride, peak_head_stride
        )
    else:
        peak, total = _combined_normalizer(
            part_max_ptr, part_sum_ptr, sinks_ptr, offsets, heads, exists, splits,
            SPLIT_BLOCK, HAS_SINKS,
        )  # fmt: skip
        tl.store(peak_ptr + offsets, peak, mask=exists)
        tl.store(total_ptr + offsets, total, mask=exists)
    if SHARE:
        hold = tl.load(hold_ptr)
        seen_correct = tl.zeros([1], tl.float32)
        seen_wrong = tl.zeros([1], tl.float32)
    else:
        penalty = tl.load(penalty_ptr)
        reward = tl.load(reward_ptr)
    start = tl.load(key_start_ptr + row)
    end = tl.load(key_end_ptr + row)
    first_label, last_label, sound = own_labels(label_offsets_ptr, row, rows, labels)

    broken = ((start < 0) | (start >= end) | (end > tokens) | (sound == 0)).to(tl.int32)
    correct_count = 0.0
    correct_mass = tl.zeros([GROUP_BLOCK], tl.float32)
    wrong_mass = tl.zeros([GROUP_BLOCK], tl.float32)
    for block in range(first_label, last_label, LABEL_BLOCK):
        label = block + tl.arange(0, LABEL_BLOCK)
        owned = label < last_label
        position = tl.load(label_positions_ptr + label, mask=owned, other=0)
        correct = tl.load(label_is_correct_ptr + label, mask=owned, other=0).to(tl.float32)
        inside = (position >= tl.maximum(start, 0)) & (position < tl.minimum(end, tokens))
        broken += tl.sum((owned & (inside == 0)).to(tl.int32), 0)
        seen = owned & inside & (position >= end - window)
        key = _load_keys(
            key_ptr, position, seen, key_head, key_token_stride, key_head_stride,
            HEAD_DIM, DIM_BLOCK,
        )  # fmt: skip
        scores, _ = attention_scores(query, key, scale, softcap, CAPPED)
        # Rounding must not lift a probability above 1, where S = T = 1 is no induction head.
        alpha = tl.exp(scores - peak[:, None]) / total[:, None]
        alpha = tl.where(seen[None, :], tl.where(alpha > 1, 1.0, alpha), 0.0)  # NaN stays
        correct_count += tl.sum(correct, 0)
        correct_mass += tl.sum(alpha * correct[None, :], 1)
        wrong_mass += tl.sum(alpha * (1 - correct)[None, :], 1)
        if SHARE:
            seen_correct += tl.sum(tl.where(seen, correct, 0.0), 0)
            seen_wrong += tl.sum(tl.where(seen, 1 - correct, 0.0), 0)

    label_mass = correct_mass + wrong_mass
    count = (last_label - first_label).to(tl.float32)
    length = tl.maximum(end - start, 1).to(tl.float32)
    threshold = tl.where(count > 0, count / (count + tl.log(length)), 0.0)
    is_induction = label_mass > threshold
    if SHARE:
        has_share = (label_mass >= SMALLEST_MASS) & (seen_correct > 0) & (seen_wrong > 0)
        mass = tl.where(has_share, label_mass, 1.0)
        loss = tl.where(has_share, wrong_mass / mass + hold * tl.log(mass), 0.0)
        penalty = tl.where(has_share, (correct_mass / mass + hold) / mass, 0.0)
        reward = tl.where(has_share, (wrong_mass / mass - hold) / mass, 0.0)
        mean_weight = tl.where(has_share, hold, 0.0)
        second = head_factors_ptr + rows * tl.num_programs(1) * GROUP
        tl.store(head_factors_ptr + offsets, penalty, mask=exists)
        tl.store(second + offsets, reward, mask=exists)
    else:
        loss = penalty * wrong_mass + reward * (correct_count - correct_mass)
        mean_weight = penalty * wrong_mass - reward * correct_mass
    loss = tl.where(is_induction | (head_filter == 0), loss, 0.0)
    # To report a bad index, the host would have to wait; NaN marks the row instead.
    bad = exists & (broken > 0)
    nan = float("nan")
    tl.store(loss_ptr + offsets, tl.where(bad, nan, loss), mask=exists)
    tl.store(label_mass_ptr + offsets, tl.where(bad, nan, label_mass), mask=exists)
    tl.store(correct_mass_ptr + offsets, tl.where(bad, nan, correct_mass), mask=exists)
    tl.store(is_induction_ptr + offsets, is_induction, mask=exists)
    tl.store(mean_weight_ptr + offsets, tl.where(bad, nan, mean_weight), mask=exists)


def scan_keys(
    query: Tensor, key: Tensor, rows: Rows, scores: Scores, *, packed: bool
) -> tuple[Tensor, Tensor]:
    """Scan all keys in splits: the largest score and the sum of each, both (R, Hq, splits)."""
    query, key = readable(query), readable(key)
    shape = Shape(query, key, rows)
    splits = shape.count_splits(shape.tokens, _KEYS_PER_SPLIT)
    parts = (shape.rows, shape.query_heads, splits)
    part_max, part_sum = (query.new_empty(parts, dtype=torch.float32) for _ in range(2))
    with on_device(query):
        _scan_keys_kernel[(shape.rows * splits, shape.key_heads)](
            query, key, rows.key_start, rows.key_end, part_max, part_sum,
            *shape.scores(scores), shape.tokens, splits, *shape.strides(query, key),
            **shape.constants(), KEY_BLOCK=shape.tile_keys(_TILE_BYTES),
            CAPPED=scores.softcap is not None, PACKED=packed,
            num_warps=shape.warps(shape.group_block), num_stages=_STAGES, **OPTIONS,
        )  # fmt: skip
    return part_max, part_sum


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
    query, key = readable(query), readable(key)
    shape = Shape(query, key, rows)
    if lse is None:
        part_max, part_sum = scan_keys(query, key, rows, scores, packed=packed)
        splits = part_max.shape[2]
    else:
        part_max = part_sum = query  # not read
        splits = 0
    result = LabelLoss.empty(query, shape.rows, lse is not None, hold is not None)
    with on_device(query):
        _label_loss_kernel[(shape.rows, shape.key_heads)](
            query, key, *rows, part_max, part_sum,
            query if sinks is None else readable(sinks),
            result.peak if lse is None else lse, result.total,
            penalty, reward, penalty if hold is None else hold,
            result.loss, result.label_mass, result.correct_mass, result.is_induction,
            result.mean_weight, result.head_factors,
            *shape.scores(scores), shape.tokens, splits, shape.rows, len(rows.label_positions),
            int(head_filter), *((0, 0) if lse is None else lse.stride()),
            *shape.strides(query, key), **shape.constants(),
            LABEL_BLOCK=shape.tile_keys(_TILE_BYTES), SPLIT_BLOCK=_SPLIT_BLOCK,
            CAPPED=scores.softcap is not None, PACKED=packed, KNOWN_LSE=lse is not None,
            HAS_SINKS=sinks is not None and lse is None,
            SHARE=hold is not None, SMALLEST_MASS=SMALLEST_MASS,
            num_warps=shape.warps(shape.group_block), **OPTIONS,
        )  # fmt: skip
    return result
