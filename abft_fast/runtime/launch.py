"""The launcher's view of a run: how many processes, which one is main, how a broken run ends.

Nothing here needs torch until a process leaves a broken run.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

from abft_fast.errors import UserError

HOW_TO_RESUME = "continue a training run with `abft-fast train --resume RUN`"

_leaving = threading.Lock()


_NUMBERS = (
    "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_WORLD_SIZE", "GROUP_RANK",
    "MASTER_PORT", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
)  # fmt: skip
"""Variables of launchers that accelerate, torch and this module read as numbers."""

_UNSET_IF_EMPTY = re.compile(
    r"MASTER_ADDR|OMP_NUM_THREADS|(ACCELERATE|PARALLELISM_CONFIG|TORCH\w*|AOTINDUCTOR|PYTORCH|TRITON"
    r"|HF|TRANSFORMERS|BNB)_\w+"
)
"""Further variables of these libraries; some fail on an empty value while they are imported."""


def check_environment() -> None:
    """Take an empty variable of a launcher or a library as one that is not set.

    Raises:
        UserError: a launcher's variable is no number. It counts as not set from then on.
    """
    for name, value in list(os.environ.items()):
        if name in _NUMBERS and value.strip():
            if not re.fullmatch(r"\s*-?[0-9]+\s*", value):
                del os.environ[name]
                raise UserError(f"environment variable {name} is {value!r}, not a number: unset it")
        elif not value.strip() and (name in _NUMBERS or _UNSET_IF_EMPTY.fullmatch(name)):
            del os.environ[name]


def process_count() -> int:
    """Return how many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def local_process_count() -> int:
    """Return how many processes the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def rank() -> int:
    """Return this process's number among the launched ones, from 0."""
    return int(os.environ.get("RANK") or 0) if process_count() > 1 else 0


def is_main() -> bool:
    """Return whether this is the one process that writes files and prints."""
    return rank() == 0


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Run a block in which SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does.

    A signal that the process ignores, as SIGHUP under nohup, stays ignored.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is interrupt:  # else `leave_on_sigterm` needs its own
                signal.signal(number, handler)


def leave_on_sigterm() -> None:
    """Print a line and exit at once when the launcher ends this process.

    A launcher ends all processes when one has died. A signal handler in Python would run only after
    the collective that waits for the dead process; the wake-up descriptor is written before that.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(write)

    def watch() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        line = (
            "the launcher ended this process, probably because another process of this run ended; "
            f"{HOW_TO_RESUME}"
        )
        exit_at_once(line, 128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def exit_after_main(code: int, seconds: float, line: str = "") -> NoReturn:
    """Exit after the main process, which prints the error.

    A launcher ends every process as soon as the first one ends, so this process waits for `seconds`
    or for the launcher's signal. Where no signal comes, the error is this process's own, and it
    prints the line.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(code))
    time.sleep(seconds)
    if line:
        print(f"abft-fast: process {rank()}: {line}", file=sys.stderr, flush=True)
    os._exit(code)


def exit_at_once(line: str, code: int) -> NoReturn:
    """Print a line, unless another process of the run has printed one, and exit without waiting."""
    from rich.console import Console

    with _leaving:
        if _is_first_to_leave():
            console = Console(stderr=True)
            console.show_cursor()  # a progress bar hides the cursor
            print(f"abft-fast: {line}", file=sys.stderr, flush=True)
        os._exit(code)


def _is_first_to_leave() -> bool:
    from torch.distributed import TCPStore

    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=2),
        )
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.add(f"abft-fast-left-{start}", 1) == 1
    except (KeyError, RuntimeError):  # the process that kept the store is gone: print, to be safe
        return True
