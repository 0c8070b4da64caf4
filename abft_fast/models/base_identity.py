"""Know a base again by a sample of its weights, which a run and its adapter record.

A hash of weights changes with the dtype that they are loaded in, and with every quantization.
Numbers can be compared up to what rounding changes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import QuantizationMethod

from abft_fast.builtin import builtin_model_path
from abft_fast.core.backbone import backbone, decoder_layers
from abft_fast.errors import UserError
from abft_fast.models.files import ADAPTER_CONFIG, check_adapter, gguf_file
from abft_fast.models.synthetic import is_quantized

BASE = "base.json"
"""The file in an adapter's folder that holds its base."""

_NUMBERS = 16  # of each weight
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ROUNDING = 2**-8  # relative; one rounding to bfloat16 changes a number by half of it
_QUANTIZATION = 0.7  # relative; NF4 is about 0.1 away from a float matrix, another matrix 1.4


def describe_base(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """Return what a run records of its base.

    Args:
        model: the base as it was loaded; nothing is trained yet.
        name: as `--model` names it.

    Returns:
        `model`: a name or an absolute path; `quantized`: whether its matrices have few bits;
        `vectors` and `matrices`: numbers of the weights in the first, the middle and the last
        decoder layer, by name. Formats that move scales from weight to weight, as AWQ does, have
        no numbers.
    """
    stored = getattr(model.config, "quantization_config", None)
    numbers = no_numbers()
    if stored is None or stored.quant_method == QuantizationMethod.BITS_AND_BYTES:
        layers = decoder_layers(backbone(model))
        for index in described_layers(len(layers)):
            for part, module in layers[index].named_modules():
                for own, _ in module.named_parameters(recurse=False):
                    add_numbers(numbers, f"layers.{index}.{part}.{own}", module, own)
    return {**describe_name(name, stored is not None), **numbers}


def describe_name(name: str, quantized: bool) -> dict[str, Any]:
    """Return what a run records of its base without looking at weights.

    Args:
        name: as `--model` names it.
        quantized: whether the model's matrices have few bits; those of GGUF have, anyway.
    """
    path = gguf_file(name)
    return {
        "model": _full_name(name if path is None else str(path)),
        "quantized": quantized or path is not None,
    }


def no_numbers() -> dict[str, dict[str, str]]:
    """Return an empty record, for `add_numbers`."""
    return {"vectors": {}, "matrices": {}}


def described_layers(count: int) -> list[int]:
    """Return the layers whose numbers identify a model of `count` decoder layers."""
    return sorted({0, count // 2, count - 1})


def add_numbers(numbers: dict[str, dict[str, str]], name: str, module: nn.Module, own: str) -> None:
    """Add numbers of a module's parameter `own`; `name` is the parameter's in the decoder."""
    weight: Tensor = module.get_parameter(own)
    if is_quantized(module) and own == "weight":
        weight = dequantize_module_weight(module)
    if weight.dtype in _FLOATS:
        numbers["vectors" if weight.ndim == 1 else "matrices"][name] = sample(weight)


def base_of_adapter(folder: Path) -> dict[str, Any]:
    """Return the base that an adapter records; without a record, what PEFT's config says of it.

    Raises:
        UserError: the folder holds no adapter that changes weights, or the record is damaged.
    """
    check_adapter(folder)
    path = folder / BASE
    if path.is_file():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path} is not JSON: copy the adapter again") from None
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    known = _full_name(name) if isinstance(name, str) and name else None
    return {"model": known, "quantized": False, "vectors": {}, "matrices": {}}


def compare_bases(trained_on: dict[str, Any], now: dict[str, Any], what: str) -> list[str]:
    """Refuse another base; return a line if that cannot be told and the names differ.

    Args:
        trained_on: the base that is recorded.
        now: the base that is used.
        what: what was trained on it, such as `adapter FOLDER`.

    Raises:
        UserError: the two have other weights, by more than rounding and quantization change.
    """
    known, model = trained_on["model"], now["model"]
    quantized = trained_on["quantized"] or now["quantized"]
    distances: list[float] = []
    # Vectors, as those of norms, are kept in float by every format that is compared here.
    for kind, tolerance in (
        ("vectors", _ROUNDING),
        ("matrices", _QUANTIZATION if quantized else _ROUNDING),
    ):
        before, after = trained_on[kind], now[kind]
        if not before or not after:
            continue
        distances += [_distance(before[name], after[name]) for name in before.keys() & after.keys()]
        if before.keys().isdisjoint(after) or not all(d <= tolerance for d in distances):
            other = "its files have" if model == known else f"{model} has"
            raise UserError(
                f"{what} was trained on {known}, and {other} other weights: use the model that it "
                "was trained on"
            )
    if model == known or known is None or (distances and all(d <= _ROUNDING for d in distances)):
        return []
    if distances:
        return [f"{what} was trained on {known}; {model} has its weights, rounded otherwise"]
    return [f"{what} names {known} as its base: make sure that {model} is the same model"]


def compare_adapter(folder: Path, base: dict[str, Any]) -> list[str]:
    """Refuse an adapter of another base; return lines as `compare_bases` does."""
    return compare_bases(base_of_adapter(folder), base, f"adapter {folder}")


def sample(weight: Tensor) -> str:
    """Return numbers from all over a weight, with 4 digits."""
    flat, count = weight.detach().flatten(), weight.numel()
    places = [count * i // _NUMBERS for i in range(_NUMBERS)]
    return " ".join(f"{number:.4g}" for number in flat[places].tolist())


def _distance(before: str, after: str) -> float:
    """Return the relative distance of two samples."""
    first, second = (torch.tensor([float(x) for x in text.split()]) for text in (before, after))
    norm = first.norm().item()
    difference = (first - second).norm().item()
    return difference / norm if norm else difference


def _full_name(name: str) -> str:
    """Return a model's name, or its absolute path."""
    if name == "builtin" or not os.path.exists(name):
        return name
    path = Path(name).resolve()
    return "builtin" if path == builtin_model_path().resolve() else str(path)
