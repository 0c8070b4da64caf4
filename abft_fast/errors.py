"""Errors a user can act on; the command line prints their one line and no traceback."""

from __future__ import annotations


class UserError(Exception):
    """The user's mistake: the message names the thing and the fix. Exit code 2."""


class RunError(Exception):
    """The run cannot go on: the message says why and what to try. Exit code 1."""
