"""Reading a model and its tokenizer, as they are stored or quantized on the way."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from abft_fast.backbone import prepare
from abft_fast.builtin import builtin_model_path
from abft_fast.checkpoint_files import find_damage
from abft_fast.errors import UserError
from abft_fast.stored_format import check_format, stored_format
from abft_fast.token_budget import is_out_of_memory


def load(
    name: str, device: torch.device, dtype: torch.dtype, bits: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        name: `builtin`, a local folder or a hub id.
        device: where its weights go; quantized ones are quantized there as they arrive.
        dtype: of its weights, and of the arithmetic with quantized ones.
        bits: quantize with bitsandbytes to 4 (NF4, double quantization) or 8; None as it is stored.

    Raises:
        UserError: there is no such model, it is not on this machine and the hub is out of reach,
            its files are damaged or lack weights, it does not fit, it cannot be quantized, it is
            stored in a format that cannot be trained here, or its attention is out of this
            library's reach.
    """
    path = str(builtin_model_path()) if name == "builtin" else name
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise UserError(f"model folder {path} holds no config.json")
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise UserError(f"model folder {path} does not exist")
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = AutoConfig.from_pretrained(path)
        quantization = None if bits is None else _bitsandbytes(bits, dtype)
        if stored_format(config) is not None:
            if bits is not None:
                raise UserError(
                    f"model {name} is quantized already ({stored_format(config)}): "
                    "leave out --quantized"
                )
            check_format(config, name, device)
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them below
        )
    except UserError:
        raise
    except Exception as error:  # of whatever library reads the files
        full = "it does not fit into memory: use --quantized, or a smaller one"
        problem = full if is_out_of_memory(error) else _damage(path)
        line = f"model {name}: {problem}" if problem else _why_not_loaded(name, path, error)
        raise UserError(line) from error
    # transformers makes up what is missing or of another shape, at random.
    lacking = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if lacking:
        problem = _damage(path) or (
            f"{len(lacking)} weights, such as {lacking[0]}, are not in its files or of another "
            "shape there: its config.json is of another model, or it was saved without them"
        )
        raise UserError(f"model {name}: {problem}")
    try:
        prepare(model)
    except ValueError as error:
        raise UserError(f"model {name}: {error}") from error
    return model, tokenizer


def _bitsandbytes(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def context_length(model: nn.Module) -> int | None:
    """Tokens a prompt may have at most; None where the config does not say."""
    return getattr(prepare(model).config, "max_position_embeddings", None)


def checkpoint_folder(path: str) -> Path | None:
    """Where the files of a model are on this machine, in a folder or in the hub's cache."""
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
    lowered = text.lower()
    if Path(path).is_dir():
        return f"model {name} cannot be loaded: {text[:300]}"
    unreachable = any(word in lowered for word in ("offline", "connect", "network"))
    if unreachable or (HF_HUB_OFFLINE and isinstance(error, OSError)):
        return (
            f"offline: {name} is not in the local cache; download it where there is a network, "
            "or pass a local folder"
        )
    if "gated" in lowered or "401" in lowered or "403" in lowered:
        return f"model {name}: the hub wants a token with access to it (`hf auth login`)"
    if "not a valid model identifier" in lowered or "not a local folder" in lowered:
        return f"model {name} is neither a local folder nor a model on the hub"
    return f"model {name} cannot be loaded: {text[:300]}"
