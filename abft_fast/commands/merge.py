"""Merge adapters into weights: write a model that plain transformers loads (paper, Eq. 2)."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from abft_fast.commands.adapter_origin import check_adapter_base
from abft_fast.models import loading
from abft_fast.models.trainable import load_adapter
from abft_fast.options import MergeConfig
from abft_fast.runtime.files import atomic_folder, check_output_folder
from abft_fast.runtime.progress import Progress


def merge(config: MergeConfig, progress: Progress) -> None:
    """Write the model plus the sum of each adapter's change times its coefficient.

    Sums are computed in float32 and written in the model's stored dtype. A quantized model is
    dequantized first, because the adapters were trained on its rounded weights.

    Raises:
        UserError: the output folder exists, a model or adapter cannot be read, or an adapter does
            not fit the model.
    """
    check_output_folder(config.output_dir, new=True)
    progress.say(f"loading {config.model}")
    stored = loading.read_config(config.model).dtype or torch.float32
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    bits = config.bits if config.quantized else None
    model = loading.load(config.model, torch.device("cpu"), torch.float32, bits)
    if getattr(model.config, "quantization_config", None) is not None:
        model = model.dequantize()
    for folder, coefficient in config.adapters:
        check_adapter_base(folder, config.model)
        adapted = load_adapter(model, folder)
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", coefficient)
            elif isinstance(module, ModulesToSaveWrapper):
                _interpolate(module, coefficient)
        model = adapted.merge_and_unload(safe_merge=True)
        progress.say(f"merged {folder}, times {coefficient:g}")
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # a trained head has left the embedding
    with atomic_folder(config.output_dir) as temporary:
        model.to(stored).save_pretrained(temporary)
        loading.read_tokenizer(config.model).save_pretrained(temporary)


def _interpolate(wrapper: ModulesToSaveWrapper, coefficient: float) -> None:
    """Move a trained copy of a module to base + coefficient * (copy - base)."""
    trained = wrapper.modules_to_save["default"].state_dict()
    for name, base in wrapper.original_module.state_dict().items():
        trained[name].sub_(base).mul_(coefficient).add_(base)
