"""Compute attention of packed prompts, and the loss of their last rows, in one op.

Flash attention returns each row's log-sum-exp, so a last row's probabilities at its label tokens
need the label keys alone: `alpha_i = exp(s_i - lse)`. The backward reads the keys of heads that
have a loss, once, and adds to the gradients that flash attention wrote. The op has one explicit
backward, because flash attention has no gradient through its log-sum-exp.

For float32 the loss computes a normalizer of its own. The log-sum-exp, one float32 number, is off
by 1e-6, which matters in `1 - alpha` of a head that is sure of its label.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from abft_kernels.attention.registry import (
    attention_backward,
    attention_forward,
    choose_attention,
)
from abft_kernels.attention.separate import attend_separately
from abft_kernels.checks import bounds_on_host, check_bounds, check_options, check_tensors
from abft_kernels.loss import (
    add_loss_gradients,
    choose_backend,
    label_factors,
    last_row_loss,
    loss_forward,
    loss_grad_sinks,
    scalar_like,
    wants_gradient,
)
from abft_kernels.types import (
    LabelLoss,
    LastRowLoss,
    Normalizer,
    Prompts,
    Rows,
    Scores,
    none_but,
    pick,
)


class _Inputs(NamedTuple):
    """The arguments of the op `abft::flash_attention_with_last_row_loss`, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    cu_seqlens: Tensor
    label_positions: Tensor
    label_offsets: Tensor
    label_is_correct: Tensor
    penalty: Tensor
    reward: Tensor
    longest: int
    scale: float
    softcap: float | None
    window: int | None
    head_filter: bool
    attention: str
    backend: str
    needs_grad: bool
    hold: Tensor | None = None


class _Outputs(NamedTuple):
    """The results of the op, in its order: attention, then a LabelLoss."""

    out: Tensor
    lse: Tensor
    loss: Tensor
    label_mass: Tensor
    correct_mass: Tensor
    is_induction: Tensor
    peak: Tensor
    total: Tensor
    mean_weight: Tensor
    head_factors: Tensor


class _Saved(NamedTuple):
    """The tensors that the backward needs, named as in _Inputs and _Outputs."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor | None
    cu_seqlens: Tensor
    label_positions: Tensor
    label_offsets: Tensor
    label_is_correct: Tensor
    penalty: Tensor
    reward: Tensor
    out: Tensor
    lse: Tensor
    is_induction: Tensor
    peak: Tensor
    total: Tensor
    mean_weight: Tensor
    head_factors: Tensor


class _Options(NamedTuple):
    """The other values that the backward needs, named as in _Inputs."""

    longest: int
    scale: float
    softcap: float | None
    window: int | None
    head_filter: bool
    attention: str
    backend: str


class _Gradients(NamedTuple):
    """The results of the backward's op, in its order; sinks is (0,) unless sinks learn."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor


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
    hold: Tensor | None = None,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    if cu_seqlens.device.type == "cpu":
        check_bounds(cu_seqlens.tolist(), len(query))
    prompts, scores = Prompts(cu_seqlens, longest), Scores(scale, softcap, window)
    out, lse = attention_forward(attention, query, key, value, sinks, prompts, scores)
    result = loss_forward(
        backend,
        query,
        key,
        _rows(cu_seqlens, label_positions, label_offsets, label_is_correct),
        scores,
        sinks,
        penalty,
        reward,
        head_filter,
        hold,
        lse.T if _uses_lse(query, softcap) else None,
        packed=True,
    )
    return (out.contiguous(), lse, *result)


def _uses_lse(query: Tensor, softcap: float | None) -> bool:
    """Return whether attention's log-sum-exp is the loss's normalizer.

    flash-attn approximates the tanh of a soft-cap, so its log-sum-exp is not that of our scores.
    """
    return query.element_size() == 2 and softcap is None


def _rows(
    cu_seqlens: Tensor, label_positions: Tensor, label_offsets: Tensor, label_is_correct: Tensor
) -> Rows:
    """Return the last rows of prompts: each sees all keys of its prompt."""
    return Rows(cu_seqlens[:-1], cu_seqlens[1:], label_positions, label_offsets, label_is_correct)


@_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*arguments)
    query = inputs.query
    tokens, heads, _ = query.shape
    lse = query.new_empty(heads, tokens, dtype=torch.promote_types(query.dtype, torch.float32))
    known, share = _uses_lse(query, inputs.softcap), inputs.hold is not None
    result = LabelLoss.empty(query, inputs.cu_seqlens.shape[0] - 1, known, share)
    return (query.new_empty(query.shape), lse, *result)


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
    head_factors: Tensor,
    longest: int,
    scale: float,
    softcap: float | None,
    window: int | None,
    head_filter: bool,
    attention: str,
    backend: str,
    sinks_learn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    prompts, scores = Prompts(cu_seqlens, longest), Scores(scale, softcap, window)
    learning = sinks if sinks_learn else None
    if grad_out is None:  # nothing uses the output, as in the last layer
        grads = [t.new_zeros(t.shape) for t in (query, key, value)]
        grad_sinks = None if learning is None else learning.new_zeros(learning.shape)
    else:
        *grads, grad_sinks = attention_backward(
            attention, grad_out, query, key, value, learning, out, lse, prompts, scores
        )
    grad_query, grad_key, grad_value = (grad.contiguous() for grad in grads)
    if grad_loss is not None and len(label_positions):
        rows = _rows(cu_seqlens, label_positions, label_offsets, label_is_correct)
        normalizer = Normalizer(peak, total)
        if _uses_lse(query, softcap):
            normalizer = Normalizer(lse.T, None)
        add_loss_gradients(
            backend,
            grad_query,
            grad_key,
            query,
            key,
            rows,
            scores,
            normalizer,
            mean_weight,
            is_induction,
            grad_loss,
            *label_factors(penalty, reward, head_factors),
            head_filter,
            packed=True,
            longest=longest,
        )
        if learning is not None and grad_sinks is not None:
            grad_sinks += loss_grad_sinks(
                learning, rows, normalizer, mean_weight, is_induction, grad_loss, head_filter
            )
    if grad_sinks is None:
        grad_sinks = query.new_empty(0)
    return grad_query, grad_key, grad_value, grad_sinks


@_backward_op.register_fake
def _(
    grad_out: Tensor | None, grad_loss: Tensor | None, *saved_and_options: Any
) -> tuple[Tensor, ...]:
    query, key, value, sinks, *_, sinks_learn = saved_and_options
    grads = (t.new_empty(t.shape) for t in (query, key, value))
    return (*grads, sinks.new_empty(sinks.shape) if sinks_learn else query.new_empty(0))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    inputs, outputs = _Inputs(*inputs), _Outputs(*output)
    ctx.options = pick(_Options, inputs)
    differentiable = ("out", "loss")
    ctx.mark_non_differentiable(
        *(t for name, t in outputs._asdict().items() if name not in differentiable)
    )
    if inputs.needs_grad:
        ctx.save_for_backward(*pick(_Saved, inputs, outputs))


def _backward(ctx: Any, *grads: Tensor | None) -> _Inputs:
    grads, saved = _Outputs._make(grads), _Saved(*ctx.saved_tensors)
    sinks_learn = saved.sinks is not None and _Inputs(*ctx.needs_input_grad).sinks
    gradients = _Gradients(
        *_backward_op(
            grads.out,
            grads.loss,
            **saved._asdict(),
            **ctx.options._asdict(),
            sinks_learn=sinks_learn,
        )
    )
    return none_but(
        _Inputs,
        query=gradients.query,
        key=gradients.key,
        # Without the output the loss alone is differentiated, and it does not depend on values.
        value=None if grads.out is None else gradients.value,
        sinks=gradients.sinks if sinks_learn else None,
    )


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
    bounds: list[int] | None = None,
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
    objective: str = "mass",
    hold: float | Tensor = 0.0,
) -> tuple[Tensor, LastRowLoss]:
    """Compute causal attention of packed prompts, and the loss of their last rows.

    Args:
        q: (T, Hq, D), R prompts laid end to end.
        k: (T, Hkv, D), same dtype; Hq is a multiple of Hkv.
        v: (T, Hkv, D).
        cu_seqlens: (R + 1,) int32, from 0 to T; prompt r is `cu_seqlens[r]:cu_seqlens[r + 1]`.
        label_positions: (M,) int32, absolute indices into `k`.
        label_offsets: (R + 1,) int32; prompt r owns `label_positions[offsets[r]:offsets[r + 1]]`.
        label_is_correct: (M,) bool, whether the label is the query's own.
        longest: tokens of the longest prompt, or more; None waits for the device to count them.
        bounds: `cu_seqlens` as numbers. Without them, `"separate"` waits for the device.
        penalty: as in `last_row_loss`.
        reward: as in `last_row_loss`.
        scale: as in `last_row_loss`.
        head_filter: as in `last_row_loss`.
        softcap: as in `last_row_loss`.
        window: a row sees its last `window` keys only, its own among them.
        sinks: as in `last_row_loss`.
        dropout: probability of dropping an attention weight; the loss uses the undropped weights.
        attention: see `choose_attention`.
        backend: of the loss, as in `last_row_loss`.
        objective: as in `last_row_loss`.
        hold: as in `last_row_loss`.

    Returns:
        The attention output, (T, Hq, D), and a LastRowLoss of four (R, Hq) tensors. The gradients
        of both reach q, k, v and sinks.

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
    check_options(penalty, reward, scale, softcap, window, objective, hold)
    if (v.shape, v.dtype, v.device) != (k.shape, k.dtype, k.device):
        raise ValueError(
            f"v must be like k, {tuple(k.shape)} {k.dtype} on {k.device}, "
            f"not {tuple(v.shape)} {v.dtype} on {v.device}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    chosen, _ = choose_attention(q, softcap=softcap, dropout=dropout, requested=attention)
    if chosen == "separate":
        bounds = bounds_on_host(cu_seqlens, bounds)
        check_bounds(bounds, len(q))
        result = last_row_loss(
            q[cu_seqlens[1:].long() - 1], k, *rows, penalty=penalty, reward=reward, scale=scale,
            head_filter=head_filter, softcap=softcap, window=window, sinks=sinks, backend=backend,
            objective=objective, hold=hold,
        )  # fmt: skip
        scores = Scores(scale, softcap, window)
        return attend_separately(q, k, v, bounds, scores, sinks, dropout), result
    results = _forward_op(
        q,
        k,
        v,
        sinks,
        cu_seqlens,
        label_positions,
        label_offsets,
        label_is_correct,
        penalty=scalar_like(penalty, q),
        reward=scalar_like(reward, q),
        longest=int(cu_seqlens.diff().max()) if longest is None else longest,
        scale=scale,
        softcap=None if softcap is None else float(softcap),
        window=window,
        head_filter=head_filter,
        attention=chosen,
        backend=choose_backend(q, backend),
        needs_grad=wants_gradient(q, k, v, sinks),
        hold=scalar_like(hold, q) if objective == "share" else None,
    )
    outputs = _Outputs(*results)
    return outputs.out, pick(LastRowLoss, outputs)
