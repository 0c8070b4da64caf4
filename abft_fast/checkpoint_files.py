"""What is wrong with the files of a checkpoint, by name; asked once reading them has failed.

Headers and sizes are looked at. A change inside the numbers of a tensor cannot be seen without a
checksum: see `abft_fast.preflight` for those that are no numbers any more.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def find_damage(folder: Path) -> str | None:
    """The first damaged file, what is wrong with it and what to do; None where all look whole."""
    for path in sorted(folder.glob("*.json")):
        problem = _json_problem(path)
        if problem is not None:
            return problem
    try:
        files = shards(folder)
    except (KeyError, TypeError, AttributeError):
        return f"{folder / SAFE_WEIGHTS_INDEX_NAME} does not say where weights are: {_AGAIN}"
    for path, expected in files.items():
        problem = _shard_problem(path, expected)
        if problem is not None:
            return problem
    return None


def shards(folder: Path) -> dict[Path, list[str]]:
    """Names of the weights that each safetensors file of a checkpoint should hold.

    Empty for a file that no index describes.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        single = folder / SAFE_WEIGHTS_NAME
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


def _shard_problem(path: Path, expected: list[str]) -> str | None:
    if not path.is_file():
        return f"{path} is missing, which {SAFE_WEIGHTS_INDEX_NAME} names: {_AGAIN}"
    with path.open("rb") as file:
        if file.read(19) == b"version https://git":
            return f"{path} is a pointer of git-lfs, not the weights: run `git lfs pull` there"
    try:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
    except (OSError, SafetensorError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        return f"{path} is damaged, {path.stat().st_size} bytes ({reason}): {_AGAIN}"
    lacking = [name for name in expected if name not in held]
    if lacking:
        return f"{path} lacks {lacking[0]}, which {SAFE_WEIGHTS_INDEX_NAME} has in it: {_AGAIN}"
    return None
