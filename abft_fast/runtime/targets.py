"""Find what a path to write leads to: a file that a new one may replace, or something else.

A pipe, a device and an open descriptor, as `/dev/stdout` is, must not be replaced by a file.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import TextIO

_DESCRIPTOR = re.compile(r"(?:/proc/(?P<process>\d+)|/dev)/fd/(?P<number>\d+)")


def end_of_links(path: Path) -> Path:
    """Follow links to a file, to a name that is free, or to the name of an open descriptor.

    Raises:
        OSError: links lead in a circle, or a folder may not be read.
    """
    with contextlib.suppress(FileNotFoundError):
        path.stat()  # raises where links lead in a circle
    path = path.parent.resolve() / path.name
    while path.is_symlink() and not _DESCRIPTOR.fullmatch(str(path)):
        link = path.parent / path.readlink()
        path = link.parent.resolve() / link.name
    return path


def is_replaced(target: Path) -> bool:
    """Return whether a new file may stand at the end of links: a file is there, or nothing."""
    if _DESCRIPTOR.fullmatch(str(target)):
        return False
    return target.is_file() or not target.exists()


def opened(target: Path) -> TextIO:
    """Open what is at the end of links for writing, where it is not replaced."""
    descriptor = _DESCRIPTOR.fullmatch(str(target))
    if descriptor is None:
        return target.open("w", encoding="utf-8", newline="")
    if descriptor["process"] not in (None, str(os.getpid())):
        return target.open("a", encoding="utf-8", newline="")
    # Opened by its name, a file would lose what others have written to it.
    return open(os.dup(int(descriptor["number"])), "w", encoding="utf-8", newline="")
