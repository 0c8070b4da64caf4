"""Make the standard streams safe: closed ones, other encodings, and a reader that leaves early."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from abft_fast.errors import RunError, UserError

_NAMES = ("stdin", "stdout", "stderr")
_closed: set[str] = set()


def prepare() -> None:
    """Replace closed streams by /dev/null, and let every character be printed.

    Without this, a file that is opened later takes the number of the closed stream, and receives
    what is printed.
    """
    for number, name in enumerate(_NAMES):
        if getattr(sys, name) is None:
            _closed.add(name)
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - never closed
    for stream in (sys.stdout, sys.stderr):
        _reconfigure(stream, errors="backslashreplace")


def check_stdout() -> None:
    """Refuse to compute what would only be printed, where standard output is closed.

    Raises:
        UserError: it is closed.
    """
    if "stdout" in _closed:
        raise UserError("standard output is closed, so the result would be lost: send it to a file")


def utf8_stdout() -> TextIO:
    """Return standard output as the program writes files: UTF-8, in any locale."""
    _reconfigure(sys.stdout, encoding="utf-8", errors="strict")
    return sys.stdout


@contextmanager
def stdout_complete() -> Iterator[None]:
    """Run a block; make sure that all it printed has arrived.

    Raises:
        RunError: the reader of standard output, or of a pipe that the block wrote to, is gone.
        OSError: the disk that standard output goes to is full.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError as error:
        if error.filename is None:
            _discard_stdout()
        name = error.filename or "standard output"
        raise RunError(f"{name} was closed before all was written") from None
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EIO):
            _discard_stdout()
            error.filename = "standard output"
        raise


def _reconfigure(stream: TextIO, *, errors: str, encoding: str | None = None) -> None:
    """Change how a stream encodes; leave the stream of another program, such as a notebook's."""
    if isinstance(stream, io.TextIOWrapper):
        with suppress(OSError):  # it was a file, and is a pipe now
            stream.reconfigure(encoding=encoding, errors=errors)


def _discard_stdout() -> None:
    """Keep Python from writing at its end what could not be written before."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
