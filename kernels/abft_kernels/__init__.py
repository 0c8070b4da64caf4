"""Attention-behavior loss on the last row of attention: torch and triton, no transformers."""

from abft_kernels import reference
from abft_kernels.attention.registry import choose_attention
from abft_kernels.attention.separate import explicit_attention, visible_keys
from abft_kernels.checks import check_options
from abft_kernels.fused import flash_attention_with_last_row_loss
from abft_kernels.loss import choose_backend, last_row_loss
from abft_kernels.prefix_attention import attention_after_prefix
from abft_kernels.types import LastRowLoss, Scores

__all__ = [
    "LastRowLoss",
    "Scores",
    "attention_after_prefix",
    "check_options",
    "choose_attention",
    "choose_backend",
    "explicit_attention",
    "flash_attention_with_last_row_loss",
    "last_row_loss",
    "reference",
    "visible_keys",
]
