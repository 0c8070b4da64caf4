"""Attention-behavior loss on the last row of attention: torch and triton, no transformers."""

from abft_kernels import reference
from abft_kernels.fused import choose_attention, flash_attention_with_last_row_loss
from abft_kernels.last_row_loss import choose_backend, last_row_loss
from abft_kernels.prefix_attention import attention_after_prefix
from abft_kernels.reference import LastRowLoss

__all__ = [
    "LastRowLoss",
    "attention_after_prefix",
    "choose_attention",
    "choose_backend",
    "flash_attention_with_last_row_loss",
    "last_row_loss",
    "reference",
]
