"""Compute the loss on the last row of attention, and its gradient in closed form.

Source: Cho et al. 2025, "Mechanistic Fine-tuning for In-context Learning", section 3. With
alpha = softmax(s), g = penalty on wrong labels, -reward on correct ones, 0 elsewhere, and
G = sum_j alpha_j g_j, the gradient of one head's loss is ds_j = alpha_j (g_j - G). The objective
`share`, ours, has a penalty and a reward of its own for each row and head. So
dq = scale sum_j ds_j k_j and dk_j = scale ds_j q. The forward needs the label keys alone once the
normalizer is known. The backward reads the keys of heads that have a loss, once, for both.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abft_kernels import loss_torch
from abft_kernels.checks import check_options, check_tensors, check_values
from abft_kernels.types import LabelLoss, LastRowLoss, Normalizer, Rows, Scores, none_but, pick

BACKENDS = ("auto", "triton", "torch")
_TRITON = importlib.util.find_spec("triton") is not None


def choose_backend(query: Tensor, requested: str = "auto") -> str:
    """Choose what computes the loss of these queries: `"triton"` or `"torch"`.

    Raises:
        ValueError: the requested one is unknown or cannot run here.
    """
    if requested not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {requested!r}")
    if requested == "torch":
        return "torch"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reason = f"its arithmetic is float32, query is {query.dtype}"
    elif not _TRITON:
        reason = "the package triton is not installed"
    elif query.is_cuda or (requested == "triton" and _backend("triton").INTERPRETED):
        return "triton"
    else:
        reason = f"query is on the {query.device.type}, where only TRITON_INTERPRET=1 runs kernels"
    if requested == "triton":
        raise ValueError(f"backend 'triton' cannot run: {reason}")
    return "torch"


def _backend(name: str) -> ModuleType:
    if name == "torch":
        return loss_torch
    from abft_kernels import loss_triton  # only where Triton is: on Linux

    return loss_triton


def loss_forward(
    backend: str,
    query: Tensor,
    key: Tensor,
    rows: Rows,
    scores: Scores,
    sinks: Tensor | None,
    penalty: Tensor,
    reward: Tensor,
    head_filter: bool,
    hold: Tensor | None = None,
    lse: Tensor | None = None,
    packed: bool = False,
) -> LabelLoss:
    """Compute the losses of all rows, of queries (R, Hq, D).

    Packed queries are (T, Hq, D), each row's at its last key, and no two rows share a key. With
    their log-sum-exp `lse`, (T, Hq), only label keys are read. With `hold` the objective is
    `share`, else `mass`.
    """
    if backend == "torch" or query.device.type == "cpu":
        check_values(key.shape[0], rows)
    if len(rows.label_positions) == 0:
        return _without_labels(query, rows, lse is not None, hold is not None)
    rows = Rows(*(index.contiguous() for index in rows))
    sinks = None if sinks is None else sinks.contiguous()
    with torch.autocast(query.device.type, enabled=False):  # it would round scores
        return _backend(backend).label_loss(
            query, key, rows, scores, sinks, lse, penalty, reward,
            head_filter=head_filter, hold=hold, packed=packed,
        )  # fmt: skip


def _without_labels(query: Tensor, rows: Rows, known: bool, share: bool) -> LabelLoss:
    """Return losses of 0 without reading a key; an infinite peak makes every alpha 0."""
    result = LabelLoss.empty(query, len(rows.key_start), known, share)
    for tensor in result:
        tensor.zero_()
    result.peak.fill_(torch.inf)
    result.total.fill_(1)
    return result


def label_factors(penalty: Tensor, reward: Tensor, head_factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the penalty and the reward of a backward: of all heads, or (R, Hq) of each."""
    if head_factors.numel():
        return head_factors[0], head_factors[1]
    return penalty, reward


def add_loss_gradients(
    backend: str,
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
    head_filter: bool,
    packed: bool,
    longest: int,
) -> None:
    """Add the gradients of `loss_forward`'s queries and keys in place.

    No row sees more than `longest` keys.
    """
    rows = Rows(*(index.contiguous() for index in rows))
    with torch.autocast(query.device.type, enabled=False):
        _backend(backend).add_gradients(
            grad_query, grad_key, query, key, rows, scores, normalizer, mean_weight, is_induction,
            grad_loss, penalty, reward, head_filter=head_filter, packed=packed, longest=longest,
        )  # fmt: skip


def loss_grad_sinks(
    sinks: Tensor,
    rows: Rows,
    normalizer: Normalizer,
    mean_weight: Tensor,
    is_induction: Tensor,
    grad_loss: Tensor,
    head_filter: bool,
) -> Tensor:
    """Compute the gradient of the sinks, (Hq,); a sink acts as a key that is no label."""
    peak, total = loss_torch.of_last_rows(normalizer, rows)
    alpha = torch.exp(sinks.to(peak.dtype) - peak) / total
    incoming = loss_torch.incoming_gradient(grad_loss, is_induction, head_filter)
    return -(incoming * alpha * mean_weight).sum(dim=0).to(sinks.dtype)


class _Inputs(NamedTuple):
    """The arguments of the op `abft::last_row_loss`, in its order."""

    query: Tensor
    key: Tensor
    sinks: Tensor | None
    key_start: Tensor
    key_end: Tensor
    label_positions: Tensor
    label_offsets: Tensor
    label_is_correct: Tensor
    penalty: Tensor
    reward: Tensor
    scale: float
    softcap: float | None
    window: int | None
    head_filter: bool
    backend: str
    needs_grad: bool
    hold: Tensor | None = None


class _Saved(NamedTuple):
    """The tensors that the backward needs, named as in _Inputs and LabelLoss."""

    query: Tensor
    key: Tensor
    sinks: Tensor | None
    key_start: Tensor
    key_end: Tensor
    label_positions: Tensor
    label_offsets: Tensor
    label_is_correct: Tensor
    penalty: Tensor
    reward: Tensor
    is_induction: Tensor
    peak: Tensor
    total: Tensor
    mean_weight: Tensor
    head_factors: Tensor


@torch.library.custom_op("abft::last_row_loss", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    sinks: Tensor | None,
    key_start: Tensor,
    key_end: Tensor,
    label_positions: Tensor,
    label_offsets: Tensor,
    label_is_correct: Tensor,
    penalty: Tensor,
    reward: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    head_filter: bool,
    backend: str,
    needs_grad: bool,
    hold: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = Rows(key_start, key_end, label_positions, label_offsets, label_is_correct)
    return loss_forward(
        backend, query, key, rows, Scores(scale, softcap, window), sinks,
        penalty, reward, head_filter, hold,
    )  # fmt: skip


@_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*arguments)
    return LabelLoss.empty(inputs.query, len(inputs.query), False, inputs.hold is not None)


@torch.library.custom_op("abft::last_row_loss_backward", mutates_args=())
def _backward_op(
    grad_loss: Tensor,
    query: Tensor,
    key: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    label_positions: Tensor,
    label_offsets: Tensor,
    label_is_correct: Tensor,
    is_induction: Tensor,
    peak: Tensor,
    total: Tensor,
    mean_weight: Tensor,
    penalty: Tensor,
    reward: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    head_filter: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = Rows(key_start, key_end, label_positions, label_offsets, label_is_correct)
    grad_query, grad_key = query.new_zeros(query.shape), key.new_zeros(key.shape)
    if len(label_positions):
        add_loss_gradients(
            backend, grad_query, grad_key, query, key, rows, Scores(scale, softcap, window),
            Normalizer(peak, total), mean_weight, is_induction, grad_loss, penalty, reward,
            head_filter, packed=False, longest=len(key),
        )  # fmt: skip
    return grad_query, grad_key


@_backward_op.register_fake
def _(grad_loss: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    inputs, outputs = _Inputs(*inputs), LabelLoss(*output)
    ctx.mark_non_differentiable(*(t for name, t in outputs._asdict().items() if name != "loss"))
    ctx.scores = pick(Scores, inputs)
    ctx.head_filter, ctx.backend = inputs.head_filter, inputs.backend
    if inputs.needs_grad:
        ctx.save_for_backward(*pick(_Saved, inputs, outputs))


def _backward(ctx: Any, *grads: Tensor) -> _Inputs:
    grad_loss = LabelLoss(*grads).loss
    saved = _Saved(*ctx.saved_tensors)
    needs_grad = _Inputs(*ctx.needs_input_grad)
    rows = pick(Rows, saved)
    grad_query = grad_key = grad_sinks = None
    if needs_grad.query or needs_grad.key:
        grad_query, grad_key = _backward_op(
            grad_loss,
            saved.query,
            saved.key,
            *rows,
            saved.is_induction,
            saved.peak,
            saved.total,
            saved.mean_weight,
            *label_factors(saved.penalty, saved.reward, saved.head_factors),
            *ctx.scores,
            ctx.head_filter,
            ctx.backend,
        )
    if needs_grad.sinks and saved.sinks is not None:
        grad_sinks = loss_grad_sinks(
            saved.sinks, rows, Normalizer(saved.peak, saved.total), saved.mean_weight,
            saved.is_induction, grad_loss, ctx.head_filter,
        )  # fmt: skip
    return none_but(_Inputs, query=grad_query, key=grad_key, sinks=grad_sinks)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def last_row_loss(
    query: Tensor,
    key: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    label_positions: Tensor,
    label_offsets: Tensor,
    label_is_correct: Tensor,
    *,
    penalty: float | Tensor,
    reward: float | Tensor,
    scale: float | None = None,
    head_filter: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
    objective: str = "mass",
    hold: float | Tensor = 0.0,
) -> LastRowLoss:
    """Compute the attention-behavior loss of one attention layer (paper, equation 1).

    A head of row r pays attention `alpha = softmax(scale * query @ key.T)` to the keys
    `key_start[r] <= j < key_end[r]`, n of them, k of which are label tokens. With S the attention
    on all labels, the head is an induction head when `S > k / (k + ln n)`. Its loss is then
    `penalty * sum(alpha of wrong labels) + reward * sum(1 - alpha of correct labels)`, else 0.

    With `objective="share"` (ours) the loss is `1 - C / S + hold * ln S`, C the attention on
    correct labels. Without `hold`, more or less attention on all labels together changes nothing.
    A row that sees labels of one kind alone has loss 0 in this objective.

    Args:
        query: (R, Hq, D), one query row a prompt, already rotated and normalized.
        key: (T, Hkv, D), packed keys, same dtype; Hq is a multiple of Hkv.
        key_start: (R,) int32, first key the row sees.
        key_end: (R,) int32, one past the last key the row sees.
        label_positions: (M,) int32, absolute indices into `key`.
        label_offsets: (R + 1,) int32; row r owns `label_positions[offsets[r]:offsets[r + 1]]`.
        label_is_correct: (M,) bool, whether the label is the query's own.
        penalty: A in the paper, >= 0; a float or a 0-d tensor.
        reward: B in the paper, >= 0; a float or a 0-d tensor.
        scale: factor on the scores; None is `D ** -0.5`.
        head_filter: False gives every head its loss.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        window: the row sees its last `window` keys only; n stays the prompt's length.
        sinks: (Hq,) logits that take part in the softmax and are dropped afterwards (GPT-OSS).
        backend: `"triton"` (a GPU; arithmetic in float32), `"torch"` (anything), or `"auto"`.
        objective: `"mass"`, equation 1, or `"share"`, which does not use penalty and reward.
        hold: factor of ln S in `"share"`, of either sign; a float or a 0-d tensor.

    Returns:
        LastRowLoss of four (R, Hq) tensors. A row without labels has loss 0. The gradient reaches
        query, key and sinks; none passes through the filter. With Triton on a GPU nothing waits
        for the device, so an index outside its bounds makes the row's loss NaN.

    Raises:
        ValueError: an argument is malformed; the message names it.
    """
    rows = Rows(key_start, key_end, label_positions, label_offsets, label_is_correct)
    check_tensors(query, key, query.shape[0] if query.ndim else 0, rows, sinks)
    check_options(penalty, reward, scale, softcap, window, objective, hold)
    results = _forward_op(
        query,
        key,
        sinks,
        *rows,
        penalty=scalar_like(penalty, query),
        reward=scalar_like(reward, query),
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        window=window,
        head_filter=head_filter,
        backend=choose_backend(query, backend),
        needs_grad=wants_gradient(query, key, sinks),
        hold=scalar_like(hold, query) if objective == "share" else None,
    )
    return pick(LastRowLoss, LabelLoss(*results))


def scalar_like(value: float | Tensor, query: Tensor) -> Tensor:
    """Make a 0-d tensor on query's device; the host does not wait for the device."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if isinstance(value, Tensor) and value.device == query.device:
        return value.detach().to(dtype)
    return torch.full((), float(value), dtype=dtype, device=query.device)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether a backward may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
