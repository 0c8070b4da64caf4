"""What a launch needs from the host: sizes of blocks, numbers of programs, readable tensors."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from abft_kernels.types import Rows, Scores

INTERPRETED = triton.knobs.runtime.interpret  # read once, when kernels are decorated
OPTIONS = {"enable_fp_fusion": True}  # Triton's own default depends on its version
HEAD_BLOCK = 16  # query heads of a backward's chunk; 16 is the least that tl.dot takes
NO_WINDOW = 2**31 - 1
_PROGRAMS_PER_PROCESSOR = 8  # these keep its memory busy

# What must not specialize a kernel, or a new length would compile one.
COUNTS = [
    "window", "tokens", "splits", "rows", "labels", "query_heads", "head_filter",
    "peak_token_stride", "peak_head_stride", "loss_row_stride", "loss_head_stride",
    "factor_stride",
]  # fmt: skip


class Shape:
    """The sizes of one call, and what follows from them: sizes of blocks, numbers of programs."""

    def __init__(self, query: Tensor, key: Tensor, rows: Rows):
        self.rows = len(rows.key_start)
        _, self.query_heads, self.head_dim = query.shape
        self.tokens, self.key_heads, _ = key.shape
        self.dim_block = max(16, triton.next_power_of_2(self.head_dim))
        self.group = self.query_heads // self.key_heads
        self.group_block = max(16, triton.next_power_of_2(self.group))
        self.processors = _count_processors(query)
        self.row_bytes = self.dim_block * query.element_size()
        # Float32 products keep their operands in registers.
        self._wide = 2048 if query.element_size() > 2 else 16384

    def tile_keys(self, tile_bytes: int) -> int:
        """Count the keys of a tile of about so many bytes."""
        return max(16, min(64, tile_bytes // self.row_bytes))

    def warps(self, heads: int) -> int:
        """Count the warps of a program that multiplies so many queries at once."""
        return 8 if heads * self.dim_block >= self._wide else 4

    def count_splits(self, longest: int, keys: int) -> int:
        """Count the splits of a row, of `keys` or more if a row has `longest`.

        The host knows these sizes; rows' lengths are on the device.
        """
        programs = self.rows * self.key_heads
        wanted = triton.cdiv(self.processors * _PROGRAMS_PER_PROCESSOR, programs)
        return max(1, min(wanted, triton.cdiv(longest, keys)))

    def constants(self) -> dict[str, int]:
        """Return the sizes that every model compiles kernels for."""
        return {
            "GROUP": self.group,
            "GROUP_BLOCK": self.group_block,
            "HEAD_DIM": self.head_dim,
            "DIM_BLOCK": self.dim_block,
        }

    @staticmethod
    def scores(scores: Scores) -> tuple[float, float, int]:
        """Return a kernel's arguments scale, softcap and window."""
        window = NO_WINDOW if scores.window is None else min(scores.window, NO_WINDOW)
        return scores.scale, scores.softcap or 0.0, window

    @staticmethod
    def strides(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
        """Return the strides of rows and heads, then of tokens and heads."""
        return query.stride(0), query.stride(1), key.stride(0), key.stride(1)


def readable(tensor: Tensor) -> Tensor:
    """Return a tensor that kernels can read: its last dimension is contiguous."""
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        tensor = tensor.float()  # the interpreter computes bfloat16 wrongly
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _count_processors(tensor: Tensor) -> int:
    """Count the processors of the tensor's GPU; in the interpreter, any small number does."""
    if not tensor.is_cuda:
        return 4
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
