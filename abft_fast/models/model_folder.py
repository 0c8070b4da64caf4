"""What is wrong with a model's folder, said before anything slow is imported."""

from __future__ import annotations

from pathlib import Path

from abft_fast.errors import UserError
from abft_fast.models.checkpoint_files import find_damaged_weights


def check_model_folder(path: str) -> None:
    """Make sure that a model named by its folder is there.

    Raises:
        UserError: it is not.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise UserError(f"model folder {path} does not exist")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(f"model folder {path} holds no config.json")


def check_model(name: str) -> None:
    """The same, and that the files of its weights are whole and no pickles.

    Raises:
        UserError: as `check_model_folder`, or for a file.
    """
    if name == "builtin":
        return
    check_model_folder(name)
    problem = find_damaged_weights(Path(name)) if Path(name).is_dir() else None
    if problem is not None:
        raise UserError(f"model {name}: {problem}")
