"""Loss on the last row of attention, with its gradient in closed form.

Source: Cho et al. 2025, "Mechanistic Fine-tuning for In-context Learning", section 3. With
alpha = softmax(s), g = penalty on wrong labels, -reward on right ones, 0 elsewhere, and
G = sum_j alpha_j g_j, the gradient of one head's loss is ds_j = alpha_j (g_j - G). So
dq = scale (sum_j alpha_j g_j k_j - G sum_j alpha_j k_j), both sums from the forward's one pass over
the keys, and the backward only writes dk_j = scale ds_j q, for heads that have a loss.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from abft_kernels import loss_torch
from abft_kernels.checks import check_options, check_tensors, check_values
from abft_kernels.types import LabelLoss, LastRowLoss, Normalizer, Residuals, Rows, Scores

BACKENDS = ("auto", "triton", "torch")
_TRITON = importlib.util.find_spec("triton") is not None


def choose_backend(query: Tensor, requested: str = "auto") -> str:
    """`"triton"` or `"torch"`, whichever is to compute the loss of these queries.

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
    from abft_kernels import loss_triton  # exists on Linux alone

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
) -> tuple[LabelLoss, Residuals]:
    """All rows' losses. Given their normalizers, only heads with a loss have their keys read."""
    if backend == "torch" or query.device.type == "cpu":
        check_values(key.shape[0], rows)
    if len(rows.label_positions) == 0:
        return _without_labels(query, needs_grad)
    compute = _backend(backend)
    rows = Rows(*(index.contiguous() for index in rows))
    sinks = None if sinks is None else sinks.contiguous()
    with torch.autocast(query.device.type, enabled=False):  # it would round scores
        known = normalizer is not None
        if not known:
            normalizer, mean_key = compute.scan_keys(
                query, key, rows, scores, sinks, sum_keys=needs_grad
            )
        found = compute.label_loss(
            query, key, rows, scores, normalizer, penalty, reward,
            head_filter=head_filter, sum_keys=needs_grad,
        )  # fmt: skip
        if not needs_grad:
            return found, Residuals(*normalizer, found.mean_weight, found.label_key)
        if known:
            active = found.is_induction if head_filter else torch.ones_like(found.is_induction)
            _, mean_key = compute.scan_keys(
                query, key, rows, scores, sinks, active=active, sum_keys=True
            )
        key_sum = torch.addcmul(found.label_key, found.mean_weight[..., None], mean_key, value=-1)
    return found, Residuals(*normalizer, found.mean_weight, key_sum)


def _without_labels(query: Tensor, needs_grad: bool) -> tuple[LabelLoss, Residuals]:
    """Losses of 0, no key read; the largest score is infinite, so that every alpha is 0."""
    loss, *masses, is_induction, peak, total, mean_weight, key_sum = (
        t.zero_() for t in fake_loss(query, needs_grad)
    )
    residuals = Residuals(peak.fill_(torch.inf), total.fill_(1), mean_weight, key_sum)
    return LabelLoss(loss, *masses, is_induction, mean_weight, key_sum), residuals


def loss_coefficient(
    grad_loss: Tensor, is_induction: Tensor, head_filter: bool, scores: Scores
) -> Tensor:
    """Incoming gradient times the scale, (R, Hq); 0 for heads the filter left out."""
    coefficient = grad_loss * scores.scale
    return torch.where(is_induction, coefficient, 0.0) if head_filter else coefficient


def loss_grad_key(
    backend: str, query: Tensor, key: Tensor, rows: Rows, scores: Scores, *args, **kw
):
    """The backend's `grad_key`."""
    rows = Rows(*(index.contiguous() for index in rows))
    with torch.autocast(query.device.type, enabled=False):
        return _backend(backend).grad_key(query, key, rows, scores, *args, **kw)


def loss_grad_sinks(
    sinks: Tensor, coefficient: Tensor, residuals: Residuals, scores: Scores
) -> Tensor:
    """Gradient of the sinks, (Hq,): keys that are no label and have no vector."""
    alpha = torch.exp(sinks.to(residuals.peak.dtype) - residuals.peak) / residuals.total
    grad = -(coefficient / scores.scale * alpha * residuals.mean_weight).sum(dim=0)
    return grad.to(sinks.dtype)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = Rows(key_start, key_end, label_positions, label_offsets, label_is_correct)
    found, residuals = loss_forward(
        backend, query, key, rows, Scores(scale, softcap, window), sinks,
        penalty, reward, head_filter, needs_grad,
    )  # fmt: skip
    return (*found[:4], *residuals)


@_forward_op.register_fake
def _(query, key, *args):
    return fake_loss(query, needs_grad=args[-1])


def fake_loss(query: Tensor, needs_grad: bool) -> tuple[Tensor, ...]:
    """Shapes of loss, masses, filter and residuals, for (R, Hq, D) queries."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    loss, label_mass, correct_mass, peak, total, mean_weight = (
        query.new_empty(query.shape[:2], dtype=dtype) for _ in range(6)
    )
    is_induction = query.new_empty(query.shape[:2], dtype=torch.bool)
    key_sum = query.new_empty(query.shape if needs_grad else 0, dtype=dtype)
    return loss, label_mass, correct_mass, is_induction, peak, total, mean_weight, key_sum


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
def _(query, key, *_):
    return key.new_empty(key.shape)


def _setup_context(ctx, inputs, output) -> None:
    query, key, sinks, *indices, penalty, reward, scale, softcap, window = inputs[:13]
    ctx.head_filter, ctx.backend, needs_grad = inputs[13:]
    ctx.scores = Scores(scale, softcap, window)
    _, label_mass, correct_mass, is_induction, *residuals = output
    ctx.mark_non_differentiable(label_mass, correct_mass, is_induction, *residuals)
    if needs_grad:
        ctx.save_for_backward(
            query, key, sinks, *indices, penalty, reward, is_induction, *residuals
        )


def _backward(ctx, grad_loss, *_):
    *saved, peak, total, mean_weight, key_sum = ctx.saved_tensors
    query, key, sinks, *indices, penalty, reward, is_induction = saved
    residuals = Residuals(peak, total, mean_weight, key_sum)
    coefficient = loss_coefficient(grad_loss, is_induction, ctx.head_filter, ctx.scores)
    grad_query = grad_key = grad_sinks = None
    if ctx.needs_input_grad[0]:
        grad_query = (coefficient[..., None] * residuals.key_sum).to(query.dtype)
    if ctx.needs_input_grad[1]:
        grad_key = _grad_key_op(
            query, key, *indices, *residuals[:3], coefficient, penalty, reward,
            *ctx.scores, ctx.backend,
        )  # fmt: skip
    if ctx.needs_input_grad[2]:
        grad_sinks = loss_grad_sinks(sinks, coefficient, residuals, ctx.scores)
    return (grad_query, grad_key, grad_sinks, *[None] * 13)


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
) -> LastRowLoss:
    """Attention-behavior loss of one attention layer (paper, section 3 and equation 1).

    A head of row r pays attention `alpha = softmax(scale * query @ key.T)` to the keys
    `key_start[r] <= j < key_end[r]`, n of them, k of which are label tokens. With S the attention
    on all labels, the head is an induction head when `S > k / (k + ln n)`. Its loss is then
    `penalty * sum(alpha of wrong labels) + reward * sum(1 - alpha of correct labels)`, else 0.

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
        sinks: (Hq,) logits that take part in the softmax and are then dropped (GPT-OSS).
        backend: `"triton"` (a GPU; arithmetic in float32), `"torch"` (anything), or `"auto"`.

    Returns:
        LastRowLoss of four (R, Hq) tensors. A row without labels has loss 0. The gradient reaches
        query, key and sinks; none passes through the filter. On a GPU nothing waits for the
        device, so an index out of its bounds shows as NaN in the row's loss.

    Raises:
        ValueError: an argument is malformed; the message names it.
    """
    rows = Rows(key_start, key_end, label_positions, label_offsets, label_is_correct)
    check_tensors(query, key, query.shape[0] if query.ndim else 0, rows, sinks)
    check_options(penalty, reward, scale, softcap, window)
    loss, label_mass, correct_mass, is_induction, *_ = _forward_op(
        query,
        key,
        sinks,
        *rows,
        scalar_like(penalty, query),
        scalar_like(reward, query),
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        None if softcap is None else float(softcap),
        window,
        head_filter,
        choose_backend(query, backend),
        wants_gradient(query, key, sinks),
    )
    return LastRowLoss(loss, label_mass, correct_mass, is_induction)


def scalar_like(value: float | Tensor, query: Tensor) -> Tensor:
    """A 0-d tensor on query's device, without making the host wait for it."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if isinstance(value, Tensor) and value.device == query.device:
        return value.detach().to(dtype)
    return torch.full((), float(value), dtype=dtype, device=query.device)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward may come."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
