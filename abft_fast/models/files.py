"""Name what is wrong with the files of a model or an adapter, before anything slow is imported.

Headers and sizes are looked at. A change inside the numbers of a tensor cannot be seen without a
checksum; `abft_fast.models.preflight` finds those that are no numbers any more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError, safe_open

from abft_fast.errors import UserError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CHANGE_WEIGHTS = {
    "LORA", "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD",
    "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF",
    "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA",
    "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
"""PEFT's kinds of adapters that give each layer other weights, whatever the prompt is."""
_LOOK_AT_PROMPTS = ("alora_invocation_tokens", "arrow_config", "layer_replication")
"""Settings of LoRA with which an adapter does more than that."""
_READ_BY_TRANSFORMERS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", SAFETENSORS_INDEX_FILE,
)  # fmt: skip
_AGAIN = "download it again"
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")  # as llama.cpp names the parts of a model


def gguf_file(name: str) -> Path | None:
    """Return the GGUF file that a model's name means, or None.

    `name` is the file, or a folder that holds one and no config.json.

    Raises:
        UserError: the folder holds several, or the file is one of several parts.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1 and not _PART.search(files[0].name):
            raise UserError(
                f"model folder {name} holds {len(files)} GGUF files: name one, such as {files[0]}"
            )
        path = files[0] if files else path
    if path.suffix != ".gguf":
        return None
    if _PART.search(path.name):
        raise UserError(
            f"model {path} is one part of a split GGUF: join the parts with "
            "`llama-gguf-split --merge FIRST-PART JOINED.gguf`"
        )
    return path


def check_model_folder(path: str) -> None:
    """Make sure that a model named by its folder or its GGUF file is there.

    Raises:
        UserError: the folder or the file is missing, or the folder holds no config.json and no
            GGUF file.
    """
    gguf = gguf_file(path)
    if gguf is not None:
        if not gguf.is_file():
            raise UserError(f"model file {path} does not exist")
        return
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise UserError(f"model folder {path} does not exist")
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        if (Path(path) / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"model folder {path} holds an adapter and no model: name the model that the "
                "adapter was trained on, and give the folder with --adapter"
            )
        raise UserError(f"model folder {path} holds no config.json")


def check_model(name: str) -> None:
    """Make sure that a model's folder is there and its weights are whole and no pickles.

    Raises:
        UserError: as `check_model_folder`, or a file of weights is damaged or a pickle.
    """
    if name == "builtin":
        return
    check_model_folder(name)
    problem = find_damaged_weights(Path(name)) if Path(name).is_dir() else None
    if problem is not None:
        raise UserError(f"model {name}: {problem}")


def is_whole_model(folder: Path) -> bool:
    """Return whether a folder holds a model rather than an adapter, as `--trainable model` does."""
    return (folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file()


def refuse_biases(folder: Path, instead: str) -> None:
    """Refuse an adapter that trained biases; PEFT keeps those in the base's own parameters.

    Args:
        folder: a whole adapter's.
        instead: what to do instead, for the message.

    Raises:
        UserError: the adapter did.
    """
    bias = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("bias") or "none"
    if bias != "none":
        raise UserError(
            f"adapter {folder} has biases of the base's layers (bias={bias}): {instead}"
        )


def check_adapter(folder: Path) -> None:
    """Make sure that a folder holds an adapter that changes weights, with whole files.

    Raises:
        UserError: a file is missing or damaged, the weights are a pickle, or the adapter does
            something else than to change weights, as prompt tuning does.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        inside = min(folder.glob(f"*/{ADAPTER_CONFIG}"), default=None)
        hint = "" if inside is None else f": did you mean {inside.parent}?"
        raise UserError(f"adapter {folder} holds no {ADAPTER_CONFIG}{hint}")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise UserError(
            f"adapter {folder}: PEFT did not write this {ADAPTER_CONFIG}: copy the adapter again"
        )
    others = [name for name in _LOOK_AT_PROMPTS if config.get(name)]
    if config["peft_type"] not in _CHANGE_WEIGHTS or others:
        raise UserError(
            f"adapter {folder} is of PEFT's kind {' with '.join([config['peft_type'], *others])}: "
            "use a kind that only changes weights, such as LORA"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        problem = pickle_problem(folder, "adapter_model*.bin")
        raise UserError(f"adapter {folder}: {problem or f'the folder holds no {ADAPTER_WEIGHTS}'}")
    problem = weights_problem(folder / ADAPTER_WEIGHTS)
    if problem is not None:
        raise UserError(f"adapter {folder}: {problem}")


def find_damage(folder: Path) -> str | None:
    """Return a line on the first damaged file of a model and the fix; None where all look whole."""
    for path in (folder / name for name in _READ_BY_TRANSFORMERS):
        problem = _json_problem(path) if path.exists() else None
        if problem is not None:
            return problem
    return find_damaged_weights(folder)


def find_damaged_weights(folder: Path) -> str | None:
    """Return a line on the first damaged file of weights; a pickle counts as damaged."""
    try:
        files = shards(folder)
    except ValueError:
        return f"{folder / SAFETENSORS_INDEX_FILE} is not JSON: {_AGAIN}"
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
    """Return a line on the first pickle of such a name; None where there is none."""
    pickles = sorted(folder.glob(pattern))
    if not pickles:
        return None
    return (
        f"{pickles[0]} is a pickle, which can run any code while it is read: use weights saved as "
        "safetensors"
    )


def shards(folder: Path) -> dict[Path, list[str]]:
    """Return the names of the weights that each safetensors file of a checkpoint should hold.

    The names are empty for a file of all weights. As in transformers, such a file comes first: an
    index beside it is not read.
    """
    single, index = folder / SAFETENSORS_SINGLE_FILE, folder / SAFETENSORS_INDEX_FILE
    if single.is_file():
        return {single: []}
    if not index.is_file():
        return {}
    files: dict[Path, list[str]] = {}
    for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        files.setdefault(folder / file, []).append(name)
    return files


def _json_problem(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    except ValueError:
        return f"{path} is not JSON: {_AGAIN}"
    if not isinstance(content, dict) and path.name == "config.json":
        return f"{path} holds no JSON object: {_AGAIN}"
    return None


def weights_problem(path: Path, expected: Collection[str] = ()) -> str | None:
    """Return what is wrong with a safetensors file that should hold the expected weights."""
    if not path.is_file():
        return f"{path} is missing, but {SAFETENSORS_INDEX_FILE} names it: {_AGAIN}"
    with path.open("rb") as file:
        if file.read(19) == b"version https://git":
            return f"{path} is a pointer of git-lfs, not the weights: run `git lfs pull` there"
    try:
        with safe_open(path, framework="np") as file:
            held = set(file.keys())
    except (OSError, SafetensorError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        return f"{path} is damaged, {path.stat().st_size} bytes ({reason}): {_AGAIN}"
    if not held:
        return f"{path} holds no weights: {_AGAIN}"
    lacking = [name for name in expected if name not in held]
    if lacking:
        return f"{path} lacks {lacking[0]}, but {SAFETENSORS_INDEX_FILE} lists it there: {_AGAIN}"
    return None
