"""Walk through a model with several processes at once: each one holds some of the blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from abft_fast.errors import UserError
from abft_fast.runtime import processes
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


def size_of_pipelines(wanted: int | None, processes: int) -> int:
    """Return how many processes form a pipeline: those wanted, or all; one alone forms its own.

    Raises:
        UserError: the processes do not form whole pipelines of that size.
    """
    size = processes if wanted is None or processes == 1 else wanted
    if processes % size:
        raise UserError(
            f"--pipeline-size {size}: {processes} processes do not form pipelines of {size}: "
            f"start a multiple of {size}"
        )
    return size


class PipelinedWalk(Walk):
    """Hold consecutive blocks for the whole walk; take the turns of every stage on all of them.

    No gradient leaves a block. So a process hands the hidden states of a turn to the next process,
    and takes the next turn while that one works. Once a turn has reached the last process, all
    processes work. Every number is that of a walk of one process. Where there are more
    processes than a pipeline has, several pipelines share the prompts of every turn, and the
    processes that hold the same blocks sum their gradients.

    Args:
        streamed: the model.
        stages: what is done on each block, in order.
        size: layers of a block.
        checkpoint: where states are saved after training steps, and blocks' weights after the walk;
            None saves nothing.
        pipeline_size: processes of a pipeline. Their ranks are consecutive.

    Raises:
        UserError: there are fewer blocks than processes of a pipeline.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        stages: Sequence[StageInTurns],
        size: int,
        checkpoint: WalkCheckpoint | None,
        pipeline_size: int,
    ):
        super().__init__(streamed, stages, size, None, checkpoint, streamed.device)
        self._in_turns, self._pipeline_size = stages, pipeline_size
        self._neighbours = Neighbours(pipeline_size, streamed.width, streamed.model.dtype)
        self._own = block_shares(len(self.blocks), pipeline_size)[self._neighbours.place]
        self._saved = 0  # the step of the newest state

    def run(self, progress: Progress, title: str) -> None:
        """Walk from the newest state, or from the start; then every process has all results.

        Raises:
            FailedApart: the error of this process, during the walk.
            ProcessEnded: another process has ended.
        """
        saved = 0 if self._checkpoint is None else self._checkpoint.newest()
        tokens = [_count_tokens(turn) for stage in self._in_turns for turn in stage.turns]
        same_blocks = [
            range(i, processes.count(), self._pipeline_size) for i in range(self._pipeline_size)
        ]
        with processes.apart(same_blocks):
            self._settle()
            self._bring_all()
            first, taken = self._go_on_from(saved) if saved else (0, 0)
            done = sum(len(stage.turns) for stage in self._in_turns[:first]) + taken
            with progress.bar(title, len(tokens), sum(tokens[done:]), done) as advance:
                for index, stage in enumerate(self._in_turns[first:], start=first):
                    if not taken:
                        self._on_own(stage.begin)
                    for turn, groups in itertools.islice(enumerate(stage.turns), taken, None):
                        self._take(stage, turn, groups)
                        self._save_if_due(index, turn + 1)
                        advance(1, _count_tokens(groups))
                    self._on_own(stage.end)
                    taken = 0
            self._neighbours.finish()
            self._drop_all()
        self._join()

    def _go_on_from(self, saved: int) -> tuple[int, int]:
        """Restore a state; return the stage that it is in, and the turns taken of that stage."""
        assert self._checkpoint is not None
        with self._checkpoint.restoring(saved, self._in_turns) as (_, facts):
            first, taken = facts["stage"], facts["turns"]
            self._on_own(self._in_turns[first].begin)
        self._saved = saved
        return first, taken

    def _save_if_due(self, index: int, taken: int) -> None:
        """Save this process's state after a training step, if one is due.

        The first processes are some steps ahead of the last ones, so nobody waits here for the
        others to save this step. A process keeps its previous state until all have saved this one,
        and waits for that when its next state is due.
        """
        stage = self._in_turns[index]
        if self._checkpoint is None or not stage.saved_between_turns:
            return
        if self._checkpoint.is_due(taken) or taken == len(stage.turns):
            self._neighbours.wait_for_barrier()
            self._checkpoint.keep_only(self._saved)
            self._checkpoint.save(taken, self._in_turns, {}, {"stage": index, "turns": taken})
            self._neighbours.begin_barrier()
            self._saved = taken

    def _bring_all(self) -> None:
        for number in self._own:
            self.streamed.bring(self.blocks[number])
            self.streamed.skip_layers(self.blocks[number])
        if not self._neighbours.is_first:
            self.streamed.drop_embedding()

    def _on_own(self, do: Callable[[range], None]) -> None:
        for number in self._own:
            self._on(number, do)

    def _on(self, number: int, do: Callable[..., None], *arguments: object) -> None:
        """Do something on a block, while forwards skip all others."""
        block = self.blocks[number]
        self.streamed.enable_layers(block)
        do(block, *arguments)
        self.streamed.skip_layers(block)

    def _take(self, stage: StageInTurns, turn: int, groups: Sequence[PromptGroup]) -> None:
        handed_on = [group for group in groups if group.own]
        if not self._neighbours.is_first:
            for group in handed_on:
                group.arrive(self._neighbours.receive(group.own_tokens))
        for number in self._own:
            self._states.swap()
            self._on(number, stage.take, turn)
        if not self._neighbours.is_last:
            self._states.swap()
            for group in handed_on:
                self._neighbours.send(group.depart())

    def _drop_all(self) -> None:
        """Drop the blocks; of the processes that hold the same ones, the first writes them."""
        for number in self._own:
            block = self.blocks[number]
            if self._checkpoint is not None and processes.rank() == 0:
                self._checkpoint.trained.keep(self.streamed, block, number + 1)
            self.streamed.drop(block)

    def _shares(self, group: PromptGroup) -> Sequence[Sequence[int]]:
        """Return each process's places: those of its pipeline, which it computes on its blocks."""
        of_pipelines = group.shares(processes.count() // self._pipeline_size)
        return [of_pipelines[rank // self._pipeline_size] for rank in range(processes.count())]

    def _join_facts(self, of_processes: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join what processes found, in order of their blocks; all pipelines found the same."""
        joined = of_processes[0]
        for facts in of_processes[1 : self._pipeline_size]:
            for name, found in facts.items():
                before = joined[name]
                joined[name] = before + found if isinstance(found, list) else {**before, **found}
        return joined


def _count_tokens(turn: Sequence[PromptGroup]) -> int:
    return sum(sum(group.lengths) for group in turn)
