"""Attention-behavior loss on the last row of attention: torch only, no transformers."""

from abft_kernels import reference
from abft_kernels.last_row_loss import last_row_loss
from abft_kernels.reference import LastRowLoss

__all__ = ["LastRowLoss", "last_row_loss", "reference"]
