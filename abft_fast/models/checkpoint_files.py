"""What is wrong with the files of a checkpoint, by name; asked once reading them has failed.

Headers and sizes are looked at. A change inside the numbers of a tensor cannot be seen without a
checksum: see `abft_fast.models.preflight` for those that are no numbers any more.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError, safe_open


def find_damage(folder: Path) -> str | None:
    """The first damaged file, what is wrong with it and what to do; None where all look whole."""
    for path in sorted(folder.glob("*.json")):
        problem = _json_problem(path)
        if problem is not None:
            return problem
    return find_damaged_weights(folder)


def find_damaged_weights(folder: Path) -> str | None:
    """The same for files of weights alone; pickles are such, as they are not read."""
    try:
        files = shards(folder)
    except ValueError:
        return f"{folder / SAFETENSORS_INDEX_FILE} is no JSON: {_AGAIN}"
    except (KeyError, TypeError, AttributeError):
        return f"{folder / SAFETENSORS_INDEX_FILE} does not say where weights are: {_AGAIN}"
    if not files:
        return pickle_problem(folder, "pytorch_model*.bin")
    for path, expected in files.items():
        problem = weights_problem(path, expected)
        if problem is not None:
            return problem
    return None


def pickle_problem(folder: Path, pattern: str) -> str | None:
    """Why files of weights of such a name are not read; None where there are none."""
    found = sorted(folder.glob(pattern))
    if not found:
        return None
    return (
        f"{found[0]} is a pickle, which can run any code as it is read: use weights saved as "
        "safetensors"
    )


def shards(folder: Path) -> dict[Path, list[str]]:
    """Names of the weights that each safetensors file of a checkpoint should hold.

    Empty for a file that no index describes.
    """
    index = folder / SAFETENSORS_INDEX_FILE
    if not index.is_file():
        single = folder / SAFETENSORS_SINGLE_FILE
        return {single: []} if single.exists() else {}
    files: dict[Path, list[str]] = {}
    for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        files.setdefault(folder / file, []).append(name)
    return files


_AGAIN = "download it again"


def _json_problem(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{path} is no JSON: {_AGAIN}"
    if not isinstance(content, dict) and path.name == "config.json":
        return f"{path} holds no JSON object: {_AGAIN}"
    return None


def weights_problem(path: Path, expected: Collection[str] = ()) -> str | None:
    """What is wrong with a safetensors file, which should hold the expected weights."""
    if not path.is_file():
        return f"{path} is missing, which {SAFETENSORS_INDEX_FILE} names: {_AGAIN}"
    with path.open("rb") as file:
        if file.read(19) == b"version https://git":
            return f"{path} is a pointer of git-lfs, not the weights: run `git lfs pull` there"
    try:
        with safe_open(path, framework="np") as file:
            held = set(file.keys())
    except (OSError, SafetensorError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        return f"{path} is damaged, {path.stat().st_size} bytes ({reason}): {_AGAIN}"
    lacking = [name for name in expected if name not in held]
    if lacking:
        return f"{path} lacks {lacking[0]}, which {SAFETENSORS_INDEX_FILE} has in it: {_AGAIN}"
    return None
