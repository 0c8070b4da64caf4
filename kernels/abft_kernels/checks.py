"""Check the arguments of the public functions; each error is one line that names the argument."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from abft_kernels.types import OBJECTIVES, Rows


def check_tensors(
    query: Tensor, key: Tensor, query_rows: int, rows: Rows, sinks: Tensor | None
) -> None:
    """Check shapes, dtypes and devices; `query_rows` of the rows in `query` have a loss."""
    if query.ndim != 3 or query.shape[0] == 0:
        raise ValueError(f"query must be (R, Hq, D) with R >= 1, not {tuple(query.shape)}")
    if not query.is_floating_point():
        raise ValueError(f"query must be of a floating-point dtype, not {query.dtype}")
    _, query_heads, head_dim = query.shape
    if key.ndim != 3 or key.shape[2] != head_dim:
        raise ValueError(f"key must be (T, Hkv, D={head_dim}), not {tuple(key.shape)}")
    if key.dtype != query.dtype:
        raise ValueError(f"key must have query's dtype {query.dtype}, not {key.dtype}")
    if key.shape[1] == 0 or query_heads % key.shape[1]:
        raise ValueError(
            f"query has {query_heads} heads, not a multiple of key's {key.shape[1]} heads"
        )
    labels = rows.label_positions.shape[0] if rows.label_positions.ndim else 0
    expected = {
        "key": (key, key.shape, key.dtype),
        "key_start": (rows.key_start, (query_rows,), torch.int32),
        "key_end": (rows.key_end, (query_rows,), torch.int32),
        "label_positions": (rows.label_positions, (labels,), torch.int32),
        "label_offsets": (rows.label_offsets, (query_rows + 1,), torch.int32),
        "label_is_correct": (rows.label_is_correct, (labels,), torch.bool),
    }
    if sinks is not None:
        if not sinks.is_floating_point():
            raise ValueError(f"sinks must be of a floating-point dtype, not {sinks.dtype}")
        expected["sinks"] = (sinks, (query_heads,), sinks.dtype)
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}")


def bounds_on_host(cu_seqlens: Tensor, bounds: list[int] | None) -> list[int]:
    """Return `cu_seqlens` as numbers: the caller's, or those read now, which waits for the device.

    Raises:
        ValueError: `bounds` and `cu_seqlens` differ in length. Values are not compared, because
            reading them waits for the device.
    """
    if bounds is None:
        return cu_seqlens.tolist()
    if len(bounds) != len(cu_seqlens):
        raise ValueError(
            f"bounds must be the {len(cu_seqlens)} numbers of cu_seqlens, not {len(bounds)}"
        )
    return bounds


def check_bounds(bounds: list[int], tokens: int) -> None:
    """Check that prompts lie end to end and that none is empty."""
    rising = all(a < b for a, b in itertools.pairwise(bounds))
    if bounds[0] != 0 or bounds[-1] != tokens or not rising:
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}")


def check_options(
    penalty: float | Tensor,
    reward: float | Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    objective: str = "mass",
    hold: float | Tensor = 0.0,
) -> None:
    """Check numbers; the value of a tensor is not read, because that would wait for the device.

    Raises:
        ValueError: a number is outside its range, or a tensor is not 0-d.
    """
    for name, value in (("penalty", penalty), ("reward", reward), ("hold", hold)):
        if isinstance(value, Tensor):
            if value.ndim:
                raise ValueError(f"{name} must be a float or a 0-d tensor")
        elif name == "hold":
            if not math.isfinite(value):
                raise ValueError(f"hold must be finite, not {value}")
        elif not value >= 0:
            raise ValueError(f"{name} must be at least 0, not {value}")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
    if objective == "mass" and (isinstance(hold, Tensor) or hold != 0):
        raise ValueError("hold works with objective='share' only: leave it out")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be above 0, not {scale}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, not {softcap}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")


def check_values(tokens: int, rows: Rows) -> None:
    """Check that indices are inside their bounds; this waits for the device.

    Triton on a GPU does without it: there a bad index makes the row's loss NaN.
    """
    key_start, key_end = rows.key_start.cpu(), rows.key_end.cpu()
    label_positions, label_offsets = rows.label_positions.cpu(), rows.label_offsets.cpu()
    if (key_start < 0).any() or (key_start >= key_end).any():
        raise ValueError("key_start must be at least 0 and below key_end: every row sees a key")
    if (key_end > tokens).any():
        raise ValueError(f"key_end must be at most the number of keys, {tokens}")
    counts = label_offsets.diff()
    if label_offsets[0] != 0 or label_offsets[-1] != len(label_positions) or (counts < 0).any():
        raise ValueError(
            f"label_offsets must rise from 0 to the number of labels, {len(label_positions)}"
        )
    first = torch.repeat_interleave(key_start, counts)
    last = torch.repeat_interleave(key_end, counts)
    if (label_positions < first).any() or (label_positions >= last).any():
        raise ValueError("label_positions must lie inside their row's key_start:key_end")
