"""Let the processes of one run work together; in a run of one process, nothing here waits.

Each process holds the whole model and computes its share of the prompts; in a pipeline it holds
some of the blocks. The main process decides whatever depends on files. An error on one process ends
all of them with one message. Only in this module and in `neighbours` does a process wait for
another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn

from abft_fast.errors import FailedApart, ProcessEnded, RunError, SaidByMain, UserError
from abft_fast.runtime import launch
from abft_fast.runtime.batching import balanced_shares
from abft_fast.runtime.token_budget import is_out_of_memory

T = TypeVar("T")
TIMEOUT = timedelta(days=7)
"""How long a process waits for others: they may work for hours, and a dead one ends all of them."""


@dataclass(frozen=True)
class _Peers:
    """The processes that share prompts with this one while others work on other blocks."""

    count: int
    rank: int
    group: dist.ProcessGroup | None


_peers: ContextVar[_Peers | None] = ContextVar("_peers", default=None)


def count() -> int:
    """Return how many processes run together; while they work `apart`, those that share prompts."""
    peers = _peers.get()
    if peers is not None:
        return peers.count
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number among those that run together, from 0."""
    peers = _peers.get()
    return launch.rank() if peers is None else peers.rank


def _group() -> dist.ProcessGroup | None:
    peers = _peers.get()
    return None if peers is None else peers.group


@contextmanager
def running(cpu: bool) -> Iterator[None]:
    """Join the launched processes into one group until the block ends.

    Raises:
        UserError: the processes were not launched for data-parallel training, or outnumber the
            GPUs.
        RunError: the processes do not find each other.
    """
    _check_launch(cpu)
    if launch.process_count() > 1:
        launch.leave_on_sigterm()
    try:
        PartialState(cpu=cpu, timeout=TIMEOUT)
        if count() > 1:  # the first collective shows a wrong setup
            dist.all_gather_object([None] * count(), None)
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise RunError(f"the processes of this run do not find each other: {line}") from error
    if launch.process_count() != count():
        raise UserError(
            f"WORLD_SIZE is {launch.process_count()} but {count()} processes run together: "
            "start them with torchrun or accelerate launch"
        )
    group_is_whole = True
    try:
        yield
    except (ProcessEnded, FailedApart):
        group_is_whole = False
        raise
    finally:
        if group_is_whole:
            PartialState().destroy_process_group()


def _check_launch(cpu: bool) -> None:
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true":
            raise UserError(
                f"accelerate is set to {plugin}: launch with --multi_gpu, "
                "or use --device-map auto for a model larger than a GPU"
            )
    here = launch.local_process_count()
    if not cpu and here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes run on this machine, which has {torch.cuda.device_count()} GPUs: "
            "launch as many processes as GPUs"
        )


@contextmanager
def fail_together() -> Iterator[None]:
    """Run a block without collectives; if it raises anywhere, raise everywhere.

    Raises:
        Exception: on the main process, its own error or else the first error of another process.
        SaidByMain: on every other process.
    """
    if count() == 1 or _peers.get() is not None:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    errors = [sent for sent in gather(_sendable(error)) if sent is not None]
    if not errors:
        return
    if launch.is_main():
        raise error or errors[0]
    raise SaidByMain(2 if isinstance(errors[0], UserError) else 1) from error


@contextmanager
def apart(groups: Sequence[Sequence[int]]) -> Iterator[None]:
    """Run a block in which groups of processes work for themselves, each as if it were the run.

    No error is awaited in the block: `fail_together` does nothing there.

    Args:
        groups: the ranks of each group. Every process is in one.

    Raises:
        FailedApart: this process's error, where there are other processes.
    """
    are_several = count() > 1
    own = next(group for group in groups if rank() in group)
    handle = None
    if len(own) > 1:
        handle, _ = dist.new_subgroups_by_enumeration(
            [list(group) for group in groups], timeout=TIMEOUT
        )
    token = _peers.set(_Peers(len(own), list(own).index(rank()), handle))
    try:
        yield
    except ProcessEnded:
        raise
    except Exception as error:
        if are_several:
            raise FailedApart(error) from error
        raise
    finally:
        _peers.reset(token)


def run_on_main(function: Callable[..., None], *arguments: object) -> None:
    """Call a function on the main process; all processes wait for it and fail if it fails."""
    with fail_together():
        if launch.is_main():
            function(*arguments)


def _sendable(error: Exception | None) -> Exception | None:
    """Return the error in a form that another process can raise."""
    if error is None or type(error) in (UserError, RunError):
        return error
    where = f"process {launch.rank()}: {type(error).__name__}"
    return RunError(f"{where}: {error} (--debug shows where)")


def gather(value: T) -> list[T]:
    """Return every process's value, in order of rank.

    Raises:
        ProcessEnded: another process has ended.
    """
    if count() == 1:
        return [value]
    gathered = [value] * count()
    with waiting_for_others():
        dist.all_gather_object(gathered, value, group=_group())
    return gathered


def from_main(value: T) -> T:
    """Return the main process's value, for values read from files that may differ elsewhere."""
    return gather(value)[0]


def own_share(lengths: Sequence[int]) -> list[int]:
    """Return the indices of the prompts that this process computes.

    Args:
        lengths: tokens of each prompt. Every process gets about as many tokens as any other.
    """
    return balanced_shares(lengths, count())[rank()]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of all processes in place, in one collective on a flat tensor.

    Raises:
        ProcessEnded: another process has ended.
    """
    if count() == 1:
        return
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:  # a process without prompts
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with waiting_for_others():
        dist.all_reduce(flat, group=_group())
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def waiting_for_others() -> Iterator[None]:
    """Wait for other processes; an error, other than out of memory, means that one has ended.

    Raises:
        ProcessEnded: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ProcessEnded(f"another process of this run ended; {launch.HOW_TO_RESUME}") from error
