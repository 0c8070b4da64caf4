"""Save and restore everything a run needs to continue bit-identically: safetensors and JSON."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from abft_fast.errors import RunError
from abft_fast.runtime.files import atomic_folder
from abft_fast.runtime.tensor_file import with_prefix
from abft_fast.training.penalty import PenaltyController

_KEEP = 2


def save(
    folder: Path,
    step: int,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    controller: PenaltyController,
) -> None:
    """Write the state after `step` steps; keep the two newest checkpoints."""
    tensors = tensors_of(trained, optimizer)
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    state = {"step": step, "controller": asdict(controller), "random": random.getstate()}
    with atomic_folder(folder / f"step-{step:06d}") as temporary:
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in _complete(folder)[:-_KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def restore(
    folder: Path,
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    controller: PenaltyController,
) -> int:
    """Load the newest checkpoint into the given objects.

    Returns:
        How many steps the checkpoint has; 0 where there is no checkpoint.

    Raises:
        RunError: the checkpoint is damaged or belongs to another model.
    """
    complete = _complete(folder)
    if not complete:
        return 0
    newest = complete[-1]
    try:
        tensors = load_file(newest / "state.safetensors")
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        version, internal, gauss = state["random"]
        taken, penalty_state = state["step"], state["controller"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"checkpoint {newest} cannot be read ({error}): delete it to continue from the "
            "one before"
        ) from error
    saved = with_prefix(tensors, "trained.")
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in trained.items()}:
        raise RunError(f"checkpoint {newest} holds other weights than this model trains")
    put_back(tensors, trained, optimizer)
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    random.setstate((version, tuple(internal), gauss))
    vars(controller).update(penalty_state)
    return taken


def tensors_of(
    trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return what `put_back` takes: trained parameters and the optimizer's moments, on the CPU."""
    tensors = {f"trained.{name}": p.detach().cpu().contiguous() for name, p in trained.items()}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            tensors[f"optimizer.{index}.{name}"] = value.detach().cpu().contiguous()
    return tensors


def put_back(
    tensors: dict[str, Tensor],
    trained: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Give the parameters and the optimizer what `tensors_of` returned of them."""
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[f"trained.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in with_prefix(tensors, "optimizer.").items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def _complete(folder: Path) -> list[Path]:
    """Return the checkpoints that were written completely, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []
