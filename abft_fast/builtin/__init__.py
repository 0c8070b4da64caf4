"""The model that comes with the package, and the recipe that made it."""

from __future__ import annotations

from pathlib import Path

BUILTIN_LEARNING_RATES = {"lora": 3e-3, "full": 1e-3, "model": 5e-4}
"""The built-in model's own, by what is trained; docs/contributing/decisions/training.md: why."""


def builtin_model_path() -> Path:
    """Return the built-in model's folder, for `AutoModelForCausalLM` and `AutoTokenizer`."""
    return Path(__file__).parent / "model"
