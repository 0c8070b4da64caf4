"""Hold a folder for one process. The lock ends with the process, however the process ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from abft_fast.errors import UserError

LOCK = ".lock"
"""The file in a held folder. It stays there when the lock is gone, and does no harm."""


class FolderLock:
    """A lock on a folder that exists, held until `close`.

    Raises:
        UserError: another process holds the folder; the message is `busy`.
    """

    def __init__(self, folder: Path, busy: str, say: Callable[[str], None]):
        """Take the lock.

        Args:
            folder: what to hold.
            busy: what a user reads where another process holds it.
            say: prints a line where the file system has no locks.
        """
        self._file = (folder / LOCK).open("a")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise UserError(busy) from None
        except OSError as error:  # some network file systems
            say(
                f"{folder} cannot be locked ({error.strerror}): make sure that nothing else "
                "writes in it"
            )

    def close(self) -> None:
        """Let other processes hold the folder."""
        self._file.close()


def check_free(folder: Path, busy: str) -> None:
    """Refuse a folder that another process holds; make no file.

    Raises:
        UserError: another process holds it; the message is `busy`.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:  # never held, or not to be read: what holds the folder will say so
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(busy) from None
    except OSError:  # no locks here
        pass
    finally:
        os.close(descriptor)
