"""Compute float32 linear layers with AVX-512 on AMD processors, where torch's BLAS does not.

torch's x86 builds multiply float32 matrices by MKL, which uses AVX2 on processors that are not
Intel's: half of what AVX-512 reaches. Convolutions go to oneDNN, which uses AVX-512 on both, and a
linear layer is a convolution with a 1 x 1 kernel over channels-last data: no copy, the same sums.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Smaller products are not worth the call: the label words' rows of a head, LoRA's A and B.
_LEAST_SIZE = 64

_torch_linear = F.linear


def fast_float32_linear() -> AbstractContextManager[object]:
    """Return a context in which float32 linear layers are fast on this processor.

    The context must hold a forward and its backward alike, as checkpointing computes layers again
    in the backward. Results differ by rounding. It does nothing on other processors and on GPUs.
    """
    return linear_as_convolution() if mkl_lacks_avx512() else nullcontext()


@cache
def mkl_lacks_avx512() -> bool:
    """Return whether torch computes convolutions with AVX-512 and MKL products without it."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()


@contextmanager
def linear_as_convolution() -> Iterator[None]:
    """Replace `F.linear`; a TorchFunctionMode would be off inside `Tensor.backward`."""
    before, F.linear = F.linear, _linear
    try:
        yield
    finally:
        F.linear = before


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_suited(input, weight):
        return _torch_linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)


class _Linear(torch.autograd.Function):
    """Keep the input only where the weight is trained; a convolution's own backward always does."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_input, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if of_weight else None, weight if of_input else None)
        return _product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(end_dim=-2)
        return (
            _product(gradient, weight.T) if of_input else None,
            rows.T @ input.flatten(end_dim=-2) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = input.reshape(1, -1, 1, input.shape[-1])
    pixels = F.conv2d(rows.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
    return pixels.permute(0, 2, 3, 1).reshape(*input.shape[:-1], len(weight))


def _is_suited(input: Tensor, weight: Tensor) -> bool:
    return (
        input.device.type == weight.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and weight.dim() == 2
        and not torch.is_autocast_enabled("cpu")
        and min(input.numel() // max(input.shape[-1], 1), *weight.shape) >= _LEAST_SIZE
    )
