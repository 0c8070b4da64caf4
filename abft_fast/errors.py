"""Errors a user can act on; the command line prints their one line and no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's mistake: the message names the thing and the fix. Exit code 2."""


class UnsupportedModel(UserError, ValueError):  # noqa: N818 - what the model is
    """The model, or what is asked of it, is outside this library: the message says what and why."""


class RunError(Exception):
    """The run cannot go on: the message says why and what to try. Exit code 1."""


class ProcessEnded(RunError):  # noqa: N818 - what happened, to another one
    """Another process of this run is gone, so nothing can be waited for."""


class FailedApart(Exception):  # noqa: N818 - what happened, to the error inside
    """The error of a process that worked for itself: no other process can print it.

    Attributes:
        error: what ended the process.
    """

    def __init__(self, error: Exception):
        self.error = error


class Interrupted(Exception):  # noqa: N818 - no error
    """Ended from outside: the message says how to go on. Exit code 130."""


class SaidByMain(Exception):  # noqa: N818 - the error itself is another's
    """This process ends as the main one does, which says why."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code


def closest(name: str, names: Iterable[str]) -> str:
    """Return a hint such as `; did you mean 'text'?`, or nothing if no name is similar."""
    by_lower = {other.lower(): other for other in names}
    matches = difflib.get_close_matches(name.lower(), by_lower, 1)
    return f"; did you mean {by_lower[matches[0]]!r}?" if matches else ""


def listed(names: Iterable[str], most: int = 12) -> str:
    """Return the names in quotes, separated by commas; beyond `most` only the first ones."""
    names = [repr(name) for name in names]
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
