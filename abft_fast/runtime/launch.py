"""Being one of several processes a launcher started: who speaks, and how a broken run ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import NoReturn

from rich.console import Console

GO_ON = "a training run goes on with `abft-fast train --resume RUN`"

_leaving = threading.Lock()


def launched() -> int:
    """Processes the launcher says there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_here() -> int:
    """Those of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


def is_main() -> bool:
    """Whether this is the one process that writes files and speaks."""
    return rank() == 0


def leave_on_sigterm() -> None:
    """Leave with a line, and at once, when the launcher ends this process.

    A launcher does so when another process has died. A handler in Python would have to wait for
    the collective that waits for the dead process; the wake-up descriptor is written before it.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(write)

    def watch() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        line = f"ended by the launcher, as when another process of this run ended; {GO_ON}"
        leave(line, 128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def end_after_main(code: int, seconds: float) -> NoReturn:
    """End after the main process, which is to speak: a launcher ends all at the first one's end."""
    signal.set_wakeup_fd(-1)
    for told in (signal.SIGTERM, signal.SIGINT):
        signal.signal(told, lambda *_: os._exit(code))
    time.sleep(seconds)
    os._exit(code)


def leave(line: str, code: int) -> NoReturn:
    """Say a line, unless another process of the run has, and end without waiting for anything."""
    with _leaving:
        if _first_to_leave():
            console = Console(stderr=True)
            console.show_cursor()  # a bar hides it
            print(f"abft-fast: {line}", file=sys.stderr, flush=True)
        os._exit(code)


def _first_to_leave() -> bool:
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
    except (KeyError, RuntimeError):  # whoever kept the store is gone: better twice than never
        return True
