"""Jit helpers of both directions: what a program reads, and how a query and a key make a score."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
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
def attention_scores(query, key, scale, softcap, CAPPED: tl.constexpr):
    """Compute (G, N) scores, and their slope: d score / d (scale * query @ key)."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    slope = tl.full(scores.shape, 1.0, tl.float32)
    if CAPPED:
        capped = tanh(scores / softcap)
        scores = softcap * capped
        slope = 1 - capped * capped
    return scores, slope


@triton.jit
def group_of(key_head, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr):
    """Return one key head's query heads, padded to GROUP_BLOCK, and which of them exist."""
    member = tl.arange(0, GROUP_BLOCK)
    return key_head * GROUP + member, member < GROUP


@triton.jit
def query_pointers(pointer, row, heads, row_stride, head_stride, DIM_BLOCK: tl.constexpr):
    """Return pointers to some heads of one row's query, (G, DIM_BLOCK)."""
    offset = heads.to(tl.int64) * head_stride + tl.full(heads.shape, row, tl.int64) * row_stride
    return pointer + offset[:, None] + tl.arange(0, DIM_BLOCK)[None, :]


@triton.jit
def load_query(
    query_ptr, row, heads, exists, row_stride, head_stride,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Load some heads of one row's query, (G, DIM_BLOCK), zero-padded."""
    in_head = tl.arange(0, DIM_BLOCK) < HEAD_DIM
    return tl.load(
        query_pointers(query_ptr, row, heads, row_stride, head_stride, DIM_BLOCK),
        mask=exists[:, None] & in_head[None, :],
        other=0.0,
    )


@triton.jit
def visible_keys(key_start_ptr, key_end_ptr, row, window, tokens):
    """Return the first key that a row sees and one past the last, clipped to the tensor."""
    start = tl.load(key_start_ptr + row)
    end = tl.load(key_end_ptr + row)
    return tl.maximum(tl.maximum(start, end - window), 0), tl.minimum(end, tokens)


@triton.jit
def own_labels(label_offsets_ptr, row, rows, labels):
    """Return a row's first label, one past its last, and whether they were in bounds; clip both."""
    first = tl.load(label_offsets_ptr + row)
    last = tl.load(label_offsets_ptr + row + 1)
    sound = (first >= 0) & (first <= last) & (last <= labels)
    sound = sound & ((row > 0) | (first == 0)) & ((row < rows - 1) | (last == labels))
    return tl.maximum(first, 0), tl.minimum(last, labels), sound


@triton.jit
def query_position(key_end_ptr, row, tokens, PACKED: tl.constexpr):
    """Return where a row's query lies: among packed queries, at the row's last token."""
    found = row
    if PACKED:
        found = tl.maximum(tl.minimum(tl.load(key_end_ptr + row), tokens), 1) - 1
    return found


@triton.jit
def split_range(first, end, split, splits, BLOCK: tl.constexpr):
    """Return the first key of a row's split and one past its last; a later split may be empty."""
    share = tl.cdiv(tl.cdiv(end - first, splits), BLOCK) * BLOCK
    low = first + split * share
    return low, tl.minimum(low + share, end)


@triton.jit
def known_normalizer(lse_ptr, query_row, heads, exists, token_stride, head_stride):
    """Load the log-sum-exp of a query's heads where attention left it; the total is 1."""
    token_offset = tl.full(heads.shape, query_row, tl.int64) * token_stride
    head_offset = heads.to(tl.int64) * head_stride
    lse = tl.load(lse_ptr + token_offset + head_offset, mask=exists, other=0.0)
    return lse, tl.full(heads.shape, 1.0, tl.float32)
