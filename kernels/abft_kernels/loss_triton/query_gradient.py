"""Add the gradients of queries, whole or as the sum of their splits' parts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from abft_kernels.loss_triton.jit_helpers import query_pointers, query_position
from abft_kernels.loss_triton.launch import COUNTS, HEAD_BLOCK, OPTIONS, Shape
from abft_kernels.types import Rows, Scores


@triton.jit
def loss_coefficient(
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
def _add_to_query(
    grad_query_ptr, added, query_row, heads, exists, row_stride, head_stride,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to the gradient of some heads of one query, (G, DIM_BLOCK)."""
    pointers = query_pointers(grad_query_ptr, query_row, heads, row_stride, head_stride, DIM_BLOCK)
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
    return query_pointers(
        part_ptr + split * HEAD_DIM, row, heads, query_heads * head_stride, head_stride, DIM_BLOCK
    )


@triton.jit
def leave_query_gradient(
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
            grad_query_ptr, grad_query, query_position(key_end_ptr, row, tokens, PACKED), heads,
            exists, row_stride, head_stride, HEAD_DIM, DIM_BLOCK,
        )  # fmt: skip
    else:
        query_heads = tl.num_programs(1) * GROUP
        tl.store(
            _part_pointers(part_ptr, row, heads, split, splits, query_heads, HEAD_DIM, DIM_BLOCK),
            grad_query,
            mask=exists[:, None] & (tl.arange(0, DIM_BLOCK) < HEAD_DIM)[None, :],
        )


@triton.jit(do_not_specialize=COUNTS)
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
    coefficient = loss_coefficient(
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
            grad_query_ptr, grad_query, query_position(key_end_ptr, row, tokens, PACKED), heads,
            has_loss, grad_query_row_stride, grad_query_head_stride, HEAD_DIM, DIM_BLOCK,
        )  # fmt: skip


def sum_parts(
    grad_query: Tensor,
    part: Tensor,
    shape: Shape,
    rows: Rows,
    scores: Scores,
    is_induction: Tensor,
    grad_loss: Tensor,
    *,
    head_filter: bool,
    packed: bool,
) -> None:
    """Add the parts that `leave_query_gradient` stored, (R, Hq, splits, D), to the gradient."""
    _sum_parts_kernel[(shape.rows, triton.cdiv(shape.query_heads, HEAD_BLOCK))](
        part, is_induction, grad_loss, rows.key_end, grad_query,
        scores.scale, shape.tokens, part.shape[2], shape.query_heads, int(head_filter),
        *grad_loss.stride(), *grad_query.stride()[:2],
        HEAD_BLOCK=HEAD_BLOCK, HEAD_DIM=shape.head_dim, DIM_BLOCK=shape.dim_block,
        PACKED=packed, **OPTIONS,
    )  # fmt: skip
