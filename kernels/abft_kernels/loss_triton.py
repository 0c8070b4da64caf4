"""Compute the last rows' softmax, label loss and gradient on a GPU: helpers, kernels, launchers.

One program serves all query heads of one key head, so keys are read once whatever the GQA ratio.
Long rows are split over programs, and the parts are combined in a fixed order. There are no
atomics, so results repeat bit by bit. Lengths and counts never specialize a kernel.

Shapes: R rows, Hq query heads, Hkv key heads, D head dimension, T keys, M labels.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.types import SMALLEST_MASS, LabelLoss, Normalizer, Rows, Scores

NO_WINDOW = 2**31 - 1
_LABEL_BLOCK = 16
_ROW_BLOCK = 128
_SPLIT_BLOCK = 16
_OPTIONS = {"enable_fp_fusion": True}  # Triton's own default depends on its version
INTERPRETED = triton.knobs.runtime.interpret  # read once, when kernels are decorated
# Programs that keep a processor's memory busy, and the fewest keys that are worth one.
_PROGRAMS_PER_PROCESSOR = 8
_KEYS_PER_SPLIT = 512
_TILE_BYTES = 16384  # of keys; three are in flight, on cards with 99 KiB for a program


@triton.jit
def _tanh(x):
    """Compute tanh to float32 accuracy; near 0, where the exponential form cancels, by a series."""
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    small = x + x * square * series
    large = 1 - 2 / (tl.exp(2 * tl.minimum(tl.abs(x), 20.0)) + 1)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def _dot_float32(weight, operand):
    """Compute weight @ operand; for a 16-bit operand the weight is split in two, high and low."""
    if operand.dtype == tl.float32:
        product = tl.dot(weight, operand, input_precision="ieee")
    else:
        high = weight.to(operand.dtype)
        low = (weight - high.to(tl.float32)).to(operand.dtype)
        product = tl.dot(low, operand, tl.dot(high, operand))
    return product


@triton.jit
def _attention_scores(query, key, scale, softcap, CAPPED: tl.constexpr):
    """Compute (G, N) scores, and their slope: d score / d (scale * query @ key)."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    slope = tl.full(scores.shape, 1.0, tl.float32)
    if CAPPED:
        tanh = _tanh(scores / softcap)
        scores = softcap * tanh
        slope = 1 - tanh * tanh
    return scores, slope


@triton.jit
def _group_offsets(row, key_head, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr):
    """Return offsets into (R, Hq) of one key head's query heads, and which of them exist."""
    member = tl.arange(0, GROUP_BLOCK)
    query_heads = tl.num_programs(1) * GROUP
    return row * query_heads + key_head * GROUP + member, member < GROUP


@triton.jit
def _load_query(
    query_ptr, row, key_head, row_stride, head_stride,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Load the queries of one row that share a key head, (GROUP_BLOCK, DIM_BLOCK), zero-padded."""
    member = tl.arange(0, GROUP_BLOCK)
    dim = tl.arange(0, DIM_BLOCK)
    row_offset = tl.full([GROUP_BLOCK], row, tl.int64) * row_stride
    head_offset = (key_head * GROUP + member).to(tl.int64) * head_stride
    return tl.load(
        query_ptr + (row_offset + head_offset)[:, None] + dim[None, :],
        mask=(member < GROUP)[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )


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
def _visible_keys(key_start_ptr, key_end_ptr, row, window, tokens):
    """Return the first key that a row sees and one past the last, clipped to the tensor."""
    start = tl.load(key_start_ptr + row)
    end = tl.load(key_end_ptr + row)
    return tl.maximum(tl.maximum(start, end - window), 0), tl.minimum(end, tokens)


@triton.jit
def _own_labels(label_offsets_ptr, row, rows, labels):
    """Return a row's first label, one past its last, and whether they were in bounds; clip both."""
    first = tl.load(label_offsets_ptr + row)
    last = tl.load(label_offsets_ptr + row + 1)
    sound = (first >= 0) & (first <= last) & (last <= labels)
    sound = sound & ((row > 0) | (first == 0)) & ((row < rows - 1) | (last == labels))
    return tl.maximum(first, 0), tl.minimum(last, labels), sound


@triton.jit
def _online_softmax_update(running_max, running_sum, scores, sums, AXIS: tl.constexpr):
    """Add a block of scores, along AXIS, to a running softmax (Milakov and Gimelshein 2018).

    A score s adds `sums * exp(s)`. `sums` is 1 if s is the score of a key; if s is the maximum of a
    split, it is the split's sum.

    Returns:
        The new maximum, the new sum, the factor that rescales older sums, and exp(scores - max).
    """
    new_max = tl.maximum(running_max, tl.max(scores, AXIS))
    rescale = tl.exp(running_max - new_max)
    weight = tl.exp(scores - tl.expand_dims(new_max, AXIS))
    return new_max, running_sum * rescale + tl.sum(sums * weight, AXIS), rescale, weight


@triton.jit
def _row_range(key_start_ptr, key_end_ptr, rows, low, high, ROW_BLOCK: tl.constexpr):
    """Return the first and the last row that see a key in low:high; `rows` and -1 if none does."""
    first_row = rows
    last_row = -1
    for block in range(0, rows, ROW_BLOCK):
        row = block + tl.arange(0, ROW_BLOCK)
        start = tl.load(key_start_ptr + row, mask=row < rows, other=0)
        end = tl.load(key_end_ptr + row, mask=row < rows, other=0)
        sees = (start < high) & (end > low) & (row < rows)
        first_row = tl.minimum(first_row, tl.min(tl.where(sees, row, rows), 0))
        last_row = tl.maximum(last_row, tl.max(tl.where(sees, row, -1), 0))
    return first_row, last_row


@triton.jit
def _label_weights(
    label_positions_ptr, label_is_correct_ptr, first_label, last_label, positions, penalty, reward,
    KEY_BLOCK: tl.constexpr, LABEL_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return g at KEY_BLOCK positions: penalty on wrong labels, -reward on correct ones, else 0."""
    weight = tl.zeros([KEY_BLOCK], tl.float32)
    for block in range(first_label, last_label, LABEL_BLOCK):
        label = block + tl.arange(0, LABEL_BLOCK)
        owned = label < last_label
        position = tl.load(label_positions_ptr + label, mask=owned, other=-1)
        correct = tl.load(label_is_correct_ptr + label, mask=owned, other=0)
        label_weight = tl.where(correct != 0, -reward, penalty)
        same = position[:, None] == positions[None, :]
        weight += tl.sum(tl.where(same, label_weight[:, None], 0.0), 0)
    return weight


_COUNTS = ["window", "tokens", "splits", "rows", "labels", "head_filter"]


@triton.jit(do_not_specialize=_COUNTS)
def _scan_keys_kernel(
    query_ptr,  # (R, Hq, D)
    key_ptr,  # (T, Hkv, D)
    key_start_ptr,  # (R,)
    key_end_ptr,  # (R,)
    active_ptr,  # (R, Hq) bool, read if ONLY_ACTIVE
    part_max_ptr,  # (R, Hq, splits) out
    part_sum_ptr,  # (R, Hq, splits) out
    part_key_ptr,  # (R, Hq, splits, D) out, if SUM_KEYS
    scale, softcap, window, tokens, splits,
    query_row_stride, query_head_stride, key_token_stride, key_head_stride,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, ONLY_ACTIVE: tl.constexpr, SUM_KEYS: tl.constexpr,
):  # fmt: skip
    """Scan one split of a row: find its maximum, its sum, and sum_j exp(s_j - max) c_j k_j."""
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    key_head = tl.program_id(1)
    offsets, exists = _group_offsets(row, key_head, GROUP, GROUP_BLOCK)
    wanted = True
    if ONLY_ACTIVE:
        active = tl.load(active_ptr + offsets, mask=exists, other=0).to(tl.int32)
        wanted = tl.max(active, 0) > 0
    if wanted:
        query = _load_query(
            query_ptr, row, key_head, query_row_stride, query_head_stride,
            GROUP, GROUP_BLOCK, HEAD_DIM, DIM_BLOCK,
        )  # fmt: skip
        first, end = _visible_keys(key_start_ptr, key_end_ptr, row, window, tokens)
        share = tl.cdiv(tl.cdiv(end - first, splits), KEY_BLOCK) * KEY_BLOCK
        low = first + split * share
        high = tl.minimum(low + share, end)

        running_max = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)
        running_sum = tl.zeros([GROUP_BLOCK], tl.float32)
        key_sum = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
        for block in range(low, high, KEY_BLOCK):
            positions = block + tl.arange(0, KEY_BLOCK)
            visible = positions < high
            key = _load_keys(
                key_ptr, positions, visible, key_head, key_token_stride, key_head_stride,
                HEAD_DIM, DIM_BLOCK,
            )  # fmt: skip
            scores, slope = _attention_scores(query, key, scale, softcap, CAPPED)
            scores = tl.where(visible[None, :], scores, -float("inf"))
            running_max, running_sum, rescale, weight = _online_softmax_update(
                running_max, running_sum, scores, sums=1.0, AXIS=1
            )
            if SUM_KEYS:
                key_sum = key_sum * rescale[:, None] + _dot_float32(weight * slope, key)

        part = offsets.to(tl.int64) * splits + split
        tl.store(part_max_ptr + part, running_max, mask=exists)
        tl.store(part_sum_ptr + part, running_sum, mask=exists)
        if SUM_KEYS:
            dim = tl.arange(0, DIM_BLOCK)
            tl.store(
                part_key_ptr + part[:, None] * HEAD_DIM + dim[None, :],
                key_sum,
                mask=exists[:, None] & (dim < HEAD_DIM)[None, :],
            )


@triton.jit(do_not_specialize=_COUNTS)
def _combine_splits_kernel(
    part_max_ptr, part_sum_ptr, part_key_ptr,  # as the scan left them
    sinks_ptr,  # (Hq,), read if HAS_SINKS
    active_ptr,  # (R, Hq) bool, read if ONLY_ACTIVE
    peak_ptr, total_ptr,  # (R, Hq) out, unless ONLY_ACTIVE
    mean_key_ptr,  # (R, Hq, D) out, if SUM_KEYS
    splits,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
    HAS_SINKS: tl.constexpr, ONLY_ACTIVE: tl.constexpr, SUM_KEYS: tl.constexpr,
):  # fmt: skip
    """Combine a row's splits into the normalizer of one head, and sum_j alpha_j c_j k_j."""
    head = tl.program_id(1)
    row_head = tl.program_id(0) * tl.num_programs(1) + head
    dim = tl.arange(0, DIM_BLOCK)
    wanted = True
    if ONLY_ACTIVE:
        wanted = tl.load(active_ptr + row_head) != 0
    mean_key = tl.zeros([DIM_BLOCK], tl.float32)
    if wanted:
        running_max = float("-inf")
        running_sum = 0.0
        if HAS_SINKS:
            running_max = tl.load(sinks_ptr + head).to(tl.float32)
            running_sum = 1.0
        for block in range(0, splits, SPLIT_BLOCK):
            split = block + tl.arange(0, SPLIT_BLOCK)
            part = row_head.to(tl.int64) * splits + split
            exists = split < splits
            part_max = tl.load(part_max_ptr + part, mask=exists, other=-float("inf"))
            part_sum = tl.load(part_sum_ptr + part, mask=exists, other=0.0)
            running_max, running_sum, rescale, weight = _online_softmax_update(
                running_max, running_sum, part_max, sums=part_sum, AXIS=0
            )
            if SUM_KEYS:
                part_key = tl.load(
                    part_key_ptr + part[:, None] * HEAD_DIM + dim[None, :],
                    mask=exists[:, None] & (dim < HEAD_DIM)[None, :],
                    other=0.0,
                )
                mean_key = mean_key * rescale + tl.sum(part_key * weight[:, None], 0)
        mean_key = mean_key / running_sum
        if not ONLY_ACTIVE:
            tl.store(peak_ptr + row_head, running_max)
            tl.store(total_ptr + row_head, running_sum)
    if SUM_KEYS:
        tl.store(
            mean_key_ptr + row_head.to(tl.int64) * HEAD_DIM + dim, mean_key, mask=dim < HEAD_DIM
        )


@triton.jit(do_not_specialize=_COUNTS)
def _label_loss_kernel(
    query_ptr, key_ptr, key_start_ptr, key_end_ptr,
    label_positions_ptr,  # (M,)
    label_offsets_ptr,  # (R + 1,)
    label_is_correct_ptr,  # (M,) bool
    peak_ptr, total_ptr,  # (R, Hq)
    penalty_ptr, reward_ptr,  # scalars, read unless SHARE
    hold_ptr,  # scalar, read if SHARE
    loss_ptr, label_mass_ptr, correct_mass_ptr, is_induction_ptr, mean_weight_ptr,  # (R, Hq) out
    label_key_ptr,  # (R, Hq, D) out, if SUM_KEYS
    head_factors_ptr,  # (2, R, Hq) out, if SHARE
    scale, softcap, window, tokens, rows, labels, head_filter,
    query_row_stride, query_head_stride, key_token_stride, key_head_stride,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    LABEL_BLOCK: tl.constexpr, CAPPED: tl.constexpr, SUM_KEYS: tl.constexpr,
    SHARE: tl.constexpr, SMALLEST_MASS: tl.constexpr,
):  # fmt: skip
    """Compute loss, masses and filter of one row's group of heads, from its label keys alone.

    Tiles are as large as the scan's. A label's score is then rounded as it was in the row's sum,
    and the two errors cancel in its probability.
    """
    row = tl.program_id(0)
    key_head = tl.program_id(1)
    offsets, exists = _group_offsets(row, key_head, GROUP, GROUP_BLOCK)
    query = _load_query(
        query_ptr, row, key_head, query_row_stride, query_head_stride,
        GROUP, GROUP_BLOCK, HEAD_DIM, DIM_BLOCK,
    )  # fmt: skip
    peak = tl.load(peak_ptr + offsets, mask=exists, other=0.0)
    total = tl.load(total_ptr + offsets, mask=exists, other=1.0)
    if SHARE:
        hold = tl.load(hold_ptr)
        correct_key = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
        seen_correct = tl.zeros([1], tl.float32)
        seen_wrong = tl.zeros([1], tl.float32)
    else:
        penalty = tl.load(penalty_ptr)
        reward = tl.load(reward_ptr)
    start = tl.load(key_start_ptr + row)
    end = tl.load(key_end_ptr + row)
    first_label, last_label, sound = _own_labels(label_offsets_ptr, row, rows, labels)

    broken = ((start < 0) | (start >= end) | (end > tokens) | (sound == 0)).to(tl.int32)
    correct_count = 0.0
    correct_mass = tl.zeros([GROUP_BLOCK], tl.float32)
    wrong_mass = tl.zeros([GROUP_BLOCK], tl.float32)
    label_key = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
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
        scores, slope = _attention_scores(query, key, scale, softcap, CAPPED)
        # Rounding must not lift a probability above 1, where S = T = 1 is no induction head.
        alpha = tl.exp(scores - peak[:, None]) / total[:, None]
        alpha = tl.where(seen[None, :], tl.where(alpha > 1, 1.0, alpha), 0.0)  # NaN stays
        correct_count += tl.sum(correct, 0)
        correct_mass += tl.sum(alpha * correct[None, :], 1)
        wrong_mass += tl.sum(alpha * (1 - correct)[None, :], 1)
        if SHARE:
            seen_correct += tl.sum(tl.where(seen, correct, 0.0), 0)
            seen_wrong += tl.sum(tl.where(seen, 1 - correct, 0.0), 0)
            if SUM_KEYS:  # the factors follow from the masses, known after the last label
                label_key += _dot_float32(alpha * slope * (1 - correct)[None, :], key)
                correct_key += _dot_float32(alpha * slope * correct[None, :], key)
        elif SUM_KEYS:
            weight = penalty - (penalty + reward) * correct
            label_key += _dot_float32(alpha * slope * weight[None, :], key)

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
        if SUM_KEYS:
            label_key = penalty[:, None] * label_key - reward[:, None] * correct_key
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
    if SUM_KEYS:
        dim = tl.arange(0, DIM_BLOCK)
        tl.store(
            label_key_ptr + offsets.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :],
            label_key,
            mask=exists[:, None] & (dim < HEAD_DIM)[None, :],
        )


@triton.jit(do_not_specialize=_COUNTS)
def _grad_key_kernel(
    query_ptr, key_ptr, key_start_ptr, key_end_ptr,
    label_positions_ptr, label_offsets_ptr, label_is_correct_ptr,
    peak_ptr, total_ptr, mean_weight_ptr,  # (R, Hq)
    coefficient_ptr,  # (R, Hq), scale * incoming gradient, 0 for heads without loss
    penalty_ptr, reward_ptr,  # scalars, or (R, Hq) if FACTOR_PER_HEAD
    grad_key_ptr,  # (T, Hkv, D) out, or in and out if ACCUMULATE
    scale, softcap, window, tokens, rows, labels,
    query_row_stride, query_head_stride, key_token_stride, key_head_stride,
    grad_token_stride, grad_head_stride,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, LABEL_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, ACCUMULATE: tl.constexpr, FACTOR_PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Compute dk for one block of keys of one head.

    The program owns its keys, so rows may share keys without atomics.
    """
    low = tl.program_id(0) * KEY_BLOCK
    key_head = tl.program_id(1)
    positions = low + tl.arange(0, KEY_BLOCK)
    first_row, last_row = _row_range(
        key_start_ptr, key_end_ptr, rows, low, low + KEY_BLOCK, ROW_BLOCK
    )

    grad_key = tl.zeros([KEY_BLOCK, DIM_BLOCK], tl.float32)
    touched = 0
    for row in range(first_row, last_row + 1):
        offsets, exists = _group_offsets(row, key_head, GROUP, GROUP_BLOCK)
        coefficient = tl.load(coefficient_ptr + offsets, mask=exists, other=0.0)
        first, end = _visible_keys(key_start_ptr, key_end_ptr, row, window, tokens)
        some_head = tl.max((coefficient != 0).to(tl.int32), 0) > 0
        if some_head & (first < low + KEY_BLOCK) & (end > low):
            touched = 1
            peak = tl.load(peak_ptr + offsets, mask=exists, other=0.0)
            total = tl.load(total_ptr + offsets, mask=exists, other=1.0)
            mean_weight = tl.load(mean_weight_ptr + offsets, mask=exists, other=0.0)
            query = _load_query(
                query_ptr, row, key_head, query_row_stride, query_head_stride,
                GROUP, GROUP_BLOCK, HEAD_DIM, DIM_BLOCK,
            )  # fmt: skip
            visible = (positions >= first) & (positions < end)
            key = _load_keys(
                key_ptr, positions, visible, key_head, key_token_stride, key_head_stride,
                HEAD_DIM, DIM_BLOCK,
            )  # fmt: skip
            scores, slope = _attention_scores(query, key, scale, softcap, CAPPED)
            alpha = tl.exp(scores - peak[:, None]) / total[:, None]
            alpha = tl.where(visible[None, :], alpha, 0.0)
            first_label, last_label, _ = _own_labels(label_offsets_ptr, row, rows, labels)
            if FACTOR_PER_HEAD:
                wrong = _label_weights(
                    label_positions_ptr, label_is_correct_ptr, first_label, last_label, positions,
                    1.0, 0.0, KEY_BLOCK, LABEL_BLOCK,
                )  # fmt: skip
                correct = _label_weights(
                    label_positions_ptr, label_is_correct_ptr, first_label, last_label, positions,
                    0.0, -1.0, KEY_BLOCK, LABEL_BLOCK,
                )  # fmt: skip
                penalty = tl.load(penalty_ptr + offsets, mask=exists, other=0.0)
                reward = tl.load(reward_ptr + offsets, mask=exists, other=0.0)
                weight = penalty[:, None] * wrong[None, :] - reward[:, None] * correct[None, :]
            else:
                weight = _label_weights(
                    label_positions_ptr, label_is_correct_ptr, first_label, last_label, positions,
                    tl.load(penalty_ptr), tl.load(reward_ptr), KEY_BLOCK, LABEL_BLOCK,
                )[None, :]  # fmt: skip
            grad_scores = alpha * (weight - mean_weight[:, None]) * slope
            grad_scores *= coefficient[:, None]
            # Scale to at most 1, so that float16's range does not cut small gradients off.
            largest = tl.maximum(tl.max(tl.abs(grad_scores)), 1e-30)
            grad_key += _dot_float32(tl.trans(grad_scores / largest), query) * largest

    if touched > 0 or not ACCUMULATE:
        dim = tl.arange(0, DIM_BLOCK)
        grad_ptrs = (
            grad_key_ptr
            + key_head.to(tl.int64) * grad_head_stride
            + positions.to(tl.int64)[:, None] * grad_token_stride
            + dim[None, :]
        )
        inside = (positions < tokens)[:, None] & (dim < HEAD_DIM)[None, :]
        if ACCUMULATE:
            grad_key += tl.load(grad_ptrs, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_ptrs, grad_key, mask=inside)


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
    """Compute every row's normalizer and sum_j alpha_j c_j k_j, (R, Hq, D), all float32.

    With `active`, (R, Hq) bool, key heads without an active head are not read; the sums of other
    heads are 0.
    """
    query, key = _readable(query), _readable(key)
    shape = _Shape(query, key)
    splits = _count_splits(query, key)
    parts = (shape.rows, shape.query_heads, splits)
    part_max, part_sum = (query.new_empty(parts, dtype=torch.float32) for _ in range(2))
    part_key = query.new_empty((*parts, shape.head_dim) if sum_keys else 0, dtype=torch.float32)
    normalizer = Normalizer(*(query.new_empty(parts[:2], dtype=torch.float32) for _ in range(2)))
    mean_key = query.new_empty(query.shape if sum_keys else 0, dtype=torch.float32)
    with _on_device(query):
        _scan_keys_kernel[(shape.rows * splits, shape.key_heads)](
            query, key, rows.key_start, rows.key_end,
            query if active is None else active,
            part_max, part_sum, part_key,
            *shape.scores(scores), shape.tokens, splits, *shape.strides(query, key),
            **shape.constants(), KEY_BLOCK=shape.key_block, CAPPED=scores.softcap is not None,
            ONLY_ACTIVE=active is not None, SUM_KEYS=sum_keys, **shape.launch(),
        )  # fmt: skip
        _combine_splits_kernel[(shape.rows, shape.query_heads)](
            part_max, part_sum, part_key,
            query if sinks is None else _readable(sinks), query if active is None else active,
            *normalizer, mean_key, splits,
            HEAD_DIM=shape.head_dim, DIM_BLOCK=shape.dim_block, SPLIT_BLOCK=_SPLIT_BLOCK,
            HAS_SINKS=sinks is not None, ONLY_ACTIVE=active is not None, SUM_KEYS=sum_keys,
            **_OPTIONS,
        )  # fmt: skip
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
    query, key = _readable(query), _readable(key)
    shape = _Shape(query, key)
    heads = (shape.rows, shape.query_heads)
    loss, label_mass, correct_mass, mean_weight = (
        query.new_empty(heads, dtype=torch.float32) for _ in range(4)
    )
    is_induction = query.new_empty(heads, dtype=torch.bool)
    label_key = query.new_empty(query.shape if sum_keys else 0, dtype=torch.float32)
    head_factors = query.new_empty(0 if hold is None else (2, *heads), dtype=torch.float32)
    with _on_device(query):
        _label_loss_kernel[(shape.rows, shape.key_heads)](
            query, key, *rows, *normalizer, penalty, reward, penalty if hold is None else hold,
            loss, label_mass, correct_mass, is_induction, mean_weight, label_key, head_factors,
            *shape.scores(scores), shape.tokens, shape.rows, len(rows.label_positions),
            int(head_filter), *shape.strides(query, key), **shape.constants(),
            LABEL_BLOCK=shape.key_block, CAPPED=scores.softcap is not None, SUM_KEYS=sum_keys,
            SHARE=hold is not None, SMALLEST_MASS=SMALLEST_MASS,
            num_warps=shape.warps, **_OPTIONS,
        )  # fmt: skip
    return LabelLoss(
        loss, label_mass, correct_mass, is_induction, mean_weight, label_key, head_factors
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
    Keys that only such heads share are not read. `penalty` and `reward` are 0-d, or (R, Hq).
    """
    dtype = key.dtype
    query, key = _readable(query), _readable(key)
    shape = _Shape(query, key)
    grad = key.new_empty(key.shape) if accumulate_into is None else _readable(accumulate_into)
    with _on_device(query):
        _grad_key_kernel[(triton.cdiv(shape.tokens, shape.key_block), shape.key_heads)](
            query, key, *rows, *normalizer, mean_weight, coefficient.contiguous(),
            penalty.contiguous(), reward.contiguous(), grad,
            *shape.scores(scores), shape.tokens, shape.rows, len(rows.label_positions),
            *shape.strides(query, key), *grad.stride()[:2],
            **shape.constants(), KEY_BLOCK=shape.key_block, LABEL_BLOCK=_LABEL_BLOCK,
            ROW_BLOCK=_ROW_BLOCK, CAPPED=scores.softcap is not None,
            ACCUMULATE=accumulate_into is not None, FACTOR_PER_HEAD=penalty.ndim > 0,
            **shape.launch(),
        )  # fmt: skip
    if accumulate_into is None:
        return grad.to(dtype)
    return accumulate_into if grad is accumulate_into else accumulate_into.copy_(grad)


class _Shape:
    """The sizes of one call, and the block sizes that follow from them."""

    def __init__(self, query: Tensor, key: Tensor):
        self.rows, self.query_heads, self.head_dim = query.shape
        self.tokens, self.key_heads, _ = key.shape
        self.dim_block = max(16, triton.next_power_of_2(self.head_dim))
        self.group = self.query_heads // self.key_heads
        self.group_block = max(16, triton.next_power_of_2(self.group))
        row_bytes = self.dim_block * query.element_size()
        self.key_block = max(16, min(64, _TILE_BYTES // row_bytes))
        # Float32 products keep their operands in registers.
        wide = self.group_block * self.dim_block >= (2048 if query.element_size() > 2 else 16384)
        self.warps = 8 if wide else 4

    def constants(self) -> dict[str, int]:
        return {
            "GROUP": self.group,
            "GROUP_BLOCK": self.group_block,
            "HEAD_DIM": self.head_dim,
            "DIM_BLOCK": self.dim_block,
        }

    def launch(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": 3, **_OPTIONS}

    @staticmethod
    def scores(scores: Scores) -> tuple[float, float, int]:
        window = NO_WINDOW if scores.window is None else min(scores.window, NO_WINDOW)
        return scores.scale, scores.softcap or 0.0, window

    @staticmethod
    def strides(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
        return query.stride(0), query.stride(1), key.stride(0), key.stride(1)


def _readable(tensor: Tensor) -> Tensor:
    """Return a tensor that kernels can read: its last dimension is contiguous."""
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        tensor = tensor.float()  # the interpreter computes bfloat16 wrongly
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _count_splits(query: Tensor, key: Tensor) -> int:
    """Count the splits of a row by sizes that the host knows; rows' lengths are on the device."""
    processors = 4  # in the interpreter; any small number does
    if query.is_cuda:
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    programs = query.shape[0] * key.shape[1]
    wanted = triton.cdiv(processors * _PROGRAMS_PER_PROCESSOR, programs)
    return max(1, min(wanted, triton.cdiv(key.shape[0], _KEYS_PER_SPLIT)))


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
