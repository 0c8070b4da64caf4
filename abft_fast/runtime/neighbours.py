"""Hand tensors from each process of a pipeline to the next one."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from abft_fast.runtime import launch
from abft_fast.runtime.processes import TIMEOUT, waiting_for_others

ON_THE_WAY = 2
"""Most tensors that the next process has not taken yet; more would fill the memory."""


class Neighbours:
    """The previous and the next process; all processes construct it together.

    Args:
        size: processes of a pipeline. Their ranks are consecutive.
        width: columns of each tensor.
        dtype: of each tensor.

    Attributes:
        place: of this process in its pipeline, from 0.
        is_first: whether no process is before this one.
        is_last: whether no process comes after it.
    """

    def __init__(self, size: int, width: int, dtype: torch.dtype):
        self._width, self._dtype = width, dtype
        self._rank = launch.rank()
        self.place = self._rank % size
        self.is_first = self.place == 0
        self.is_last = self.place == size - 1
        # gloo takes tensors of the host's memory, and sees at once that a process has ended.
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        self._barrier: dist.Work | None = None

    def receive(self, rows: int) -> Tensor:
        """Wait for the next tensor of the process before this one, (rows, width), on the CPU.

        Raises:
            ProcessEnded: that process has ended.
        """
        received = torch.empty(rows, self._width, dtype=self._dtype)
        with waiting_for_others():
            dist.recv(received.view(torch.uint8), self._rank - 1, group=self._group)
        return received

    def send(self, tensor: Tensor) -> None:
        """Send a tensor, (rows, width), to the next process.

        Raises:
            ProcessEnded: that process has ended.
        """
        if tensor.shape[1:] != (self._width,) or tensor.dtype != self._dtype:
            raise RuntimeError(
                f"the layers hand on {tuple(tensor.shape)} of {tensor.dtype}, and the next process "
                f"awaits rows of {self._width} of {self._dtype}: train without --pipeline"
            )
        tensor = tensor.cpu().contiguous()
        with waiting_for_others():
            work = dist.isend(tensor.view(torch.uint8), self._rank + 1, group=self._group)
            assert work is not None
            self._sent.append((work, tensor))
            self._wait(ON_THE_WAY)

    def begin_barrier(self) -> None:
        """Enter a barrier of all processes; do not wait for it."""
        self._barrier = dist.barrier(group=self._group, async_op=True)

    def wait_for_barrier(self) -> None:
        """Wait until all processes have entered the last barrier that began, if one did.

        Raises:
            ProcessEnded: one of them has ended.
        """
        if self._barrier is not None:
            with waiting_for_others():
                self._barrier.wait()
            self._barrier = None

    def finish(self) -> None:
        """Wait until all processes have taken everything.

        Raises:
            ProcessEnded: one of them has ended.
        """
        self.wait_for_barrier()
        with waiting_for_others():
            self._wait(0)
            dist.barrier(group=self._group)

    def _wait(self, most: int) -> None:
        while len(self._sent) > most:
            work, _ = self._sent.popleft()
            work.wait()
