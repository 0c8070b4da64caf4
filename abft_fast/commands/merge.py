"""Merge adapters or trained models into weights; plain transformers loads the result (Eq. 2)."""

from __future__ import annotations

import torch

from abft_fast.models import loading
from abft_fast.models.base_identity import compare_adapter, describe_base
from abft_fast.models.files import is_whole_model
from abft_fast.models.merging import add_adapters
from abft_fast.options import MergeConfig
from abft_fast.runtime.files import atomic_folder, check_output_folder
from abft_fast.runtime.progress import Progress


def merge(config: MergeConfig, progress: Progress) -> None:
    """Write the model plus the sum of each trained change times its coefficient.

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
    base = describe_base(model, config.model)
    folders = [folder for folder, _ in config.adapters]
    notes = loading.left_out(config.model, *folders)
    for folder in folders:
        if is_whole_model(folder):
            continue  # its weights are compared one by one
        notes += compare_adapter(folder, base)
    for line in notes:
        progress.say(line)
    if getattr(model.config, "quantization_config", None) is not None:
        model = model.dequantize()
    model = add_adapters(model, config.adapters, progress.say)
    with atomic_folder(config.output_dir) as temporary:
        model.to(stored).save_pretrained(temporary)
        loading.save_tokenizer(config.model, temporary)
