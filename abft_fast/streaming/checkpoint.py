"""Save and restore a walk through a model: what was trained so far, and where all prompts are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from abft_fast.errors import RunError, UserError
from abft_fast.runtime import processes
from abft_fast.runtime.files import atomic_folder
from abft_fast.streaming.model import StreamedModel
from abft_fast.streaming.stages import Stage
from abft_fast.streaming.states import HiddenStates

_TRAINED, _STATE, _FACTS = "trained.safetensors", "state.safetensors", "state.json"


class WalkCheckpoint:
    """The checkpoints of a walk.

    `block-000003/` has what the third block has learnt, in `trained.safetensors`. The folder of the
    newest checkpoint also has the state of the walk after that block: `state-0/`, and one such
    folder for each further process that takes a share of the prompts.

    Args:
        folder: of the checkpoints.
        every: blocks between two states of the walk.
    """

    def __init__(self, folder: Path, every: int):
        self._folder, self._every = folder, every
        self._saved = 0  # the block of the newest state

    def keep_trained(self, streamed: StreamedModel, block: range, number: int) -> None:
        """Write what the block has learnt."""
        with atomic_folder(self._of(number)) as temporary:
            save_file(_learnt(streamed, block), temporary / _TRAINED)

    def save(self, stages: Sequence[Stage], states: HiddenStates, number: int) -> None:
        """Write this process's state of the walk after a block, if one is due."""
        if number % self._every and not states.on_disk:
            return
        tensors, hidden = states.save()
        for index, stage in enumerate(stages):
            for place, group in enumerate(stage.groups):
                for name, mass in group.masses.items():
                    tensors[f"masses.{index}.{place}.{name}"] = mass
        facts = {
            "processes": processes.count(),
            "hidden": hidden,
            "stages": [stage.facts for stage in stages],
        }
        with (
            processes.fail_together(),
            atomic_folder(self._state(number, processes.rank())) as temporary,
        ):
            save_file(tensors, temporary / _STATE)
            (temporary / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        shutil.rmtree(self._state(self._saved, processes.rank()), ignore_errors=True)
        self._saved = number

    def restore(
        self,
        streamed: StreamedModel,
        stages: Sequence[Stage],
        states: HiddenStates,
        blocks: Sequence[range],
    ) -> int:
        """Load the newest state of the walk; forget what later blocks have learnt.

        Returns:
            How many blocks are done.

        Raises:
            RunError: a file is damaged.
            UserError: another number of processes has saved it.
        """
        with processes.fail_together():
            done = self._newest(len(blocks))
        done = self._saved = processes.from_main(done)
        processes.run_on_main(self._forget_after, done, len(blocks))
        if done:
            with processes.fail_together():
                self._restore(streamed, stages, states, blocks[:done])
        return done

    def _newest(self, blocks: int) -> int:
        """Return the last block after which all processes have saved their state, or 0."""
        for number in range(blocks, 0, -1):
            first = self._state(number, 0)
            count = self._processes_of(first) if first.is_dir() else 0
            if count and all(self._state(number, rank).is_dir() for rank in range(count)):
                self._check_count(count)
                return number
        return 0

    def _check_count(self, saved: int) -> None:
        if saved != processes.count():
            whose = "one process" if saved == 1 else f"{saved} processes"
            raise UserError(
                f"{self._folder} has the state of a walk of {whose}, and {processes.count()} run: "
                f"resume the run with {whose}, or delete that folder to start the walk again"
            )

    def _processes_of(self, folder: Path) -> int:
        """Return how many processes have saved a state together with this one."""
        try:
            return int(json.loads((folder / _FACTS).read_text(encoding="utf-8"))["processes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(folder, error) from error

    def _damaged(self, folder: Path, error: Exception) -> RunError:
        return RunError(
            f"checkpoint {folder} cannot be read ({error}): delete {self._folder} to start the "
            "walk again"
        )

    def _forget_after(self, done: int, blocks: int) -> None:
        for number in range(done + 1, blocks + 1):
            shutil.rmtree(self._of(number), ignore_errors=True)

    def _restore(
        self,
        streamed: StreamedModel,
        stages: Sequence[Stage],
        states: HiddenStates,
        blocks: Sequence[range],
    ) -> None:
        folder = self._state(len(blocks), processes.rank())
        try:
            tensors = load_file(folder / _STATE)
            facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            states.restore(tensors, facts["hidden"])
            for index, (stage, known) in enumerate(zip(stages, facts["stages"], strict=True)):
                stage.facts = known
                for place, group in enumerate(stage.groups):
                    start = f"masses.{index}.{place}."
                    own = {n: tensor for n, tensor in tensors.items() if n.startswith(start)}
                    group.masses = {n.removeprefix(start): mass for n, mass in own.items()}
            self._put_lora_back(streamed, blocks)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise self._damaged(folder, error) from error

    def start_again(self) -> None:
        """Remove what blocks have learnt, for a pipeline, which cannot go on from a saved walk.

        Raises:
            UserError: there is the state of a walk.
        """
        if any(self._folder.glob("block-*/state-0")):
            raise UserError(
                f"{self._folder} has the state of a walk of one process, which a pipeline "
                "cannot go on from: resume the run without a launcher, or delete that folder to "
                "start the walk again"
            )
        self.remove()

    def put_trained_back(self, streamed: StreamedModel, blocks: Sequence[range]) -> None:
        """Give the model what all blocks have learnt, to write the adapter."""
        self._put_lora_back(streamed, blocks)
        for number, block in enumerate(blocks, start=1):
            tensors = load_file(self._of(number) / _TRAINED)
            for name, module in streamed.trained_modules(block).items():
                for own_name, _ in list(module.named_parameters(recurse=False)):
                    weight = nn.Parameter(tensors[f"{name}.{own_name}"], requires_grad=False)
                    setattr(module, own_name, weight)

    def remove(self) -> None:
        """Remove all checkpoints: a run with an adapter is done."""
        for folder in self._folder.glob("block-*"):
            shutil.rmtree(folder)

    def _put_lora_back(self, streamed: StreamedModel, blocks: Sequence[range]) -> None:
        for number, block in enumerate(blocks, start=1):
            with safe_open(self._of(number) / _TRAINED, framework="pt") as file:
                if streamed.trained_modules(block):  # weights of their own, read at the end
                    continue
                parameters: dict[str, Any] = streamed.trained_parameters(block)
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter.copy_(file.get_tensor(name))

    def _of(self, number: int) -> Path:
        return self._folder / f"block-{number:06d}"

    def _state(self, number: int, rank: int) -> Path:
        return self._of(number) / f"state-{rank}"


def _learnt(streamed: StreamedModel, block: range) -> dict[str, Tensor]:
    """Return LoRA of a block, or its trained modules with what they have besides the weight."""
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
