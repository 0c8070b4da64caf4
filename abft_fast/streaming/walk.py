"""Walk through a model once, block by block, with all prompts of a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from abft_fast.runtime import processes
from abft_fast.runtime.freed_memory import give_back_now
from abft_fast.runtime.progress import Progress
from abft_fast.streaming.ahead import ReadingAhead
from abft_fast.streaming.checkpoint import WalkCheckpoint
from abft_fast.streaming.group import PromptGroup
from abft_fast.streaming.model import StreamedModel
from abft_fast.streaming.stages import Stage
from abft_fast.streaming.states import HiddenStates


class Walk:
    """Bring each block's weights, do all stages on it, drop the weights, go on.

    On a GPU the next block's weights are read meanwhile, where the host has room for them. Of
    several processes each reads all weights and computes its share of the prompts.

    Args:
        streamed: the model.
        stages: what is done on each block, in order.
        size: layers of a block.
        states_folder: whose disk keeps hidden states between blocks; None keeps them in memory.
        checkpoint: where the walk's state is saved; None for a walk that cannot be continued.
        states_device: whose memory keeps hidden states that are not in files.

    Raises:
        UserError: the disk has no room for the hidden states.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        stages: Sequence[Stage],
        size: int,
        states_folder: Path | None = None,
        checkpoint: WalkCheckpoint | None = None,
        states_device: torch.device | str = "cpu",
    ):
        self.streamed, self._stages, self._checkpoint = streamed, stages, checkpoint
        starts = range(0, streamed.layers, size)
        self.blocks = [range(start, min(start + size, streamed.layers)) for start in starts]
        self._groups = [group for stage in stages for group in stage.groups]
        self._tokens_of_groups = [sum(group.lengths) for group in self._groups]
        resumable = checkpoint is not None
        self._states = HiddenStates(self._tokens_of_groups, states_folder, states_device, resumable)
        self._states.check_space(streamed.width, streamed.model.dtype.itemsize)

    def read_outside(self, label_ids: Sequence[int]) -> None:
        """Read the weights outside the layers; of the head, the rows of these tokens.

        Raises:
            UserError: prompts are so long that the family cannot pack them.
        """
        self.streamed.read_outside(self._checked_token_ids(), label_ids)

    def read_embedding(self) -> None:
        """Read the embedding's rows, for a walk after the model's first.

        Raises:
            UserError: as `read_outside`.
        """
        self.streamed.read_embedding(self._checked_token_ids())

    def _checked_token_ids(self) -> set[int]:
        """Return the token ids of all prompts; refuse prompts too long to be packed."""
        prompts = [prompt for group in self._groups for prompt in group.prompts]
        self.streamed.check_length(max(map(len, prompts)))
        return {token for prompt in prompts for token in prompt.input_ids}

    def remove_files(self) -> None:
        """Remove the files of hidden states."""
        self._states.remove_files()

    def run(self, progress: Progress, title: str) -> None:
        """Walk from the newest checkpoint, or from the start, to the last block."""
        self._settle()
        done = 0 if self._checkpoint is None else self._restore(self._checkpoint)
        count, tokens = len(self.blocks), sum(self._tokens_of_groups)
        bar = progress.bar(title, count, tokens * (count - done), done)
        reads_ahead = self.streamed.has_room_ahead(self.blocks)
        with bar as advance, ReadingAhead(self.streamed) if reads_ahead else nullcontext() as ahead:
            for number, block in enumerate(self.blocks[done:], start=done + 1):
                self._walk(number, block, ahead)
                advance(1, tokens, f"block {number} of {count}")
        self._join()

    def _restore(self, checkpoint: WalkCheckpoint) -> int:
        """Go on from the newest state, if there is one; return how many blocks are done."""
        done = checkpoint.newest()
        if done:
            with processes.fail_together():
                with checkpoint.restoring(done, self._stages) as (tensors, facts):
                    self._states.restore(tensors, facts["hidden"])
                checkpoint.trained.put_lora_back(self.streamed, self.blocks[:done])
        return done

    def _settle(self) -> None:
        rows = {token: row for row, token in enumerate(self.streamed.embedded)}
        for number, group in enumerate(self._groups):
            group.settle(number, self._states, rows)

    def _walk(self, number: int, block: range, ahead: ReadingAhead | None) -> None:
        with processes.fail_together():
            if ahead is None:
                self.streamed.bring(block)
            else:
                self.streamed.bring(block, ahead.take())
                if number < len(self.blocks):
                    ahead.begin(self.blocks[number])  # numbers begin with 1
        for stage in self._stages:
            with nullcontext() if stage.waits_for_others else processes.fail_together():
                stage.run(block)
            give_back_now()  # else what malloc keeps of each stage adds up
        if self._checkpoint is not None:
            processes.run_on_main(self._checkpoint.trained.keep, self.streamed, block, number)
        self.streamed.drop(block)
        if block.start == 0:
            self.streamed.drop_embedding()
        self._states.swap()
        if self._checkpoint is not None and number < len(self.blocks):
            self._save(self._checkpoint, number)

    def _save(self, checkpoint: WalkCheckpoint, number: int) -> None:
        """Save the state if one is due, or if files hold it, which later blocks overwrite."""
        if checkpoint.is_due(number) or self._states.on_disk:
            tensors, hidden = self._states.save()
            with processes.fail_together():
                checkpoint.save(number, self._stages, tensors, {"hidden": hidden})
            checkpoint.keep_only(number)

    def _join(self) -> None:
        """Give every process what all of them have found."""
        if processes.count() == 1:
            return
        rank = processes.rank()
        own = [
            (
                stage.facts,
                [group.masses_of(self._shares(group)[rank]) for group in stage.groups],
                stage.results,
            )
            for stage in self._stages
        ]
        of_stages = zip(*processes.gather(own), strict=True)
        for stage, found in zip(self._stages, of_stages, strict=True):
            facts, masses, results = zip(*found, strict=True)
            stage.facts = self._join_facts(facts)
            for group, of_group in zip(stage.groups, zip(*masses, strict=True), strict=True):
                for places, part in zip(self._shares(group), of_group, strict=True):
                    group.take_masses(places, part)
            for mine, of_all in zip(stage.results, zip(*results, strict=True), strict=True):
                mine.copy_(sum(of_all[1:], start=of_all[0]))  # 0 where another process found it

    def _shares(self, group: PromptGroup) -> Sequence[Sequence[int]]:
        """Return the places of the prompts of a group that each process computes."""
        return group.shares(processes.count())

    def _join_facts(self, of_processes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return of_processes[0]  # all processes found the same
