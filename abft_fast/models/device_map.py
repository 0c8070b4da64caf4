"""Split a model by layers over all GPUs of this machine; no layer goes to the CPU or the disk."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from abft_fast.errors import UserError
from abft_fast.runtime.launch import process_count

_FOR_WEIGHTS = 0.9  # of a GPU's free memory


def over_all_gpus(device: torch.device) -> dict[str, Any] | None:
    """Return arguments of `from_pretrained` that split the model evenly; None on a CPU.

    Raises:
        UserError: several processes were launched, each of which would want all GPUs.
    """
    if process_count() > 1:
        raise UserError(
            f"--device-map auto splits one model over all GPUs, but {process_count()} processes "
            "were launched: start the run without a launcher, or leave out --device-map"
        )
    if device.type != "cuda":
        return None
    gpus = range(torch.cuda.device_count())
    free = {gpu: int(_FOR_WEIGHTS * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}
    return {"device_map": "auto", "max_memory": {**free, "cpu": 0}}


def refuse_offloaded(model: PreTrainedModel, name: str) -> None:
    """Make sure that every part is on a GPU.

    Raises:
        UserError: a part is on the disk or, beside GPUs, on the CPU.
    """
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        raise UserError(does_not_fit(name))


def does_not_fit(name: str) -> str:
    """Return the line for a model that is larger than all GPUs."""
    gpus = torch.cuda.device_count()
    return (
        f"model {name} does not fit in the memory of {gpus} GPU{'' if gpus == 1 else 's'}: "
        "use --quantized, more GPUs, or a smaller model"
    )
