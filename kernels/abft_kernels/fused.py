"""Attention of packed prompts and the loss of their last rows in one op.

Flash attention returns each row's log-sum-exp, so a last row's probabilities at its label tokens
need the label keys alone: `alpha_i = exp(s_i - lse)`. All keys are read again only for the gradient
of heads that have a loss. There is one explicit backward, as flash attention has no gradient
through its log-sum-exp.

For float32 the loss makes a normalizer of its own: the log-sum-exp, one float32 number, is off by
1e-6, which is not little in `1 - alpha` of a head that is sure of its label.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abft_kernels.attention.registry import (
    attention_backward,
    attention_forward,
    choose_attention,
)
from abft_kernels.attention.separate import attend_separately
from abft_kernels.checks import check_bounds, check_options, check_tensors
from abft_kernels.loss import (
    choose_backend,
    fake_loss,
    last_row_loss,
    loss_coefficient,
    loss_forward,
    loss_grad_key,
    loss_grad_sinks,
    scalar_like,
    wants_gradient,
)
from abft_kernels.types import LastRowLoss, Normalizer, Prompts, Residuals, Rows, Scores


@torch.library.custom_op("abft::flash_attention_with_last_row_loss", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    label_positions: Tensor,
    label_offsets: Tensor,
    label_is_correct: Tensor,
    penalty: Tensor,
    reward: Tensor,
    longest: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    head_filter: bool,
    attention: str,
    backend: str,
    needs_grad: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    if cu_seqlens.device.type == "cpu":
        check_bounds(cu_seqlens.tolist(), len(query))
    prompts, scores = Prompts(cu_seqlens, longest), Scores(scale, softcap, window)
    out, lse = attention_forward(attention, query, key, value, sinks, prompts, scores)
    last = cu_seqlens[1:].long() - 1
    normalizer = None
    # Soft-capped scores are not the same numbers: flash-attn's tanh is an approximation.
    if query.element_size() == 2 and softcap is None:
        peak = lse.T[last].contiguous()
        normalizer = Normalizer(peak, torch.ones_like(peak))
    found, residuals = loss_forward(
        backend,
        query[last],
        key,
        _rows(cu_seqlens, label_positions, label_offsets, label_is_correct),
        scores,
        sinks,
        penalty,
        reward,
        head_filter,
        needs_grad,
        normalizer,
    )
    return (out.contiguous(), lse, *found[:4], *residuals)


def _rows(cu_seqlens: Tensor, *labels: Tensor) -> Rows:
    return Rows(cu_seqlens[:-1], cu_seqlens[1:], *labels)


@_forward_op.register_fake
def _(query, key, value, sinks, cu_seqlens, *args):
    tokens, heads, _ = query.shape
    last_rows = query.new_empty(cu_seqlens.shape[0] - 1, *query.shape[1:])
    lse = query.new_empty(heads, tokens, dtype=torch.promote_types(query.dtype, torch.float32))
    return (query.new_empty(query.shape), lse, *fake_loss(last_rows, needs_grad=args[-1]))


@torch.library.custom_op("abft::flash_attention_with_last_row_loss_backward", mutates_args=())
def _backward_op(
    grad_out: Tensor | None,
    grad_loss: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    cu_seqlens: Tensor,
    label_positions: Tensor,
    label_offsets: Tensor,
    label_is_correct: Tensor,
    penalty: Tensor,
    reward: Tensor,
    out: Tensor,
    lse: Tensor,
    is_induction: Tensor,
    peak: Tensor,
    total: Tensor,
    mean_weight: Tensor,
    key_sum: Tensor,
    longest: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    head_filter: bool,
    attention: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    prompts, scores = Prompts(cu_seqlens, longest), Scores(scale, softcap, window)
    residuals = Residuals(peak, total, mean_weight, key_sum)
    if grad_out is None:  # the output is not used, as in the last layer
        inputs = (query, key, value, sinks)
        grads = [None if t is None else t.new_zeros(t.shape) for t in inputs]
    else:
        grads = attention_backward(
            attention, grad_out, query, key, value, sinks, out, lse, prompts, scores
        )
    grad_query, grad_key, grad_value = (grad.contiguous() for grad in grads[:3])
    grad_sinks = grads[3]
    if grad_loss is None or len(label_positions) == 0:
        no_sinks = query.new_empty(0)
        return grad_query, grad_key, grad_value, no_sinks if sinks is None else grad_sinks
    coefficient = loss_coefficient(grad_loss, is_induction, head_filter, scores)
    last = cu_seqlens[1:].long() - 1
    grad_query[last] = (grad_query[last] + coefficient[..., None] * key_sum).to(grad_query.dtype)
    loss_grad_key(
        backend,
        query[last],
        key,
        _rows(cu_seqlens, label_positions, label_offsets, label_is_correct),
        scores,
        Normalizer(peak, total),
        mean_weight,
        coefficient,
        penalty,
        reward,
        accumulate_into=grad_key,
    )
    if sinks is None:
        return grad_query, grad_key, grad_value, query.new_empty(0)
    grad_sinks += loss_grad_sinks(sinks, coefficient, residuals, scores)
    return grad_query, grad_key, grad_value, grad_sinks.to(sinks.dtype)


@_backward_op.register_fake
def _(grad_out, grad_loss, query, key, value, sinks, *_):
    grads = (t.new_empty(t.shape) for t in (query, key, value))
    return (*grads, query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape))


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    *ctx.options, needs_grad = inputs[10:]
    out, lse, _, label_mass, correct_mass, is_induction, *residuals = output
    ctx.mark_non_differentiable(lse, label_mass, correct_mass, is_induction, *residuals)
    if needs_grad:
        ctx.save_for_backward(*inputs[:10], out, lse, is_induction, *residuals)


def _backward(ctx, grad_out, _, grad_loss, *__):
    saved = ctx.saved_tensors
    *grads, grad_sinks = _backward_op(grad_out, grad_loss, *saved, *ctx.options)
    if grad_out is None:  # nothing else depends on the values: no product with zeros follows
        grads[2] = None
    return (*grads, None if saved[3] is None else grad_sinks, *[None] * 14)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def flash_attention_with_last_row_loss(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    label_positions: Tensor,
    label_offsets: Tensor,
    label_is_correct: Tensor,
    *,
    longest: int | None = None,
    penalty: float | Tensor,
    reward: float | Tensor,
    scale: float | None = None,
    head_filter: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    attention: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, LastRowLoss]:
    """Causal attention of packed prompts, and the attention-behavior loss of their last rows.

    Args:
        q: (T, Hq, D), R prompts laid end to end.
        k: (T, Hkv, D), same dtype; Hq is a multiple of Hkv.
        v: (T, Hkv, D).
        cu_seqlens: (R + 1,) int32, from 0 to T; prompt r is `cu_seqlens[r]:cu_seqlens[r + 1]`.
        label_positions: (M,) int32, absolute indices into `k`.
        label_offsets: (R + 1,) int32; prompt r owns `label_positions[offsets[r]:offsets[r + 1]]`.
        label_is_correct: (M,) bool, whether the label is the query's own.
        longest: tokens of the longest prompt, or more; None waits for the device to count them.
        penalty, reward, scale, head_filter, softcap, sinks: as in `last_row_loss`.
        window: a row sees its last `window` keys only, its own among them.
        dropout: probability of dropping an attention weight; the loss sees the weights before.
        attention: see `choose_attention`.
        backend: of the loss, as in `last_row_loss`.

    Returns:
        (T, Hq, D) attention output, and LastRowLoss of four (R, Hq) tensors. Both carry gradients
        to q, k, v and sinks.

    Raises:
        ValueError: an argument is malformed; the message names it.
    """
    if (cu_seqlens.ndim, cu_seqlens.dtype, cu_seqlens.device) != (1, torch.int32, q.device):
        raise ValueError(
            f"cu_seqlens must be (R + 1,) torch.int32 on {q.device}, not "
            f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}"
        )
    rows = _rows(cu_seqlens, label_positions, label_offsets, label_is_correct)
    check_tensors(q, k, len(cu_seqlens) - 1, rows, sinks)
    check_options(penalty, reward, scale, softcap, window)
    if (v.shape, v.dtype, v.device) != (k.shape, k.dtype, k.device):
        raise ValueError(
            f"v must be like k, {tuple(k.shape)} {k.dtype} on {k.device}, "
            f"not {tuple(v.shape)} {v.dtype} on {v.device}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen, _ = choose_attention(q, softcap=softcap, dropout=dropout, requested=attention)
    if chosen == "separate":
        check_bounds(cu_seqlens.tolist(), len(q))
        result = last_row_loss(
            q[cu_seqlens[1:].long() - 1], k, *rows, penalty=penalty, reward=reward, scale=scale,
            head_filter=head_filter, softcap=softcap, window=window, sinks=sinks, backend=backend,
        )  # fmt: skip
        scores = Scores(scale, softcap, window)
        return attend_separately(q, k, v, cu_seqlens, scores, sinks, dropout), result
    out, _, *result = _forward_op(
        q,
        k,
        v,
        sinks,
        cu_seqlens,
        label_positions,
        label_offsets,
        label_is_correct,
        scalar_like(penalty, q),
        scalar_like(reward, q),
        int(cu_seqlens.diff().max()) if longest is None else longest,
        scale,
        None if softcap is None else float(softcap),
        window,
        head_filter,
        chosen,
        choose_backend(q, backend),
        wants_gradient(q, k, v, sinks),
    )
    return out, LastRowLoss(*result[:4])
