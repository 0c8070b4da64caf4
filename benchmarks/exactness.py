"""How far a result may be from the exact one: twice as far as plain torch in the same dtype.

Exact is a wider dtype on the same numbers: float32 for a GPU's bfloat16, float64 on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.record import GPU

# What may differ in any case, in units of rounding: a step of many layers in float32 needs more.
UNITS = 4 if GPU else 64
DTYPE, WIDE = (torch.bfloat16, torch.float32) if GPU else (torch.float32, torch.float64)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Of two tensors, by norm."""
    return ((found - expected).norm() / expected.norm()).item()


def assert_exact(name: str, found: Tensor, plain: Tensor, exact: Tensor) -> float:
    """The error of `found`, which is at most twice that of `plain`, or a few units of rounding."""
    error, its = relative_difference(found, exact), relative_difference(plain, exact)
    allowed = max(2 * its, UNITS * torch.finfo(DTYPE).eps)
    assert error <= allowed, f"{name} is off by {error:.1e}, plain torch by {its:.1e}"
    return error
