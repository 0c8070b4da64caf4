"""Models with trained weights: the built-in one, and those of `make real-models`."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abft_fast import builtin_model_path
from abft_fast.models import loading
from benchmarks.record import DEVICE
from tests.real import fetch

REAL = tuple(fetch.MODELS)
BUILTIN = "builtin"


def is_stored(model: str) -> bool:
    return model in (BUILTIN, *REAL)


def path_of(model: str) -> Path:
    """Where a model's weights are, or would be."""
    return Path(builtin_model_path()) if model == BUILTIN else fetch.path_of(model)


def skip_if_missing(model: str) -> None:
    import pytest

    if is_stored(model) and not path_of(model).exists():
        pytest.skip(f"{path_of(model).name} is not there: make real-models")


def load(model: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return loading.load(str(path_of(model)), torch.device(DEVICE), dtype).eval()


def read_tokenizer(model: str) -> PreTrainedTokenizerBase:
    return loading.read_tokenizer(str(path_of(model)))
