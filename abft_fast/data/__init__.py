"""Datasets: those of StaICC and those of the user."""

from abft_fast.data.dataset import Dataset, Example, Prompt
from abft_fast.data.staicc_files import (
    DATASETS,
    PAPER_DATASETS,
    hash_is_pinned,
    load,
    resolve_name,
)

__all__ = [
    "DATASETS",
    "PAPER_DATASETS",
    "Dataset",
    "Example",
    "Prompt",
    "hash_is_pinned",
    "load",
    "resolve_name",
]
