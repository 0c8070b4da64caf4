"""Add the gradients of keys and queries in one pass over the keys: helpers, kernel, launcher."""

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
from abft_kernels.loss_triton.launch import COUNTS, HEAD_BLOCK, OPTIONS, Shape, on_device, readable
from abft_kernels.loss_triton.query_gradient import (
    leave_query_gradient,
    loss_coefficient,
    sum_parts,
)
from abft_kernels.types import Normalizer, Rows, Scores

# Bytes of a tile of keys: few, because the tile's gradients stay in registers. The tiles of all
# stages but one are in flight. Where tiles are larger, there are fewer stages: cards hold 99 KiB.
_TILE_BYTES = 4096
_BYTES_IN_FLIGHT = 20480
_KEYS_PER_SPLIT = 2048  # below, the programs of one launch write the gradients whole
_SPAN_TILES = 16  # the labels among their keys are looked up at once
_LABEL_BLOCK = 8
_ROW_BLOCK = 128
_EARLIER_ROW_BLOCK = 4


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
def _stored_normalizer(
    peak_ptr, total_ptr, offsets, heads, exists, query_row, token_stride, head_stride,
    KNOWN_LSE: tl.constexpr,
):  # fmt: skip
    """Load the normalizer of some heads, as the forward used it."""
    if KNOWN_LSE:
        peak, total = known_normalizer(
            peak_ptr, query_row, heads, exists, token_stride, head_stride
        )
    else:
        peak = tl.load(peak_ptr + offsets, mask=exists, other=0.0)
        total = tl.load(total_ptr + offsets, mask=exists, other=1.0)
    return peak, total


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
    heads, exists = group_of(key_head, GROUP, GROUP_BLOCK)
    offsets = row * tl.num_programs(1) * GROUP + heads
    coefficient = loss_coefficient(
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


@triton.jit(do_not_specialize=COUNTS)
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
    first, end = visible_keys(key_start_ptr, key_end_ptr, row, window, tokens)
    low, high = split_range(first, end, split, splits, KEY_BLOCK)
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
                seen_low, end_seen = visible_keys(key_start_ptr, key_end_ptr, seer, window, tokens)
                seen_high = tl.minimum(high, end_seen)
            query_row = query_position(key_end_ptr, seer, tokens, PACKED)
            query = load_query(
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
            first_label, last_label, _ = own_labels(label_offsets_ptr, seer, rows, labels)

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
                    scores, slope = attention_scores(query, key, scale, softcap, CAPPED)
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
                leave_query_gradient(
                    grad_query_ptr, part_ptr, grad_query * unit, key_end_ptr, row, split, splits,
                    tokens, heads, exists, grad_query_row_stride, grad_query_head_stride,
                    GROUP, HEAD_DIM, DIM_BLOCK, PACKED,
                )  # fmt: skip
        if chunks > 1 or not PACKED:
            tl.debug_barrier()  # the next turn reads what this one has written


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
    query, key = readable(query), readable(key)
    grads = [readable(grad) for grad in (grad_query, grad_key)]
    shape = Shape(query, key, rows)
    splits = shape.count_splits(longest, _KEYS_PER_SPLIT)
    in_parts = splits > 1 or not packed
    parts = (shape.rows, shape.query_heads, splits, shape.head_dim)
    part = query.new_empty(parts if in_parts else 0, dtype=torch.float32)
    key_block = shape.tile_keys(_TILE_BYTES)
    tiles_in_flight = max(1, min(5, _BYTES_IN_FLIGHT // (key_block * shape.row_bytes)))
    known = normalizer.total is None
    with on_device(query):
        _gradient_kernel[(shape.rows * splits, shape.key_heads)](
            query, key, *rows, normalizer.peak, query if known else normalizer.total,
            mean_weight, is_induction, grad_loss, penalty.contiguous(), reward.contiguous(),
            *grads, part,
            *shape.scores(scores), shape.tokens, splits, shape.rows, len(rows.label_positions),
            int(head_filter), int(penalty.ndim > 0), *normalizer.peak.stride(),
            *grad_loss.stride(), *shape.strides(query, key), *shape.strides(*grads),
            **shape.constants(), HEAD_BLOCK=HEAD_BLOCK, KEY_BLOCK=key_block, TILES=_SPAN_TILES,
            LABEL_BLOCK=_LABEL_BLOCK, ROW_BLOCK=_ROW_BLOCK, EARLIER_ROW_BLOCK=_EARLIER_ROW_BLOCK,
            CAPPED=scores.softcap is not None, PACKED=packed, KNOWN_LSE=known,
            num_warps=shape.warps(HEAD_BLOCK), num_stages=1 + tiles_in_flight, **OPTIONS,
        )  # fmt: skip
        if in_parts:
            sum_parts(
                grads[0], part, shape, rows, scores, is_induction, grad_loss,
                head_filter=head_filter, packed=packed,
            )  # fmt: skip
    for grad, written in zip((grad_query, grad_key), grads, strict=True):
        if written is not grad:
            grad.copy_(written)
