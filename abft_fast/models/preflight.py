"""Check this very model before a run: its attention, finite values, gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abft_fast.core import attention, eager_attention
from abft_fast.core.autocast import product_dtype
from abft_fast.core.backbone import backbone, must_run_alone, prepare, without_peft
from abft_fast.core.packed_forward import PackedForward
from abft_fast.core.packing import EncodedPrompt, pack
from abft_fast.core.run_packed import run_packed
from abft_fast.core.shared_prefix import SharedPrefix
from abft_fast.errors import UnsupportedModel, UserError
from abft_fast.models.files import shards
from abft_fast.models.loading import checkpoint_folder

_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_QUANTIZED_TOLERANCE = 3e-2  # their products depend on how many rows are multiplied at once
_GRADIENT_TOLERANCE = 1e-1  # formats that also round inputs; without a backward it is 1
_LONGEST = 2048  # eager attention keeps n x n scores a head


def check_attention(
    model: PreTrainedModel,
    prompts: Sequence[EncodedPrompt],
    autocast: Callable = contextlib.nullcontext,
    attention_backend: str = "auto",
) -> dict[tuple[str, str], str]:
    """Compare last hidden states of a short and a long prompt, packed and one by one.

    Args:
        model: a decoder of transformers, on its device.
        prompts: the shortest and the longest (up to 2,048 tokens) are compared.
        autocast: context manager around each forward.
        attention_backend: which attention is to run; see `abft_kernels.choose_attention`.

    Returns:
        Which attention ran: (attention, backend of the loss) -> why no faster attention ran.

    Raises:
        UserError: the hidden states differ, because the family's attention does something that
            packed attention does not know; or the model's own hidden states are not finite.
        UnsupportedModel: the packed forward cannot run, as where the attention asked for cannot.
    """
    pair = shortest_and_longest(prompts)
    inner = prepare(model)
    device = inner.get_input_embeddings().weight.device
    batches = [[p] for p in pair] if must_run_alone(inner, len(pair[1])) else [pair]
    model.eval()
    with torch.no_grad(), autocast():
        packed: list[Tensor] = []
        attentions: dict[tuple[str, str], str] = {}
        for batch in batches:
            forward = PackedForward(pack(batch), attention=attention_backend)
            try:
                output = run_packed(inner, forward)
            except ValueError as error:  # as where the attention asked for cannot run here
                raise UnsupportedModel(str(error)) from error
            packed.append(output.last_hidden_state[0])
            attentions |= forward.attentions
        dtype = product_dtype(packed[0])
        inner.set_attn_implementation(eager_attention.NAME)
        try:
            eager = [
                inner(torch.tensor([p.input_ids], device=device), use_cache=False) for p in pair
            ]
        finally:
            inner.set_attn_implementation(attention.NAME)
    expected = torch.cat([output.last_hidden_state[0] for output in eager])
    if not expected.isfinite().all():
        raise not_finite(_where_not_finite(model, pair, autocast), dtype)
    difference = relative_error(torch.cat(packed), expected)
    if not difference <= tolerance(inner, dtype):
        raise wrong_attention(inner, difference)
    return attentions


def shortest_and_longest(prompts: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
    """Return the shortest prompt, and the longest of those of up to 2,048 tokens."""
    ordered = sorted(prompts, key=len)
    return [ordered[0], next((p for p in reversed(ordered) if len(p) <= _LONGEST), ordered[0])]


def lines_on_attention(attentions: Mapping[tuple[str, str], str]) -> Iterator[str]:
    """Yield lines that say which attention runs, and why no faster one; see `check_attention`."""
    for (name, backend), reasons in attentions.items():
        yield f"attention: {name}, its loss: {backend}"
        if name == "separate":
            yield f"attention runs one prompt at a time, and the loss reads keys again: {reasons}"


def not_finite(where: str, dtype: torch.dtype) -> UserError:
    """Return the error that says where hidden states are not finite."""
    return UserError(
        f"{where}: the values are not finite: download the file again; if it is whole, the model "
        f"overflows in {str(dtype).removeprefix('torch.')}"
    )


def wrong_attention(inner: PreTrainedModel, difference: float) -> UserError:
    """Return the error that says by how much packed attention differs from the model's own."""
    return UserError(
        f"{inner.config.model_type}: packed attention differs from the model's own by "
        f"{difference:.1%}, so the loss would be wrong; this family is not supported"
    )


def shared_prefix_is_exact(
    shared: SharedPrefix, prompts: Sequence[list[int]], autocast: Callable = contextlib.nullcontext
) -> bool:
    """Return whether hidden states after the prefix equal those of whole prompts.

    A short and a long prompt are compared. A family may depend on more than a token's position and
    the keys before it.
    """
    pair = [min(prompts, key=len), max(prompts, key=len)]
    if not shared.can_share(len(pair[1])):  # it is given whole prompts anyway
        return True
    with torch.no_grad(), autocast():
        continued = shared.hidden_states(pair)
        whole = SharedPrefix(shared.model, [], shared.attention).hidden_states(pair)
        allowed = tolerance(prepare(shared.model), product_dtype(continued[0]))
    expected = [states[-len(own) :] for states, own in zip(whole, continued, strict=True)]
    return relative_error(torch.cat(continued), torch.cat(expected)) <= allowed


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the distance of hidden states (T, width) relative to those expected.

    It is the root mean square over tokens, each by its own norm: a first token's may be a hundred
    times as large as all others'.
    """
    distances = (actual.float() - expected.float()).norm(dim=-1)
    norms = expected.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (distances / norms).square().mean().sqrt().item()


def tolerance(inner: PreTrainedModel, dtype: torch.dtype) -> float:
    """Return the relative error of hidden states that arithmetic explains."""
    if getattr(inner.config, "quantization_config", None) is not None:
        return max(_TOLERANCE[dtype], _QUANTIZED_TOLERANCE)
    return _TOLERANCE[dtype]


class _LinearLayer(Protocol):
    """A linear layer of any quantized format; not every format's is an nn.Linear."""

    in_features: int

    def __call__(self, x: Tensor) -> Tensor: ...


def check_gradients(model: PreTrainedModel) -> None:
    """Make sure that a quantized model's layers pass gradients on; test one layer of each kind.

    A layer without a backward loses gradients silently, and the gradient that flows around it hides
    the loss. The test: for a linear map y = Wx, <y, y> = <x, transpose(W) y>.

    Raises:
        UserError: a kind of layer passes no gradient, or a wrong one.
    """
    if getattr(model.config, "quantization_config", None) is None:
        return
    kinds: dict[type, tuple[str, _LinearLayer]] = {}
    for name, module in backbone(model).named_modules():
        if type(module) is nn.Linear:  # torch's own, as LoRA's in float32
            continue
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            kinds.setdefault(type(module), (name, module))
    device, dtype = model.get_input_embeddings().weight.device, model.dtype
    for name, module in kinds.values():
        x = torch.randn(16, module.in_features, device=device, dtype=dtype, requires_grad=True)
        y = module(x)
        bias = getattr(module, "bias", None)
        direction = (y if bias is None else y - bias).detach()
        product = 0.0
        if y.requires_grad:
            (grad,) = torch.autograd.grad(y, x, direction)
            product = (grad.float() * x).sum().item()
        expected = direction.float().square().sum().item()
        if not abs(product - expected) <= _GRADIENT_TOLERANCE * expected:
            raise UserError(
                f"{name} ({type(module).__name__}) does not pass the right gradient on: use the "
                "unquantized checkpoint with --quantized"
            )


def _where_not_finite(
    model: PreTrainedModel, prompts: Sequence[EncodedPrompt], autocast: Callable
) -> str:
    """Return the first layer whose output is not finite, and the file of its weights."""
    model = without_peft(model)
    not_finite: list[str] = []

    def watch(name: str) -> Callable:
        def look(module: nn.Module, args: tuple, output: Any) -> None:
            is_tensor = isinstance(output, torch.Tensor)
            if not not_finite and is_tensor and not output.isfinite().all():
                not_finite.append(name)

        return look

    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    inner = backbone(model)
    device = inner.get_input_embeddings().weight.device
    try:
        with torch.no_grad(), autocast():
            for prompt in prompts:
                inner(torch.tensor([prompt.input_ids], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    path = model.config.name_or_path
    if not not_finite:
        return f"model {path}"
    layer = not_finite[0]
    folder = checkpoint_folder(path)
    files = {} if folder is None else shards(folder)
    for file, names in files.items():
        if not names or any(name.startswith(f"{layer}.") for name in names):
            return f"{layer} of {file}"
    return f"{layer} of model {path}"
