"""The dtype that autocast computes in.

CUDA's autocast leaves the output of some operations, as layer norm's, in float32, and quantized
layers return the dtype of their input. So a tensor's own dtype does not tell what products are
computed in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that products with a tensor are computed in, under autocast or without."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
