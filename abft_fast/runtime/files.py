"""Writes that a crash cannot leave half done: temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from abft_fast.errors import UserError


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that appears under its own name only when it is whole and on disk."""
    temporary = _temporary(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        _sync(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        found = re.search(r"I/O error.*\(os error (\d+)\)", str(error))  # as safetensors says it
        if found:
            code = int(found[1])
            raise OSError(code, os.strerror(code), str(folder)) from error
        _name(error, folder)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync(folder.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """A text file to write that appears under its own name only when it is whole and on disk."""
    temporary = _temporary(path)
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
        _sync(temporary)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise
    _sync(path.parent)


def final_name(name: str) -> str:
    """What a file or folder is to be called once it is whole; another's name as it is."""
    found = re.fullmatch(r"\.(.+)\.tmp", name)
    return found[1] if found else name


def write_text(path: Path, text: str) -> None:
    """Replace a file's content as a whole."""
    with atomic_file(path) as file:
        file.write(text)


def check_output(path: Path, read: Iterable[Path] = ()) -> None:
    """Make sure that `--output` can be written, before anything is computed for it.

    Raises:
        UserError: it is a folder, or in none that can be written to, or is among what is read.
    """
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: no permission to write in {path.parent}")
    if path.resolve() in [other.resolve() for other in read]:
        raise UserError(f"--output {path} is what is read: name another file")


def check_output_folder(folder: Path, *, new: bool = False) -> None:
    """Make sure that a folder can be made, or written to, before anything is computed for it.

    Raises:
        UserError: it is a file, or is to be made in one or where nothing may be written; or it
            exists, where it is to be new.
    """
    if new and os.path.lexists(folder):
        raise UserError(f"output folder {folder} exists: choose another --output-dir")
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), Path())
    if not there.is_dir():
        where = "is a file" if there == folder else f"cannot be made: {there} is a file"
        raise UserError(f"output folder {folder} {where}: choose another --output-dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"output folder {folder}: no permission to write in {there}: choose another "
            "--output-dir"
        )


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file as a whole."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _name(error: BaseException, path: Path) -> None:
    """Let the system's error say what could not be written, as a write itself does not."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
