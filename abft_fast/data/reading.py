"""Open the user's files; what can be read only once, as a pipe, is copied first."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TextIO

from abft_fast.errors import UserError

STDIN = "-"
"""The name of standard input where a file can be named."""


def is_stream(path: str | Path) -> bool:
    """Return whether a path is standard input, a pipe, or a shell's `<(command)`."""
    if str(path) in (STDIN, "/dev/stdin") or str(path).startswith("/dev/fd/"):
        return True
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def again(path: Path) -> Path:
    """Return a file with the content of `path` that can be read any number of times.

    Raises:
        UserError: standard input or a pipe cannot be read, or the path is a device, which may have
            no end.
    """
    if is_stream(path):
        return Path(_copy(path).name)
    if path.is_char_device() or path.is_block_device():
        raise UserError(f"{path} is a device: name a file, a pipe, or - for standard input")
    return path


@cache
def _copy(path: Path) -> IO[bytes]:
    copy = tempfile.NamedTemporaryFile(prefix="abft-fast-")  # noqa: SIM115 - removed at exit
    with errors_about(path, OSError, ValueError):
        descriptor = sys.__stdin__.fileno() if str(path) == STDIN and sys.__stdin__ else path
        with open(descriptor, "rb", closefd=descriptor is path) as source:
            shutil.copyfileobj(source, copy)
    copy.flush()
    return copy


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        UserError: the file cannot be read.
    """
    with errors_about(path, OSError), again(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file of UTF-8, with or without a byte order mark.

    Raises:
        UserError: the file cannot be read, also later in the block, or is not UTF-8.
    """
    with errors_about(path, OSError):
        try:
            with again(path).open(encoding="utf-8-sig", newline=newline) as file:
                yield file
        except UnicodeDecodeError:
            raise UserError(f"{_first_not_utf8(path)}: save the file as UTF-8") from None


def _first_not_utf8(path: Path) -> str:
    with again(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"{path}, row {number}: byte {line[error.start]:#04x} is not UTF-8"
    return f"{path} is not UTF-8"


@contextmanager
def errors_about(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turn what a reader raises into a UserError about the file."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or str(error).strip() or repr(error)
        raise UserError(f"{path} cannot be read: {reason.splitlines()[0]}") from None
