"""Save and restore a walk through a model: where all prompts are, and what was found so far."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from abft_fast.errors import UserError
from abft_fast.runtime import processes
from abft_fast.runtime.files import atomic_folder
from abft_fast.runtime.tensor_file import with_prefix
from abft_fast.streaming.stages import Stage
from abft_fast.streaming.states import HIDDEN_STATES
from abft_fast.streaming.trained_blocks import TrainedBlocks, checkpoint_errors

BLOCK, STEP = "block", "step"
_TENSORS, _FACTS = "state.safetensors", "state.json"


class WalkCheckpoint:
    """The saved states of a walk. Construct it before `processes.apart`, which renumbers ranks.

    After the third block process 0 saves its state in `block-000003/state-0/`, and the other
    processes save theirs beside it. A pipeline does so after training steps, as in
    `step-000008/state-0/`.

    Args:
        folder: of the checkpoints.
        every: blocks, or steps, between two states.
        unit: what is counted: `BLOCK` or `STEP`.

    Attributes:
        trained: what blocks have learnt.
    """

    def __init__(self, folder: Path, every: int, unit: str = BLOCK):
        self.trained = TrainedBlocks(folder)
        self._folder, self._every, self._unit = folder, every, unit
        self._rank, self._processes = processes.rank(), processes.count()

    def is_due(self, number: int) -> bool:
        """Return whether the state after so many blocks or steps is to be saved."""
        return number % self._every == 0

    def save(
        self, number: int, stages: Sequence[Stage], tensors: dict[str, Tensor], facts: dict
    ) -> None:
        """Write this process's state after a block or step.

        Args:
            number: of the block or step, from 1.
            stages: of the walk.
            tensors: what is saved besides the stages' own state.
            facts: the same, for JSON.
        """
        of_stages = []
        for index, stage in enumerate(stages):
            own, found = stage.state()
            tensors = tensors | {f"stage.{index}.{name}": tensor for name, tensor in own.items()}
            of_stages.append(found)
        facts = {**facts, "processes": self._processes, "stages": of_stages}
        with atomic_folder(self._state(number)) as temporary:
            save_file(tensors, temporary / _TENSORS)
            (temporary / _FACTS).write_text(json.dumps(facts), encoding="utf-8")

    def keep_only(self, number: int) -> None:
        """Remove all states of this process but one, which every process must have saved."""
        kept = self._state(number)
        for state in self._folder.glob(f"{self._unit}-*/{kept.name}"):
            if state != kept:
                shutil.rmtree(state, ignore_errors=True)
                with contextlib.suppress(OSError):  # it is not empty
                    state.parent.rmdir()

    def newest(self) -> int:
        """Return the newest block or step whose state all processes have saved, or 0.

        All that is newer is removed.

        Raises:
            RunError: a file is damaged.
            UserError: another number of processes has saved it.
        """
        with processes.fail_together():
            # A state in the other unit was saved by another number of processes: it is refused.
            newest = {unit: self._newest(unit) for unit in (BLOCK, STEP)}
        number = processes.from_main(newest[self._unit])
        # A pipeline writes what blocks have learnt after its last step.
        processes.run_on_main(self.trained.forget_after, number if self._unit == BLOCK else 0)
        with processes.fail_together():
            self.keep_only(number)
        return number

    def _newest(self, unit: str) -> int:
        for facts in sorted(self._folder.glob(f"{unit}-*/state-0/{_FACTS}"), reverse=True):
            folder = facts.parent.parent
            with checkpoint_errors(facts.parent, self._folder):
                count = int(json.loads(facts.read_text(encoding="utf-8"))["processes"])
            if all((folder / f"state-{rank}" / _FACTS).is_file() for rank in range(count)):
                self._check_count(count)
                return int(folder.name.removeprefix(f"{unit}-"))
        return 0

    def _check_count(self, saved: int) -> None:
        if saved != self._processes:
            whose = "one process" if saved == 1 else f"{saved} processes"
            raise UserError(
                f"{self._folder} was saved by a run of {whose}, and this run has "
                f"{self._processes}: resume the run with {whose}, or delete that folder to start "
                "the walk again"
            )

    @contextlib.contextmanager
    def restoring(
        self, number: int, stages: Sequence[Stage]
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Yield the saved tensors and facts; after the body, give the stages their state back.

        Raises:
            RunError: a file is damaged.
            UserError: the state does not fit what is there now.
        """
        state = self._state(number)
        with checkpoint_errors(state, self._folder):
            tensors = load_file(state / _TENSORS)
            facts = json.loads((state / _FACTS).read_text(encoding="utf-8"))
            yield tensors, facts
            for index, (stage, found) in enumerate(zip(stages, facts["stages"], strict=True)):
                stage.restore(with_prefix(tensors, f"stage.{index}."), found)
        for stage in stages:
            stage.check_restored()

    def _state(self, number: int) -> Path:
        return self._folder / f"{self._unit}-{number:06d}" / f"state-{self._rank}"


def remove_saved_walk(folder: Path) -> None:
    """Remove what walks have saved among checkpoints: a run with an adapter is done."""
    for unit in (BLOCK, STEP):
        for state in folder.glob(f"{unit}-*"):
            shutil.rmtree(state)
    for file in folder.glob(HIDDEN_STATES):
        file.unlink()
