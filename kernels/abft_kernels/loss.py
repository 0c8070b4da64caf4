"""Compute the loss on the last row of attention, and its gradient in closed form.

Source: Cho et al. 2025, "Mechanistic Fine-tuning for In-context Learning", section 3. With
alpha = softmax(s), g = penalty on wrong labels, -reward on correct ones, 0 elsewhere, and
G = sum_j alpha_j g_j, the gradient of one head's loss is ds_j = alpha_j (g_j - G). The objective
`share`, ours, has a penalty and a reward of its own for each row and head. So
dq = scale (sum_j alpha_j g_j k_j - G sum_j alpha_j k_j). The forward finds both sums in its one
pass over the keys. The backward only writes dk_j = scale ds_j q, for heads that have a loss.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abft_kernels import loss_torch
from abft_kernels.checks import check_options, check_tensors, check_values
from abft_kernels.types import LastRowLoss, Normalizer, Residuals, Rows, Scores, none_but, pick

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
    needs_grad: bool,
    normalizer: Normalizer | None = None,
    hold: Tensor | None = None,
) -> tuple[LastRowLoss, Residuals]:
    """Compute the losses of all rows.

    If the caller knows the normalizer, only key heads with a loss have all their keys read, and
    only for a gradient. With `hold` the objective is `share`, else `mass`.
    """
    if backend == "torch" or query.device.type == "cpu":
        check_values(key.shape[0], rows)
    if len(rows.label_positions) == 0:
        return _without_labels(query, needs_grad, hold is not None)
    compute = _backend(backend)
    rows = Rows(*(index.contiguous() for index in rows))
    sinks = None if sinks is None else sinks.contiguous()
    with torch.autocast(query.device.type, enabled=False):  # it would round scores
        mean_key = None
        if normalizer is None:
            normalizer, mean_key = compute.scan_keys(
                query, key, rows, scores, sinks, sum_keys=needs_grad
            )
        labels = compute.label_loss(
            query, key, rows, scores, normalizer, penalty, reward,
            head_filter=head_filter, sum_keys=needs_grad, hold=hold,
        )  # fmt: skip
        result = pick(LastRowLoss, labels)
        residuals = Residuals(
            normalizer.peak,
            normalizer.total,
            labels.mean_weight,
            labels.label_key,
            labels.head_factors,
        )
        if not needs_grad:
            return result, residuals
        if mean_key is None:
            active = labels.is_induction if head_filter else torch.ones_like(labels.is_induction)
            _, mean_key = compute.scan_keys(
                query, key, rows, scores, sinks, active=active, sum_keys=True
            )
        key_sum = torch.addcmul(labels.label_key, labels.mean_weight[..., None], mean_key, value=-1)
    return result, residuals._replace(key_sum=key_sum)


def _without_labels(query: Tensor, needs_grad: bool, share: bool) -> tuple[LastRowLoss, Residuals]:
    """Return losses of 0 without reading a key; an infinite peak makes every alpha 0."""
    result, residuals = empty_results(query, needs_grad, share)
    for tensor in (*result, *residuals):
        tensor.zero_()
    residuals.peak.fill_(torch.inf)
    residuals.total.fill_(1)
    return result, residuals


def empty_results(query: Tensor, needs_grad: bool, share: bool) -> tuple[LastRowLoss, Residuals]:
    """Allocate what `loss_forward` returns for (R, Hq, D) queries."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    loss, label_mass, correct_mass, peak, total, mean_weight = (
        query.new_empty(query.shape[:2], dtype=dtype) for _ in range(6)
    )
    is_induction = query.new_empty(query.shape[:2], dtype=torch.bool)
    key_sum = query.new_empty(query.shape if needs_grad else 0, dtype=dtype)
    result = LastRowLoss(loss, label_mass, correct_mass, is_induction)
    head_factors = query.new_empty((2, *query.shape[:2]) if share else 0, dtype=dtype)
    return result, Residuals(peak, total, mean_weight, key_sum, head_factors)


def label_factors(penalty: Tensor, reward: Tensor, head_factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the penalty and the reward of a backward: of all heads, or (R, Hq) of each."""
    if head_factors.numel():
        return head_factors[0], head_factors[1]
    return penalty, reward


def loss_coefficient(
    grad_loss: Tensor, is_induction: Tensor, head_filter: bool, scores: Scores
) -> Tensor:
    """Return the incoming gradient times the scale, (R, Hq); 0 for heads the filter leaves out."""
    coefficient = grad_loss * scores.scale
    return torch.where(is_induction, coefficient, 0.0) if head_filter else coefficient


def loss_grad_key(
    backend: str,
    query: Tensor,
    key: Tensor,
    rows: Rows,
    scores: Scores,
    normalizer: Normalizer,
    mean_weight: Tensor,
    coefficient: Tensor,
    penalty: Tensor,
    reward: Tensor,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of the keys, (T, Hkv, D), or add it in place to `accumulate_into`."""
    rows = Rows(*(index.contiguous() for index in rows))
    with torch.autocast(query.device.type, enabled=False):
        return _backend(backend).grad_key(
            query, key, rows, scores, normalizer, mean_weight, coefficient, penalty, reward,
            accumulate_into=accumulate_into,
        )  # fmt: skip


def loss_grad_sinks(
    sinks: Tensor, coefficient: Tensor, residuals: Residuals, scores: Scores
) -> Tensor:
    """Compute the gradient of the sinks, (Hq,); a sink acts as a key that is no label."""
    alpha = torch.exp(sinks.to(residuals.peak.dtype) - residuals.peak) / residuals.total
    grad = -(coefficient / scores.scale * alpha * residuals.mean_weight).sum(dim=0)
    return grad.to(sinks.dtype)


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


class _Outputs(NamedTuple):
    """The results of the op, in its order: a LastRowLoss, then Residuals."""

    loss: Tensor
    label_mass: Tensor
    correct_mass: Tensor
    is_induction: Tensor
    peak: Tensor
    total: Tensor
    mean_weight: Tensor
    key_sum: Tensor
    head_factors: Tensor


class _Saved(NamedTuple):
    """The tensors that the backward needs, named as in _Inputs and _Outputs."""

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
    key_sum: Tensor
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = Rows(key_start, key_end, label_positions, label_offsets, label_is_correct)
    result, residuals = loss_forward(
        backend, query, key, rows, Scores(scale, softcap, window), sinks,
        penalty, reward, head_filter, needs_grad, hold=hold,
    )  # fmt: skip
    return (*result, *residuals)


@_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*arguments)
    share = inputs.hold is not None
    result, residuals = empty_results(inputs.query, inputs.needs_grad, share)
    return (*result, *residuals)


@torch.library.custom_op("abft::last_row_loss_grad_key", mutates_args=())
def _grad_key_op(
    query: Tensor,
    key: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    label_positions: Tensor,
    label_offsets: Tensor,
    label_is_correct: Tensor,
    peak: Tensor,
    total: Tensor,
    mean_weight: Tensor,
    coefficient: Tensor,
    penalty: Tensor,
    reward: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    backend: str,
) -> Tensor:
    rows = Rows(key_start, key_end, label_positions, label_offsets, label_is_correct)
    return loss_grad_key(
        backend, query, key, rows, Scores(scale, softcap, window),
        Normalizer(peak, total), mean_weight, coefficient, penalty, reward,
    )  # fmt: skip


@_grad_key_op.register_fake
def _(query: Tensor, key: Tensor, *_: Any) -> Tensor:
    return key.new_empty(key.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    inputs, outputs = _Inputs(*inputs), _Outputs(*output)
    ctx.mark_non_differentiable(*(t for name, t in outputs._asdict().items() if name != "loss"))
    ctx.scores = pick(Scores, inputs)
    ctx.head_filter, ctx.backend = inputs.head_filter, inputs.backend
    if inputs.needs_grad:
        ctx.save_for_backward(*pick(_Saved, inputs, outputs))


def _backward(ctx: Any, *grads: Tensor) -> _Inputs:
    grad_loss = _Outputs(*grads).loss
    saved = _Saved(*ctx.saved_tensors)
    needs_grad = _Inputs(*ctx.needs_input_grad)
    coefficient = loss_coefficient(grad_loss, saved.is_induction, ctx.head_filter, ctx.scores)
    grad_query = grad_key = grad_sinks = None
    if needs_grad.query:
        grad_query = (coefficient[..., None] * saved.key_sum).to(saved.query.dtype)
    if needs_grad.key:
        grad_key = _grad_key_op(
            saved.query,
            saved.key,
            *pick(Rows, saved),
            saved.peak,
            saved.total,
            saved.mean_weight,
            coefficient,
            *label_factors(saved.penalty, saved.reward, saved.head_factors),
            *ctx.scores,
            ctx.backend,
        )
    if needs_grad.sinks and saved.sinks is not None:
        residuals = pick(Residuals, saved)
        grad_sinks = loss_grad_sinks(saved.sinks, coefficient, residuals, ctx.scores)
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
        query, key and sinks; none passes through the filter. On a GPU nothing waits for the
        device, so an index outside its bounds makes the row's loss NaN.

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
    return pick(LastRowLoss, _Outputs(*results))


def scalar_like(value: float | Tensor, query: Tensor) -> Tensor:
    """Make a 0-d tensor on query's device; the host does not wait for the device."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if isinstance(value, Tensor) and value.device == query.device:
        return value.detach().to(dtype)
    return torch.full((), float(value), dtype=dtype, device=query.device)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether a backward may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
