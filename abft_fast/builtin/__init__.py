"""The model that comes with the package, and the recipe that made it."""

from __future__ import annotations

from pathlib import Path


def builtin_model_path() -> Path:
    """The folder of the built-in model: `AutoModelForCausalLM` and `AutoTokenizer` load it."""
    return Path(__file__).parent / "model"
