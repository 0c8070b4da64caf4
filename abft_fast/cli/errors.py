"""Turn an exception into one line on stderr and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback as tracebacks

import typer

from abft_fast.errors import FailedApart, Interrupted, ProcessEnded, RunError, SaidByMain, UserError
from abft_fast.runtime import launch

INTERRUPTED = 130
"""The exit code of a command that the user stopped."""

_SAME_EVERYWHERE = (
    UserError, RunError, SaidByMain, typer.TyperException, Interrupted, KeyboardInterrupt
)  # fmt: skip
"""Errors that end every process of a run, so that only the main process prints them."""


def report(error: BaseException, *, traceback: bool) -> int:
    """Print an error's line; return the exit code.

    In a run of several processes, this exits at once where another process has ended, and waits for
    the main process where that one prints the same error.

    Args:
        error: what ended the command.
        traceback: whether to print the traceback as well.
    """
    if traceback:
        tracebacks.print_exception(error)
    message, code = explain(error)
    message = " ".join(message.split())
    if isinstance(error, ProcessEnded | FailedApart):
        launch.exit_at_once(message, code)
    if not launch.is_main() and isinstance(error, _SAME_EVERYWHERE):
        if code == INTERRUPTED:
            launch.exit_after_main(code, seconds=0)
        launch.exit_after_main(code, seconds=10, line=message)
    if message:
        print(f"abft-fast: {message}", file=sys.stderr)
    return code


def explain(error: BaseException) -> tuple[str, int]:
    """Return the line that a user reads, and the exit code."""
    code = 1
    match error:
        case FailedApart():
            line, code = explain(error.error)
        case UserError():
            line, code = str(error), 2
        case Interrupted():
            line, code = str(error), INTERRUPTED
        case typer.TyperException():
            line, code = error.format_message(), 2
        case KeyboardInterrupt() | typer.Abort():
            line, code = "interrupted", INTERRUPTED
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            line = f"the disk is full: {error.filename or 'nothing more can be written'}"
        case SaidByMain():
            line, code = "", error.exit_code
        case OSError() if error.filename and error.strerror:
            line = f"{error.filename}: {error.strerror}"
        case RunError() | OSError():
            line = str(error)
        case _:
            line = f"{type(error).__name__}: {error} (--debug shows where)"
    return line, code
