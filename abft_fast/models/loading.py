"""Read a model and its tokenizer, as they are stored or quantized on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from abft_fast.builtin import builtin_model_path
from abft_fast.core.backbone import prepare
from abft_fast.errors import UnsupportedModel, UserError
from abft_fast.models.device_map import does_not_fit
from abft_fast.models.files import ADAPTER_CONFIG, check_model_folder, find_damage, gguf_file
from abft_fast.models.gguf import class_and_tensors, copy_tokenizer, metadata_folder
from abft_fast.models.shapes import SYNTHETIC, known_names, known_shape
from abft_fast.models.stored_format import prepare_format, stored_format
from abft_fast.models.synthetic import quantization, random_model
from abft_fast.runtime.token_budget import is_out_of_memory


def read_config(name: str) -> PreTrainedConfig:
    """Read a model's config, without its weights.

    Args:
        name: `builtin`, a local folder, a hub id, or `synthetic:` and the name of a known shape.

    Raises:
        UserError: there is no such model, it is not on this machine and the hub is out of reach, or
            the file is damaged.
    """
    if not name.startswith(SYNTHETIC):
        return _read(AutoConfig, name)
    shape = known_shape(name.removeprefix(SYNTHETIC))
    if shape is None:
        raise UserError(
            f"model {name}: there is no such shape; use one of {', '.join(known_names())}, or as "
            "`llama3-70b:4` its first layers"
        )
    return shape


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Read a model's tokenizer; synthetic models have the built-in model's.

    Raises:
        UserError: as `read_config`.
    """
    if name.startswith(SYNTHETIC):
        name = "builtin"
    # The general class reads a GGUF's saved tokenizer faster than the model's own, to the same ids.
    return _read(AutoTokenizer if gguf_file(name) is None else PreTrainedTokenizerFast, name)


def save_tokenizer(name: str, folder: Path) -> None:
    """Save a model's tokenizer for other programs, in the class that transformers has for it.

    Raises:
        UserError: as `read_config`.
    """
    path = gguf_file(name)
    if path is None:
        read_tokenizer(name).save_pretrained(folder)
    else:
        copy_tokenizer(path, folder)


def load(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    bits: int | None = None,
    placement: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a causal language model; a synthetic one gets random weights.

    Args:
        name: as in `read_config`.
        device: where its weights go; quantized ones are quantized there as they arrive.
        dtype: of its weights, and of the arithmetic with quantized ones.
        bits: quantize with bitsandbytes to 4 (NF4, double quantization) or 8; None as it is stored.
        placement: what `from_pretrained` is told in place of `device`.

    Raises:
        UserError: as `read_config`, or its files are damaged or lack weights, it does not fit, it
            cannot be quantized, it is stored in a format that cannot be trained here, or its
            attention is out of this library's reach.
    """
    config = read_config(name)
    if not name.startswith(SYNTHETIC):
        model = _stored_model(config, name, device, dtype, bits, placement)
    elif placement is None:
        model = random_model(config, device, dtype, bits)
    else:
        raise UserError(f"model {name}: synthetic weights stay on one GPU; leave out --device-map")
    try:
        prepare(model)
    except UnsupportedModel as error:
        raise UserError(f"model {name}: {error}") from error
    return model


def _stored_model(
    config: PreTrainedConfig,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    bits: int | None,
    placement: dict[str, Any] | None,
) -> PreTrainedModel:
    stored = stored_format(config)
    if stored is not None:
        if bits is not None:
            raise UserError(f"model {name} is quantized already ({stored}): leave out --quantized")
        prepare_format(config, name, device)
    kind, source = AutoModelForCausalLM, {}
    path = gguf_file(name)
    if path is not None:
        kind, tensors = class_and_tensors(path, config)
        source = {"state_dict": tensors}
    model, report = _read(
        kind,
        name,
        **source,
        config=config,
        dtype=dtype,
        **(placement or {"device_map": {"": device}}),
        adapter_kwargs={"subfolder": "none"},  # no folder, so no adapter beside the weights is read
        quantization_config=None if bits is None else quantization(bits, dtype),
        output_loading_info=True,
        use_safetensors=True,  # a pickle can run any code
        ignore_mismatched_sizes=True,  # to name them below
    )
    if stored == "mxfp4":
        model.to(dtype)  # transformers 5.17 leaves dequantized experts in bfloat16
    if path is not None:
        model.name_or_path = model.config.name_or_path = str(path)
    # transformers makes up what is missing or of another shape, at random.
    lacking = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if lacking:
        problem = _damage(_path(name)) or (
            f"{len(lacking)} weights, such as {lacking[0]}, are missing from the files or have "
            "another shape there: config.json is of another model, or the weights were not saved"
        )
        raise UserError(f"model {name}: {problem}")
    return model


def _path(name: str) -> str:
    """Return the folder of a model's config and tokenizer, or its id on the hub."""
    if name == "builtin":
        return str(builtin_model_path())
    path = gguf_file(name)
    return name if path is None else str(metadata_folder(path))


def _read(
    kind: type[AutoConfig | AutoTokenizer | PreTrainedTokenizerFast | AutoModelForCausalLM],
    name: str,
    **options: Any,
) -> Any:
    """Return the result of transformers' `from_pretrained`, or raise one line that says why not."""
    check_model_folder(name)
    path = _path(name)
    transformers_logging.disable_progress_bar()
    try:
        # transformers takes a folder or tensors by name, not both.
        return kind.from_pretrained(None if "state_dict" in options else path, **options)
    except Exception as error:  # of whatever library reads the files
        problem = _damage(path)
        if is_out_of_memory(error):
            problem = "the model does not fit into memory: use --quantized, or a smaller model"
        elif "during automatic conversion" in str(error) and problem is None:
            problem = "a weight could not be quantized while it was read; perhaps memory ran out"
        line = f"model {name}: {problem}" if problem else _why_not_loaded(name, path, error)
        raise UserError(line) from error


def files_name(name: str) -> str:
    """Return the name that a loaded model has: its folder, GGUF file, or id on the hub."""
    path = gguf_file(name)
    return _path(name) if path is None else str(path)


def context_length(config: PreTrainedConfig) -> int | None:
    """Return how many tokens a prompt may have; None where the config does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def left_out(name: str, *adapters: Path | None) -> list[str]:
    """Return a line if a model's folder also holds an adapter that is not used.

    transformers would put it on the model. Here a model is its own weights everywhere.

    Args:
        name: as in `read_config`.
        adapters: the adapters that are used.
    """
    folder = checkpoint_folder(_path(name)) if gguf_file(name) is None else None
    if folder is None or not (folder / ADAPTER_CONFIG).is_file():
        return []
    if folder.resolve() in [path.resolve() for path in adapters if path is not None]:
        return []
    return [f"model {name}: the adapter beside the weights is left out; --adapter {folder} uses it"]


def vocabulary_size(config: PreTrainedConfig) -> int | None:
    """Return how many tokens the model has; None where the config does not say."""
    return getattr(config.get_text_config(decoder=True), "vocab_size", None)


def checkpoint_folder(path: str) -> Path | None:
    """Return the folder of a model's files on this machine, or None; the hub's cache counts."""
    if not path:  # as synthetic models have none
        return None
    if Path(path).is_dir():
        return Path(path)
    try:
        cached = try_to_load_from_cache(path, "config.json")
    except ValueError:  # no name the hub would take
        cached = None
    return Path(cached).parent if isinstance(cached, str) else None


def _damage(path: str) -> str | None:
    folder = checkpoint_folder(path)
    return None if folder is None else find_damage(folder)


def _why_not_loaded(name: str, path: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    lowered = text.lower().replace(path.lower(), "")  # which may hold the words looked for
    if "dispatched on the cpu or the disk" in lowered:  # a quantized one
        return does_not_fit(name)
    if Path(path).is_dir():
        return f"model {name} cannot be loaded: {text[:300]}"
    unreachable = any(word in lowered for word in ("offline", "connect", "network"))
    if unreachable or (HF_HUB_OFFLINE and isinstance(error, OSError)):
        return (
            f"offline: model {name} is not in the local cache; download it where there is a "
            "network, or pass a local folder"
        )
    if "gated" in lowered or "401" in lowered or "403" in lowered:
        return f"model {name}: the hub asks for a token that may read this model (`hf auth login`)"
    if "not a valid model identifier" in lowered or "not a local folder" in lowered:
        return f"model {name} is neither a local folder nor a model on the hub"
    return f"model {name} cannot be loaded: {text[:300]}"
