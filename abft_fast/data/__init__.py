"""Datasets: those of StaICC, generated ones, and those of the user."""

from abft_fast.data.boxes import BOXES, Boxes
from abft_fast.data.catalog import NAMES, load, origin, resolve_name
from abft_fast.data.dataset import Dataset, Example, Prompt, text_key
from abft_fast.data.staicc_files import DATASETS, PAPER_DATASETS, hash_is_pinned

__all__ = [
    "BOXES",
    "DATASETS",
    "NAMES",
    "PAPER_DATASETS",
    "Boxes",
    "Dataset",
    "Example",
    "Prompt",
    "hash_is_pinned",
    "load",
    "origin",
    "resolve_name",
    "text_key",
]
