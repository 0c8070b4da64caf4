"""What several processes of one run do together; for one process, each of these does nothing.

Each holds the whole model and works on its share of the prompts. What is decided from files is
decided by the main process, what fails on one process ends all of them with one message, and no
process waits for another anywhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn

from abft_fast.core.packing import balanced_shares
from abft_fast.errors import ProcessEnded, RunError, SaidByMain, UserError
from abft_fast.runtime import launch
from abft_fast.runtime.token_budget import is_out_of_memory

T = TypeVar("T")


def count() -> int:
    """Processes that run together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def running(cpu: bool) -> Iterator[None]:
    """Join the processes that were launched, until the block ends.

    Raises:
        UserError: they were not launched for data parallel training, or outnumber the GPUs.
    """
    _check_launch(cpu)
    if launch.launched() > 1:
        launch.leave_on_sigterm()
    try:
        PartialState(cpu=cpu)
        if count() > 1:
            gather_object([None])  # the first collective: what is set up wrongly fails here
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise RunError(f"the processes of this run do not find each other: {line}") from error
    if launch.launched() != count():
        raise UserError(
            f"WORLD_SIZE is {launch.launched()} but {count()} processes run together: "
            "start them with torchrun or accelerate launch"
        )
    group_is_whole = True
    try:
        yield
    except ProcessEnded:
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
    here = launch.launched_here()
    if not cpu and here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes on this machine, but {torch.cuda.device_count()} GPUs: "
            "launch as many processes as GPUs"
        )


@contextmanager
def together() -> Iterator[None]:
    """Work without collectives that may fail on one process: then it fails on all of them.

    Raises:
        Exception: on the main process the error, its own or the first other process's.
        SaidByMain: on the others.
    """
    if count() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    errors = [found for found in collect(_message(error)) if found is not None]
    if not errors:
        return
    if launch.is_main():
        raise error or errors[0]
    raise SaidByMain(2 if isinstance(errors[0], UserError) else 1) from error


def on_main(work: Callable[..., None], *arguments: object) -> None:
    """Call it on the main process; all wait for it, and fail if it fails."""
    with together():
        if launch.is_main():
            work(*arguments)


def _message(error: Exception | None) -> Exception | None:
    """The error as another process can raise it."""
    if error is None or type(error) in (UserError, RunError):
        return error
    where = f"process {launch.rank()}: {type(error).__name__}"
    return RunError(f"{where}: {error} (--debug shows where)")


def collect(value: T) -> list[T]:
    """The value each process has, in order of rank.

    Raises:
        ProcessEnded: another process is gone.
    """
    if count() == 1:
        return [value]
    with _peers():
        return gather_object([value])


def of_main(value: T) -> T:
    """The main process's value: what is read from files may differ on another machine."""
    return collect(value)[0]


def share(lengths: Sequence[int]) -> list[int]:
    """Which of these prompts are this process's own; about as many tokens as any other's."""
    if count() == 1:
        return list(range(len(lengths)))
    return balanced_shares(lengths, count())[launch.rank()]


def sum_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all processes, as one flat tensor.

    Raises:
        ProcessEnded: another process is gone.
    """
    if count() == 1:
        return
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:  # a process without prompts
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with _peers():
        total = accelerator.reduce(flat, reduction="sum")
    parts = total.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def _peers() -> Iterator[None]:
    """A collective: what it raises means that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ProcessEnded(f"another process of this run ended; {launch.GO_ON}") from error
