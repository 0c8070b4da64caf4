"""Compute the last rows' softmax, label loss and gradient on a GPU: helpers, kernels, launchers.

One program serves all query heads of one key head, so the forward reads keys once whatever the GQA
ratio, and the backward once for every 16 heads of a group that have a loss.
Long rows are split over programs, and the parts are combined in a fixed order. There are no
atomics, so results repeat bit by bit. Lengths and counts never specialize a kernel.

The forward reads all keys only to find a normalizer that nobody knows yet. The backward reads keys
for both gradients together.

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
_LABEL_BLOCK = 8
_ROW_BLOCK = 128
_EARLIER_ROW_BLOCK = 4
_SPLIT_BLOCK = 16
_HEAD_BLOCK = 16  # query heads of a backward's chunk; 16 is the least that tl.dot takes
_SPAN_TILES = 16  # of the backward; the labels among their keys are looked up at once
_OPTIONS = {"enable_fp_fusion": True}  # Triton's own default depends on its version
INTERPRETED = triton.knobs.runtime.interpret  # read once, when kernels are decorated
# Programs that keep a processor's memory busy, and the fewest keys that are worth one.
_PROGRAMS_PER_PROCESSOR = 8
_KEYS_PER_SPLIT = 512
_GRADIENT_KEYS_PER_SPLIT = 2048  # below, the programs of one launch write the gradients whole
# Bytes of a tile of keys; the tiles of all stages but one are in flight. The backward's tiles are
# small, because their gradients stay in registers.
_TILE_BYTES = 16384
_SCAN_STAGES = 3
_GRADIENT_TILE_BYTES = 4096
_GRADIENT_BYTES_IN_FLIGHT = 20480  # where tiles are larger, fewer stages: cards hold 99 KiB


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
def _add_dot_float32(total, weight, operand):
    """Add weight @ operand; for a 16-bit operand the weight is split in two, high and low."""
    if operand.dtype == tl.float32:
        total = tl.dot(weight, operand, total, input_precision="ieee")
    else:
        high = weight.to(operand.dtype)
        low = (weight - high.to(tl.float32)).to(operand.dtype)
        total = tl.dot(low, operand, tl.dot(high, operand, total))
    return total


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
def _group_of(key_head, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr):
    """Return one key head's query heads, padded to GROUP_BLOCK, and which of them exist."""
    member = tl.arange(0, GROUP_BLOCK)
    return key_head * GROUP + member, member < GROUP


@triton.jit
def _query_pointers(pointer, row, heads, row_stride, head_stride, DIM_BLOCK: tl.constexpr):
    """Return pointers to some heads of one row's query, (G, DIM_BLOCK)."""
    offset = heads.to(tl.int64) * head_stride + tl.full(heads.shape, row, tl.int64) * row_stride
    return pointer + offset[:, None] + tl.arange(0, DIM_BLOCK)[None, :]


@triton.jit
def _load_query(
    query_ptr, row, heads, exists, row_stride, head_stride,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Load some heads of one row's query, (G, DIM_BLOCK), zero-padded."""
    in_head = tl.arange(0, DIM_BLOCK) < HEAD_DIM
    return tl.load(
        _query_pointers(query_ptr, row, heads, row_stride, head_stride, DIM_BLOCK),
        mask=exists[:, None] & in_head[None, :],
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
        The new maximum and the new sum.
    """
    new_max = tl.maximum(running_max, tl.max(scores, AXIS))
    rescale = tl.exp(running_max - new_max)
    weight = tl.exp(scores - tl.expand_dims(new_max, AXIS))
    return new_max, running_sum * rescale + tl.sum(sums * weight, AXIS)


@triton.jit
def _query_row(key_end_ptr, row, tokens, PACKED: tl.constexpr):
    """Return where a row's query lies: among packed queries, at the row's last token."""
    found = row
    if PACKED:
        found = tl.maximum(tl.minimum(tl.load(key_end_ptr + row), tokens), 1) - 1
    return found


@triton.jit
def _split_range(first, end, split, splits, BLOCK: tl.constexpr):
    """Return the first key of a row's split and one past its last; a later split may be empty."""
    share = tl.cdiv(tl.cdiv(end - first, splits), BLOCK) * BLOCK
    low = first + split * share
    return low, tl.minimum(low + share, end)


@triton.jit
def _known_normalizer(lse_ptr, query_row, heads, exists, token_stride, head_stride):
    """Load the log-sum-exp of a query's heads where attention left it; the total is 1."""
    token_offset = tl.full(heads.shape, query_row, tl.int64) * token_stride
    head_offset = heads.to(tl.int64) * head_stride
    lse = tl.load(lse_ptr + token_offset + head_offset, mask=exists, other=0.0)
    return lse, tl.full(heads.shape, 1.0, tl.float32)


@triton.jit
def _stored_normalizer(
    peak_ptr, total_ptr, offsets, heads, exists, query_row, token_stride, head_stride,
    KNOWN_LSE: tl.constexpr,
):  # fmt: skip
    """Load the normalizer of some heads, as the forward used it."""
    if KNOWN_LSE:
        peak, total = _known_normalizer(
            peak_ptr, query_row, heads, exists, token_stride, head_stride
        )
    else:
        peak = tl.load(peak_ptr + offsets, mask=exists, other=0.0)
        total = tl.load(total_ptr + offsets, mask=exists, other=1.0)
    return peak, total


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


@triton.jit
def _last_row_that_sees(key_start_ptr, key_end_ptr, row, rows, low, high, ROW_BLOCK: tl.constexpr):
    """Return the last row that sees a key in low:high, or `row` if none after it does."""
    last_row = row
    for block in range(row + 1, rows, ROW_BLOCK):
        later = block + tl.arange(0, ROW_BLOCK)
        start = tl.load(key_start_ptr + later, mask=later < rows, other=0)
        end = tl.load(key_end_ptr + later, mask=later < rows, other=0)
        sees = (start < high) & (end > low) & (later < rows)
        last_row = tl.maximum(last_row, tl.max(tl.where(sees, later, row), 0))
    return last_row


@triton.jit
def _seen_before(
    key_start_ptr, key_end_ptr, row, window, positions,
    SPAN: tl.constexpr, EARLIER_ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return which of SPAN positions a row before this one sees: 1 or 0."""
    seen = tl.zeros([SPAN], tl.int32)
    for block in range(0, row, EARLIER_ROW_BLOCK):
        earlier = block + tl.arange(0, EARLIER_ROW_BLOCK)
        start = tl.load(key_start_ptr + earlier, mask=earlier < row, other=0)
        end = tl.load(key_end_ptr + earlier, mask=earlier < row, other=0)
        first = tl.maximum(start, end - window)
        sees = (first[:, None] <= positions[None, :]) & (positions[None, :] < end[:, None])
        seen = tl.maximum(seen, tl.max((sees & (earlier < row)[:, None]).to(tl.int32), 0))
    return seen


# The marks of a key, one integer: wrong labels, correct labels, and whether an earlier row sees it.
CORRECT = tl.constexpr(1 << 15)
SEEN_BEFORE = tl.constexpr(1 << 30)


@triton.jit
def _label_counts(
    label_positions_ptr, label_is_correct_ptr, first_label, last_label, positions,
    SPAN: tl.constexpr, LABEL_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return a row's labels at SPAN positions: wrong ones + CORRECT * correct ones."""
    counts = tl.zeros([SPAN], tl.int32)
    for block in range(first_label, last_label, LABEL_BLOCK):
        label = block + tl.arange(0, LABEL_BLOCK)
        owned = label < last_label
        position = tl.load(label_positions_ptr + label, mask=owned, other=-1)
        correct = tl.load(label_is_correct_ptr + label, mask=owned, other=0)
        one = tl.where(correct != 0, CORRECT, 1)
        same = position[:, None] == positions[None, :]
        counts += tl.sum(tl.where(same, one[:, None], 0), 0)
    return counts


@triton.jit
def _seen_in_tile(low, seen_low, seen_high, KEY_BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Return which keys of a tile lie in seen_low:seen_high; a packed row's tiles begin there."""
    positions = low + tl.arange(0, KEY_BLOCK)
    seen = positions < seen_high
    if not PACKED:
        seen = seen & (positions >= seen_low)
    return seen


@triton.jit
def _tile_pointers(
    pointer, low, key_head, token_stride, head_stride,
    KEY_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return pointers to a tile of keys of one head, (KEY_BLOCK, DIM_BLOCK), from key `low` on."""
    pointer += key_head.to(tl.int64) * head_stride + tl.full((), low, tl.int64) * token_stride
    token = tl.arange(0, KEY_BLOCK) * token_stride
    return pointer + token[:, None] + tl.arange(0, DIM_BLOCK)[None, :]


@triton.jit
def _tile_of(span, tile, KEY_BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Return one tile of a span of integers, (TILES * KEY_BLOCK,)."""
    tiles = tl.reshape(span, (TILES, KEY_BLOCK))
    return tl.sum(tl.where((tl.arange(0, TILES) == tile)[:, None], tiles, 0), 0)


_COUNTS = [
    "window", "tokens", "splits", "rows", "labels", "query_heads", "head_filter",
    "peak_token_stride", "peak_head_stride", "loss_row_stride", "loss_head_stride",
    "factor_stride",
]  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
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
    heads, exists = _group_of(key_head, GROUP, GROUP_BLOCK)
    query = _load_query(
        query_ptr, _query_row(key_end_ptr, row, tokens, PACKED), heads, exists,
        query_row_stride, query_head_stride, HEAD_DIM, DIM_BLOCK,
    )  # fmt: skip
    first, end = _visible_keys(key_start_ptr, key_end_ptr, row, window, tokens)
    low, high = _split_range(first, end, split, splits, KEY_BLOCK)

    running_max = tl.full([GROUP_BLOCK], -float("inf"), tl.float32)
    running_sum = tl.zeros([GROUP_BLOCK], tl.float32)
    for block in range(low, high, KEY_BLOCK):
        positions = block + tl.arange(0, KEY_BLOCK)
        visible = positions < high
        key = _load_keys(
            key_ptr, positions, visible, key_head, key_token_stride, key_head_stride,
            HEAD_DIM, DIM_BLOCK,
        )  # fmt: skip
        scores, _ = _attention_scores(query, key, scale, softcap, CAPPED)
        scores = tl.where(visible[None, :], scores, -float("inf"))
        running_max, running_sum = _online_softmax_update(
            running_max, running_sum, scores, sums=1.0, AXIS=1
        )

    offsets = row * tl.num_programs(1) * GROUP + heads
    part = offsets.to(tl.int64) * splits + split
    tl.store(part_max_ptr + part, running_max, mask=exists)
    tl.store(part_sum_ptr + part, running_sum, mask=exists)


@triton.jit(do_not_specialize=_COUNTS)
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
    heads, exists = _group_of(key_head, GROUP, GROUP_BLOCK)
    offsets = row * tl.num_programs(1) * GROUP + heads
    query_row = _query_row(key_end_ptr, row, tokens, PACKED)
    query = _load_query(
        query_ptr, query_row, heads, exists, query_row_stride, query_head_stride,
        HEAD_DIM, DIM_BLOCK,
    )  # fmt: skip
    if KNOWN_LSE:
        peak, total = _known_normalizer(
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
    first_label, last_label, sound = _own_labels(label_offsets_ptr, row, rows, labels)

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
        scores, _ = _attention_scores(query, key, scale, softcap, CAPPED)
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


@triton.jit
def _coefficient(
    grad_loss_ptr, is_induction_ptr, row, offsets, heads, exists, scale, head_filter,
    loss_row_stride, loss_head_stride,
):  # fmt: skip
    """Return scale * incoming gradient for some heads; 0 for heads without a loss."""
    is_induction = tl.load(is_induction_ptr + offsets, mask=exists, other=0).to(tl.int32)
    has_loss = exists & (tl.where(head_filter != 0, is_induction, 1) != 0)
    grad = tl.load(
        grad_loss_ptr + row * loss_row_stride + heads * loss_head_stride, mask=has_loss, other=0.0
    )
    return scale * grad


@triton.jit
def _chunk_of_heads(
    grad_loss_ptr, is_induction_ptr, row, key_head, chunk, scale, head_filter,
    loss_row_stride, loss_head_stride,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return a chunk of a group's query heads, which of them exist, and their coefficients.

    A group of HEAD_BLOCK heads or fewer is one chunk. A chunk of a larger group has the next
    HEAD_BLOCK heads with a loss, so a group with few of them needs one chunk, too.

    Example: of the 32 heads of a group, the heads 3, 8 and 30 have a loss. Chunk 0 has these three,
    and chunk 1 has none.
    """
    heads, exists = _group_of(key_head, GROUP, GROUP_BLOCK)
    offsets = row * tl.num_programs(1) * GROUP + heads
    coefficient = _coefficient(
        grad_loss_ptr, is_induction_ptr, row, offsets, heads, exists, scale, head_filter,
        loss_row_stride, loss_head_stride,
    )  # fmt: skip
    if GROUP > HEAD_BLOCK:
        has_loss = coefficient != 0
        place = tl.cumsum(has_loss.to(tl.int32), 0) - 1 - chunk * HEAD_BLOCK
        in_place = place[None, :] == tl.arange(0, HEAD_BLOCK)[:, None]
        chosen = has_loss[None, :] & in_place  # (HEAD_BLOCK, GROUP_BLOCK), at most one in a row
        exists = tl.max(chosen.to(tl.int32), 1) > 0
        heads = tl.sum(tl.where(chosen, heads[None, :], 0), 1)
        coefficient = tl.sum(tl.where(chosen, coefficient[None, :], 0.0), 1)
    return heads, exists, coefficient


@triton.jit
def _unit(factors):
    """Return a power of two: factors divided by it stay under 2**11, well within float16's range.

    Small probabilities times these quotients are then exact to 2**-24 or better in two halves.
    """
    largest = tl.maximum(tl.max(factors, 0), 1e-18)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return power / 1024


@triton.jit(do_not_specialize=_COUNTS)
def _gradient_kernel(
    query_ptr, key_ptr, key_start_ptr, key_end_ptr,
    label_positions_ptr, label_offsets_ptr, label_is_correct_ptr,
    peak_ptr,  # (R, Hq); if KNOWN_LSE the log-sum-exp, (T, Hq) with strides
    total_ptr,  # (R, Hq), read unless KNOWN_LSE
    mean_weight_ptr,  # (R, Hq)
    is_induction_ptr,  # (R, Hq) bool
    grad_loss_ptr,  # (R, Hq) with strides
    penalty_ptr, reward_ptr,  # scalars, or (R, Hq) if factor_stride is 1
    grad_query_ptr,  # like the queries, in and out
    grad_key_ptr,  # (T, Hkv, D), in and out
    part_ptr,  # (R, Hq, splits, D) out: dq of each split, unless a packed row has one
    scale, softcap, window, tokens, splits, rows, labels, head_filter, factor_stride,
    peak_token_stride, peak_head_stride, loss_row_stride, loss_head_stride,
    query_row_stride, query_head_stride, key_token_stride, key_head_stride,
    grad_query_row_stride, grad_query_head_stride, grad_token_stride, grad_head_stride,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, TILES: tl.constexpr, LABEL_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr, EARLIER_ROW_BLOCK: tl.constexpr,
    CAPPED: tl.constexpr, PACKED: tl.constexpr, KNOWN_LSE: tl.constexpr,
):  # fmt: skip
    """Add dk of one split of a row's keys, and the row's dq, for one key head.

    Packed rows own their keys. Other rows may share keys, and a shared key's gradient belongs to
    the first row that sees it. That row's program adds the later rows' parts one after the other,
    so no two programs write to one key. It also adds the chunks of a large group one after the
    other, and reads keys once for each chunk that has a loss.
    """
    row = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    key_head = tl.program_id(1)
    in_head = (tl.arange(0, DIM_BLOCK) < HEAD_DIM)[None, :]
    span_keys: tl.constexpr = TILES * KEY_BLOCK
    chunks: tl.constexpr = (GROUP + HEAD_BLOCK - 1) // HEAD_BLOCK
    first, end = _visible_keys(key_start_ptr, key_end_ptr, row, window, tokens)
    low, high = _split_range(first, end, split, splits, KEY_BLOCK)
    seers = 1
    if not PACKED:
        last_row = _last_row_that_sees(key_start_ptr, key_end_ptr, row, rows, low, high, ROW_BLOCK)
        seers = 1 + last_row - row
    for turn in range(seers * chunks):
        seer = row + turn // chunks
        heads, exists, coefficient = _chunk_of_heads(
            grad_loss_ptr, is_induction_ptr, seer, key_head, turn % chunks, scale, head_filter,
            loss_row_stride, loss_head_stride, GROUP, GROUP_BLOCK, HEAD_BLOCK,
        )  # fmt: skip
        if tl.max((coefficient != 0).to(tl.int32), 0) > 0:
            seen_low = low
            seen_high = high
            if not PACKED:
                seen_low, end_seen = _visible_keys(key_start_ptr, key_end_ptr, seer, window, tokens)
                seen_high = tl.minimum(high, end_seen)
            query_row = _query_row(key_end_ptr, seer, tokens, PACKED)
            query = _load_query(
                query_ptr, query_row, heads, exists, query_row_stride, query_head_stride,
                HEAD_DIM, DIM_BLOCK,
            )  # fmt: skip
            offsets = seer * tl.num_programs(1) * GROUP + heads
            peak, total = _stored_normalizer(
                peak_ptr, total_ptr, offsets, heads, exists, query_row,
                peak_token_stride, peak_head_stride, KNOWN_LSE,
            )  # fmt: skip
            mean_weight = tl.load(mean_weight_ptr + offsets, mask=exists, other=0.0)
            penalty = tl.load(penalty_ptr + offsets * factor_stride, mask=exists, other=0.0)
            reward = tl.load(reward_ptr + offsets * factor_stride, mask=exists, other=0.0)
            steepest = tl.maximum(tl.maximum(tl.abs(penalty), tl.abs(reward)), tl.abs(mean_weight))
            unit = _unit(tl.abs(coefficient) * steepest)
            inverse_unit = 1 / unit
            factor = coefficient * inverse_unit / total
            mean_weight *= factor
            penalty *= factor
            reward *= factor
            first_label, last_label, _ = _own_labels(label_offsets_ptr, seer, rows, labels)

            grad_query = tl.zeros([HEAD_BLOCK, DIM_BLOCK], tl.float32)
            for span in range(low, high, span_keys):
                in_span = span + tl.arange(0, span_keys)
                marks = _label_counts(
                    label_positions_ptr, label_is_correct_ptr, first_label, last_label, in_span,
                    span_keys, LABEL_BLOCK,
                )  # fmt: skip
                if not PACKED:
                    marks += SEEN_BEFORE * _seen_before(
                        key_start_ptr, key_end_ptr, row, window, in_span,
                        span_keys, EARLIER_ROW_BLOCK,
                    )  # fmt: skip
                here = span
                for ahead in range(span, tl.minimum(span + span_keys, high), KEY_BLOCK):
                    # Keys are copied some tiles ahead. All else is counted by `here`, or it would
                    # wait in registers.
                    key_ptrs = _tile_pointers(
                        key_ptr, ahead, key_head, key_token_stride, key_head_stride,
                        KEY_BLOCK, DIM_BLOCK,
                    )  # fmt: skip
                    visible = _seen_in_tile(ahead, seen_low, seen_high, KEY_BLOCK, PACKED)
                    key = tl.load(key_ptrs, mask=visible[:, None] & in_head, other=0.0)
                    visible = _seen_in_tile(here, seen_low, seen_high, KEY_BLOCK, PACKED)
                    in_tile = _tile_of(marks, (here - span) // KEY_BLOCK, KEY_BLOCK, TILES)
                    written = visible
                    if not PACKED:
                        written = visible & (in_tile < SEEN_BEFORE)
                    grad_key_ptrs = _tile_pointers(
                        grad_key_ptr, here, key_head, grad_token_stride, grad_head_stride,
                        KEY_BLOCK, DIM_BLOCK,
                    )  # fmt: skip
                    owned = written[:, None] & in_head
                    grad_key = tl.load(grad_key_ptrs, mask=owned, other=0.0)
                    scores, slope = _attention_scores(query, key, scale, softcap, CAPPED)
                    alpha = tl.exp(scores - peak[:, None])
                    wrong = (in_tile % CORRECT).to(tl.float32)
                    correct = (in_tile // CORRECT % CORRECT).to(tl.float32)
                    weight = penalty[:, None] * wrong[None, :] - reward[:, None] * correct[None, :]
                    grad_scores = alpha * (weight - mean_weight[:, None]) * slope
                    grad_scores = tl.where(visible[None, :], grad_scores, 0.0)
                    grad_key = _add_dot_float32(
                        grad_key.to(tl.float32) * inverse_unit, tl.trans(grad_scores), query
                    )
                    tl.store(grad_key_ptrs, grad_key * unit, mask=owned)
                    grad_query = _add_dot_float32(grad_query, grad_scores, key)
                    here += KEY_BLOCK
            if turn < chunks:
                if chunks > 1:  # chosen once more, or they would wait in registers
                    heads, exists, coefficient = _chunk_of_heads(
                        grad_loss_ptr, is_induction_ptr, row, key_head, turn, scale, head_filter,
                        loss_row_stride, loss_head_stride, GROUP, GROUP_BLOCK, HEAD_BLOCK,
                    )  # fmt: skip
                _leave_query_gradient(
                    grad_query_ptr, part_ptr, grad_query * unit, key_end_ptr, row, split, splits,
                    tokens, heads, exists, grad_query_row_stride, grad_query_head_stride,
                    GROUP, HEAD_DIM, DIM_BLOCK, PACKED,
                )  # fmt: skip
        if chunks > 1 or not PACKED:
            tl.debug_barrier()  # the next turn reads what this one has written


@triton.jit
def _add_to_query(
    grad_query_ptr, added, query_row, heads, exists, row_stride, head_stride,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of some heads of one query, (G, DIM_BLOCK)."""
    pointers = _query_pointers(grad_query_ptr, query_row, heads, row_stride, head_stride, DIM_BLOCK)
    there = exists[:, None] & (tl.arange(0, DIM_BLOCK) < HEAD_DIM)[None, :]
    old = tl.load(pointers, mask=there, other=0.0).to(tl.float32)
    tl.store(pointers, old + added, mask=there)


@triton.jit
def _part_pointers(
    part_ptr, row, heads, split, splits, query_heads,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return pointers to what one split adds to some heads' dq, (G, DIM_BLOCK)."""
    head_stride = splits * HEAD_DIM
    return _query_pointers(
        part_ptr + split * HEAD_DIM, row, heads, query_heads * head_stride, head_stride, DIM_BLOCK
    )


@triton.jit
def _leave_query_gradient(
    grad_query_ptr, part_ptr, grad_query, key_end_ptr, row, split, splits, tokens, heads, exists,
    row_stride, head_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Add a packed row's only part to its query's gradient; else store the part of this split."""
    whole = False
    if PACKED:
        whole = splits == 1
    if whole:
        _add_to_query(
            grad_query_ptr, grad_query, _query_row(key_end_ptr, row, tokens, PACKED), heads,
            exists, row_stride, head_stride, HEAD_DIM, DIM_BLOCK,
        )  # fmt: skip
    else:
        query_heads = tl.num_programs(1) * GROUP
        tl.store(
            _part_pointers(part_ptr, row, heads, split, splits, query_heads, HEAD_DIM, DIM_BLOCK),
            grad_query,
            mask=exists[:, None] & (tl.arange(0, DIM_BLOCK) < HEAD_DIM)[None, :],
        )


@triton.jit(do_not_specialize=_COUNTS)
def _sum_parts_kernel(
    part_ptr,  # (R, Hq, splits, D)
    is_induction_ptr, grad_loss_ptr, key_end_ptr,
    grad_query_ptr,  # like the queries, in and out
    scale, tokens, splits, query_heads, head_filter, loss_row_stride, loss_head_stride,
    grad_query_row_stride, grad_query_head_stride,
    HEAD_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Add a row's dq, the sum of its splits' parts in their order, for HEAD_BLOCK query heads."""
    row = tl.program_id(0)
    heads = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    offsets = row * query_heads + heads
    coefficient = _coefficient(
        grad_loss_ptr, is_induction_ptr, row, offsets, heads, heads < query_heads, scale,
        head_filter, loss_row_stride, loss_head_stride,
    )  # fmt: skip
    has_loss = coefficient != 0
    if tl.max(has_loss.to(tl.int32), 0) > 0:
        there = has_loss[:, None] & (tl.arange(0, DIM_BLOCK) < HEAD_DIM)[None, :]
        grad_query = tl.zeros([HEAD_BLOCK, DIM_BLOCK], tl.float32)
        for split in range(splits):
            grad_query += tl.load(
                _part_pointers(
                    part_ptr, row, heads, split, splits, query_heads, HEAD_DIM, DIM_BLOCK
                ),
                mask=there,
                other=0.0,
            )
        _add_to_query(
            grad_query_ptr, grad_query, _query_row(key_end_ptr, row, tokens, PACKED), heads,
            has_loss, grad_query_row_stride, grad_query_head_stride, HEAD_DIM, DIM_BLOCK,
        )  # fmt: skip


def scan_keys(
    query: Tensor, key: Tensor, rows: Rows, scores: Scores, *, packed: bool
) -> tuple[Tensor, Tensor]:
    """Scan all keys in splits: the largest score and the sum of each, both (R, Hq, splits)."""
    query, key = _readable(query), _readable(key)
    shape = _Shape(query, key, rows)
    splits = _count_splits(shape, shape.tokens, _KEYS_PER_SPLIT)
    parts = (shape.rows, shape.query_heads, splits)
    part_max, part_sum = (query.new_empty(parts, dtype=torch.float32) for _ in range(2))
    with _on_device(query):
        _scan_keys_kernel[(shape.rows * splits, shape.key_heads)](
            query, key, rows.key_start, rows.key_end, part_max, part_sum,
            *shape.scores(scores), shape.tokens, splits, *shape.strides(query, key),
            **shape.constants(), KEY_BLOCK=shape.key_block, CAPPED=scores.softcap is not None,
            PACKED=packed, num_warps=shape.warps, num_stages=_SCAN_STAGES, **_OPTIONS,
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
    query, key = _readable(query), _readable(key)
    shape = _Shape(query, key, rows)
    heads = (shape.rows, shape.query_heads)
    if lse is None:
        part_max, part_sum = scan_keys(query, key, rows, scores, packed=packed)
        splits = part_max.shape[2]
    else:
        part_max = part_sum = query  # not read
        splits = 0
    known = 0 if lse is not None else heads
    peak, total = (query.new_empty(known, dtype=torch.float32) for _ in range(2))
    loss, label_mass, correct_mass, mean_weight = (
        query.new_empty(heads, dtype=torch.float32) for _ in range(4)
    )
    is_induction = query.new_empty(heads, dtype=torch.bool)
    head_factors = query.new_empty(0 if hold is None else (2, *heads), dtype=torch.float32)
    with _on_device(query):
        _label_loss_kernel[(shape.rows, shape.key_heads)](
            query, key, *rows, part_max, part_sum,
            query if sinks is None else _readable(sinks), peak if lse is None else lse, total,
            penalty, reward, penalty if hold is None else hold,
            loss, label_mass, correct_mass, is_induction, mean_weight, head_factors,
            *shape.scores(scores), shape.tokens, splits, shape.rows, len(rows.label_positions),
            int(head_filter), *((0, 0) if lse is None else lse.stride()),
            *shape.strides(query, key), **shape.constants(),
            LABEL_BLOCK=shape.key_block, SPLIT_BLOCK=_SPLIT_BLOCK,
            CAPPED=scores.softcap is not None, PACKED=packed, KNOWN_LSE=lse is not None,
            HAS_SINKS=sinks is not None and lse is None,
            SHARE=hold is not None, SMALLEST_MASS=SMALLEST_MASS,
            num_warps=shape.warps, **_OPTIONS,
        )  # fmt: skip
    return LabelLoss(
        loss, label_mass, correct_mass, is_induction, peak, total, mean_weight, head_factors
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
    (R, Hq). No row sees more than `longest` keys.
    """
    query, key = _readable(query), _readable(key)
    shape = _Shape(query, key, rows)
    splits = _count_splits(shape, longest, _GRADIENT_KEYS_PER_SPLIT)
    parts = (shape.rows, shape.query_heads, splits, shape.head_dim)
    in_parts = splits > 1 or not packed
    part = query.new_empty(parts if in_parts else 0, dtype=torch.float32)
    outputs = [_readable(grad) for grad in (grad_query, grad_key)]
    known = normalizer.total is None
    with _on_device(query):
        _gradient_kernel[(shape.rows * splits, shape.key_heads)](
            query, key, *rows, normalizer.peak, query if known else normalizer.total,
            mean_weight, is_induction, grad_loss, penalty.contiguous(), reward.contiguous(),
            *outputs, part,
            *shape.scores(scores), shape.tokens, splits, shape.rows, len(rows.label_positions),
            int(head_filter), int(penalty.ndim > 0), *normalizer.peak.stride(),
            *grad_loss.stride(), *shape.strides(query, key), *shape.strides(*outputs),
            **shape.constants(), HEAD_BLOCK=_HEAD_BLOCK,
            KEY_BLOCK=shape.gradient_block, TILES=_SPAN_TILES,
            LABEL_BLOCK=_LABEL_BLOCK, ROW_BLOCK=_ROW_BLOCK, EARLIER_ROW_BLOCK=_EARLIER_ROW_BLOCK,
            CAPPED=scores.softcap is not None, PACKED=packed, KNOWN_LSE=known,
            num_warps=shape.gradient_warps, num_stages=shape.gradient_stages, **_OPTIONS,
        )  # fmt: skip
        if in_parts:
            _sum_parts_kernel[(shape.rows, triton.cdiv(shape.query_heads, _HEAD_BLOCK))](
                part, is_induction, grad_loss, rows.key_end, outputs[0],
                scores.scale, shape.tokens, splits, shape.query_heads, int(head_filter),
                *grad_loss.stride(), *outputs[0].stride()[:2],
                HEAD_BLOCK=_HEAD_BLOCK, HEAD_DIM=shape.head_dim, DIM_BLOCK=shape.dim_block,
                PACKED=packed, **_OPTIONS,
            )  # fmt: skip
    for grad, output in zip((grad_query, grad_key), outputs, strict=True):
        if output is not grad:
            grad.copy_(output)


class _Shape:
    """The sizes of one call, and the block sizes that follow from them."""

    def __init__(self, query: Tensor, key: Tensor, rows: Rows):
        self.rows = len(rows.key_start)
        _, self.query_heads, self.head_dim = query.shape
        self.tokens, self.key_heads, _ = key.shape
        self.dim_block = max(16, triton.next_power_of_2(self.head_dim))
        self.group = self.query_heads // self.key_heads
        self.group_block = max(16, triton.next_power_of_2(self.group))
        self.processors = _count_processors(query)
        row_bytes = self.dim_block * query.element_size()
        self.key_block = max(16, min(64, _TILE_BYTES // row_bytes))
        self.gradient_block = max(16, min(64, _GRADIENT_TILE_BYTES // row_bytes))
        gradient_tile = self.gradient_block * row_bytes
        self.gradient_stages = 1 + max(1, min(5, _GRADIENT_BYTES_IN_FLIGHT // gradient_tile))
        # Float32 products keep their operands in registers.
        wide = 2048 if query.element_size() > 2 else 16384
        self.warps = 8 if self.group_block * self.dim_block >= wide else 4
        self.gradient_warps = 8 if _HEAD_BLOCK * self.dim_block >= wide else 4

    def constants(self) -> dict[str, int]:
        return {
            "GROUP": self.group,
            "GROUP_BLOCK": self.group_block,
            "HEAD_DIM": self.head_dim,
            "DIM_BLOCK": self.dim_block,
        }

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


def _count_processors(tensor: Tensor) -> int:
    """Count the processors of the tensor's GPU; in the interpreter, any small number does."""
    if not tensor.is_cuda:
        return 4
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def _count_splits(shape: _Shape, longest: int, keys: int) -> int:
    """Count the splits of a row, of `keys` or more if a row has `longest`.

    The host knows these sizes; rows' lengths are on the device.
    """
    programs = shape.rows * shape.key_heads
    wanted = triton.cdiv(shape.processors * _PROGRAMS_PER_PROCESSOR, programs)
    return max(1, min(wanted, triton.cdiv(longest, keys)))


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
