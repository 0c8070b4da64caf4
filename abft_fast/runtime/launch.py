"""The launcher's view of a run: how many processes, which one is main, how a broken run ends.

Nothing here needs torch until a process leaves a broken run.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import NoReturn

from rich.console import Console

HOW_TO_RESUME = "continue a training run with `abft-fast train --resume RUN`"

_leaving = threading.Lock()


def process_count() -> int:
    """Return how many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_process_count() -> int:
    """Return how many processes the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number among the launched ones, from 0."""
    return int(os.environ.get("RANK", "0")) if process_count() > 1 else 0


def is_main() -> bool:
    """Return whether this is the one process that writes files and prints."""
    return rank() == 0


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


def exit_after_main(code: int, seconds: float) -> NoReturn:
    """Exit after the main process, which prints the error.

    A launcher ends every process as soon as the first one ends, so this process waits for `seconds`
    or for the launcher's signal.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(code))
    time.sleep(seconds)
    os._exit(code)


def exit_at_once(line: str, code: int) -> NoReturn:
    """Print a line, unless another process of the run has printed one, and exit without waiting."""
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
