"""Walk through a model with several processes at once: each one holds some of the blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from abft_fast.errors import UserError
from abft_fast.runtime import launch, processes
from abft_fast.runtime.neighbours import Neighbours
from abft_fast.runtime.progress import Progress
from abft_fast.streaming.checkpoint import WalkCheckpoint
from abft_fast.streaming.group import PromptGroup
from abft_fast.streaming.model import StreamedModel
from abft_fast.streaming.stages import StageInTurns
from abft_fast.streaming.walk import Walk


def block_shares(blocks: int, processes: int) -> list[range]:
    """Return which consecutive blocks each process holds; their numbers differ by 1 at most.

    Raises:
        UserError: there are fewer blocks than processes.
    """
    if blocks < processes:
        raise UserError(
            f"--pipeline: {processes} processes for {blocks} blocks of layers: start at most "
            f"{blocks}, or use a smaller --gradient"
        )
    ends = [blocks * rank // processes for rank in range(processes + 1)]
    return [range(*pair) for pair in itertools.pairwise(ends)]


class PipelinedWalk(Walk):
    """Hold consecutive blocks for the whole walk; take the turns of every stage on all of them.

    No gradient leaves a block. So a process hands the hidden states of a turn to the next process,
    and takes the next turn while that one works. From the turn on that has reached the last
    process, all of them work. Every number is that of a walk of one process.

    Args:
        streamed: the model.
        stages: what is done on each block, in order.
        size: layers of a block.
        checkpoint: where each block's weights are written after the walk; None writes nothing.

    Raises:
        UserError: there are fewer blocks than processes.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        stages: Sequence[StageInTurns],
        size: int,
        checkpoint: WalkCheckpoint | None,
    ):
        super().__init__(streamed, stages, size, None, checkpoint, streamed.device)
        self._in_turns = stages
        self._own = block_shares(len(self.blocks), processes.count())[launch.rank()]
        width = streamed.model.config.get_text_config(decoder=True).hidden_size
        self._neighbours = Neighbours(width, streamed.model.dtype)

    def run(self, progress: Progress, title: str) -> None:
        """Walk from the start to the last block; then every process has the stages' results.

        Raises:
            FailedApart: the error of this process, during the walk.
            ProcessEnded: another process has ended.
        """
        self._settle()
        if self._checkpoint is not None:
            processes.run_on_main(self._checkpoint.start_again)
        turns = [len(stage.turns) for stage in self._in_turns]
        with processes.apart(), progress.bar(title, sum(turns), self.tokens) as advance:
            self._bring_all()
            for stage in self._in_turns:
                for number in self._own:
                    self._on(number, stage.begin)
                for turn, groups in enumerate(stage.turns):
                    self._take(stage, turn, groups)
                    advance(1, sum(sum(group.lengths) for group in groups))
                for number in self._own:
                    self._on(number, stage.end)
            self._neighbours.finish()
            self._drop_all()
        self._join()

    def _bring_all(self) -> None:
        for number in self._own:
            self.streamed.bring(self.blocks[number])
            self.streamed.pass_by(self.blocks[number])
        if not self._neighbours.is_first:
            self.streamed.drop_embedding()

    def _on(self, number: int, do: Callable[..., None], *arguments: object) -> None:
        """Do something on a block, while hidden states pass all others by."""
        block = self.blocks[number]
        self.streamed.run_layers(block)
        do(block, *arguments)
        self.streamed.pass_by(block)

    def _take(self, stage: StageInTurns, turn: int, groups: Sequence[PromptGroup]) -> None:
        if not self._neighbours.is_first:
            for group in groups:
                group.arrive(self._neighbours.receive(sum(group.lengths)))
        for number in self._own:
            self._states.turn()
            self._on(number, stage.take, turn)
        if not self._neighbours.is_last:
            self._states.turn()
            for group in groups:
                self._neighbours.send(group.depart())

    def _drop_all(self) -> None:
        for number in self._own:
            block = self.blocks[number]
            if self._checkpoint is not None:
                self._checkpoint.keep_trained(self.streamed, block, number + 1)
            self.streamed.drop(block)

    def _places(self, group: PromptGroup) -> Sequence[Sequence[int]]:
        """Return all prompts of a group for each process: it computes them on its own blocks."""
        return [range(len(group.prompts))] * processes.count()

    def _join_facts(self, of_processes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join what processes found, in order of their blocks."""
        joined = of_processes[0]
        for facts in of_processes[1:]:
            for name, found in facts.items():
                before = joined[name]
                joined[name] = before + found if isinstance(found, list) else {**before, **found}
        return joined
