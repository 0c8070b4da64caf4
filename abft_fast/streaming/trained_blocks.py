"""Keep what each block of a walk has learnt in a file, until the adapter is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from abft_fast.errors import RunError, UserError
from abft_fast.runtime.files import atomic_folder
from abft_fast.streaming.model import StreamedModel

_FILE = "trained.safetensors"


@contextmanager
def checkpoint_errors(path: Path, folder: Path) -> Iterator[None]:
    """Turn an error while a checkpoint is read into a RunError that names it.

    Args:
        path: of the checkpoint.
        folder: of all checkpoints, which is to be deleted if this one cannot be read.

    Raises:
        RunError: the checkpoint cannot be read.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"checkpoint {path} cannot be read ({error}): delete {folder} to start the walk again"
        ) from error


class TrainedBlocks:
    """What blocks have learnt: the third one's is in `block-000003/trained.safetensors`.

    Args:
        folder: of the checkpoints.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def keep(self, streamed: StreamedModel, block: range, number: int) -> None:
        """Write what a block has learnt; numbers begin with 1."""
        with atomic_folder(self._of(number)) as temporary:
            save_file(_learnt(streamed, block), temporary / _FILE)

    def put_back(self, streamed: StreamedModel, blocks: Sequence[range]) -> None:
        """Give the model what all blocks have learnt, to write the adapter."""
        self.put_lora_back(streamed, blocks)
        for number, block in enumerate(blocks, start=1):
            modules = streamed.trained_modules(block)
            path = self._of(number) / _FILE
            with checkpoint_errors(path, self._folder):
                tensors = load_file(path) if modules else {}
            for name, module in modules.items():
                for own_name, _ in list(module.named_parameters(recurse=False)):
                    weight = nn.Parameter(tensors[f"{name}.{own_name}"], requires_grad=False)
                    setattr(module, own_name, weight)

    def put_lora_back(self, streamed: StreamedModel, blocks: Sequence[range]) -> None:
        """Give the model the LoRA of blocks."""
        for number, block in enumerate(blocks, start=1):
            path = self._of(number) / _FILE
            with checkpoint_errors(path, self._folder), safe_open(path, framework="pt") as file:
                if streamed.trained_modules(block):  # `put_back` reads these, at the end
                    continue
                parameters: dict[str, Any] = streamed.trained_parameters(block)
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter.copy_(file.get_tensor(name))

    def forget_after(self, done: int) -> None:
        """Remove what the blocks after the first `done` have learnt."""
        for folder in self._folder.glob("block-*"):
            if int(folder.name.removeprefix("block-")) > done:
                shutil.rmtree(folder)

    def _of(self, number: int) -> Path:
        return self._folder / f"block-{number:06d}"


def _learnt(streamed: StreamedModel, block: range) -> dict[str, Tensor]:
    """Return a block's LoRA parameters, or the weights and biases of its trained modules."""
    modules = streamed.trained_modules(block)
    if not modules:
        return _on_cpu(streamed.trained_parameters(block))
    return _on_cpu(
        {
            f"{name}.{own_name}": parameter
            for name, module in modules.items()
            for own_name, parameter in module.named_parameters(recurse=False)
        }
    )


def _on_cpu(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
