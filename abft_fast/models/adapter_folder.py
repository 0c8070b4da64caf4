"""What is wrong with the files of an adapter, said before a model is read for it."""

from __future__ import annotations

import json
from pathlib import Path

from abft_fast.errors import UserError
from abft_fast.models.checkpoint_files import pickle_problem, weights_problem

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_adapter(folder: Path) -> None:
    """Make sure that a folder holds an adapter with whole files.

    Raises:
        UserError: it does not, or its weights are a pickle.
    """
    if not (folder / _CONFIG).is_file():
        raise UserError(f"adapter {folder} holds no {_CONFIG}")
    try:
        known = "peft_type" in json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        known = False
    if not known:
        raise UserError(f"adapter {folder}: {_CONFIG} is not what PEFT writes: copy it again")
    if not (folder / _WEIGHTS).is_file():
        problem = pickle_problem(folder, "adapter_model*.bin")
        raise UserError(f"adapter {folder}: {problem or f'it holds no {_WEIGHTS}'}")
    problem = weights_problem(folder / _WEIGHTS)
    if problem is not None:
        raise UserError(f"adapter {folder}: {problem}")
