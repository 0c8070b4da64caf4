"""Writes that a crash cannot leave half done: temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that appears under its own name only when it is whole and on disk."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in temporary.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync(folder.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """A text file to write that appears under its own name only when it is whole and on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content as a whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file as a whole."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
