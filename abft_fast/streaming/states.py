"""Keep the hidden states between blocks, in memory or in files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abft_fast.errors import RunError, UserError
from abft_fast.runtime.tensor_file import with_prefix

HIDDEN_STATES = "hidden-*.bin"
"""The files that keep hidden states, in their folder."""


class HiddenStates:
    """Hidden states of all groups of prompts: those that enter a block, and those that leave it.

    A group is read and written as a whole. What was written enters the next block after `swap`.

    Args:
        tokens: of each group.
        folder: whose disk keeps them in two files; None keeps the states in memory.
        device: whose memory keeps them.
        resumable: whether another process may go on from the files; otherwise they have no names,
            and are gone with this process.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        folder: Path | None,
        device: torch.device | str = "cpu",
        resumable: bool = True,
    ):
        self.device = device
        self._starts = np.cumsum([0, *tokens]).tolist()
        self._folder, self._resumable = folder, resumable
        self._files: dict[int, Any] = {}  # open, by side
        self._entering: dict[int, Tensor] = {}
        self._leaving: dict[int, Tensor] = {}
        self._side = 0
        self._width, self._dtype = 0, torch.float32

    @property
    def on_disk(self) -> bool:
        """Return whether the states are in files."""
        return self._folder is not None

    def read(self, group: int) -> Tensor:
        """Return a group's hidden states that enter the block, (T, width).

        Raises:
            RunError: their file is gone or cut short.
        """
        if self._folder is None:
            return self._entering[group]
        start, end = self._starts[group : group + 2]
        states = torch.empty(end - start, self._width, dtype=self._dtype)
        path, read = self._path(self._side), 0
        if self._side in self._files or path.exists():
            file = self._file(self._side, start * self._width * states.itemsize)
            read = file.readinto(states.view(torch.uint8).numpy().data)
        if read != states.nbytes:
            raise RunError(
                f"{path}, the hidden states between two blocks, is gone or cut short: delete "
                f"{self._folder} to start the walk again"
            )
        return states

    def write(self, group: int, states: Tensor) -> None:
        """Keep the hidden states of a group that leave the block, (T, width)."""
        if self._folder is None:
            self._leaving[group] = states
            return
        self._width, self._dtype = states.shape[1], states.dtype
        file = self._file(1 - self._side, self._starts[group] * self._width * states.itemsize)
        file.write(states.contiguous().view(torch.uint8).numpy().data)

    def swap(self) -> None:
        """Let what left one block enter the next; files that stay are then on the disk itself."""
        self._entering, self._leaving = self._leaving, {}
        self._side = 1 - self._side
        if self._resumable and self._side in self._files:
            file = self._files[self._side]
            file.flush()
            os.fsync(file.fileno())

    def save(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return what a checkpoint needs besides the files: tensors, and facts for JSON."""
        facts = {"side": self._side, "width": self._width, "dtype": str(self._dtype).split(".")[1]}
        return {f"hidden.{group}": states for group, states in self._entering.items()}, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """Go on from what `save` returned."""
        hidden = with_prefix(tensors, "hidden.")
        self._entering = {int(group): states for group, states in hidden.items()}
        self._side, self._width = facts["side"], facts["width"]
        self._dtype = getattr(torch, facts["dtype"])

    def check_space(self, width: int, itemsize: int) -> None:
        """Refuse a disk that cannot hold the files.

        Raises:
            UserError: two files of all hidden states do not fit.
        """
        if self._folder is None:
            return
        held = sum(path.stat().st_size for path in map(self._path, (0, 1)) if path.exists())
        there = next(path for path in (self._folder, *self._folder.parents) if path.is_dir())
        needed = 2 * self._starts[-1] * width * itemsize
        free = shutil.disk_usage(there).free + held
        if needed > free:
            raise UserError(
                f"{self._folder} has {free / 1e9:.1f} GB free, and the hidden states of all "
                f"prompts need {needed / 1e9:.1f} GB there: free space, train on fewer prompts "
                "(--train-samples), or write to another disk (--output-dir, or predict's --output)"
            )

    def remove_files(self) -> None:
        """Remove the files, after the walk."""
        for file in self._files.values():
            file.close()
        self._files = {}
        if self._folder is not None and self._resumable:
            for side in (0, 1):
                self._path(side).unlink(missing_ok=True)

    def _file(self, side: int, offset: int) -> Any:
        """Return a side's file at a byte offset; make it if it is not there."""
        if side not in self._files:
            path = self._path(side)
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._resumable:
                self._files[side] = path.open("r+b" if path.exists() else "x+b")
            else:
                self._files[side] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115
        self._files[side].seek(offset)
        return self._files[side]

    def _path(self, side: int) -> Path:
        assert self._folder is not None
        return self._folder / HIDDEN_STATES.replace("*", str(side))
