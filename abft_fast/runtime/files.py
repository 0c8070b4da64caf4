"""Write files and folders that a crash cannot leave half done: temporary name, fsync, rename."""

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
    """Yield a temporary folder; rename it to `folder` once the block has filled it."""
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
        match = re.search(r"I/O error.*\(os error (\d+)\)", str(error))  # safetensors' wording
        if match:
            code = int(match[1])
            raise OSError(code, os.strerror(code), str(folder)) from error
        _name(error, folder)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    _sync(folder.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """Yield a temporary text file; rename it to `path` once the block has written it."""
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
    """Return the final name that belongs to a temporary name; return any other name unchanged."""
    match = re.fullmatch(r"\.(.+)\.tmp", name)
    return match[1] if match else name


def write_text(path: Path, text: str) -> None:
    """Replace a file's whole content with a text."""
    with atomic_file(path) as file:
        file.write(text)


def check_output(path: Path, read: Iterable[Path] = ()) -> None:
    """Refuse an `--output` file that cannot be written, before anything is computed.

    Raises:
        UserError: the path is a folder, its folder cannot be written to, or it is one of the files
            in `read`.
    """
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: no permission to write in {path.parent}")
    if path.resolve() in [other.resolve() for other in read]:
        raise UserError(f"--output {path} is a file that the command reads: name another file")


def check_output_folder(folder: Path, *, new: bool = False) -> None:
    """Refuse an `--output-dir` that cannot be made or written to, before anything is computed.

    Raises:
        UserError: the path is a file or below a file, nothing may be written there, or the folder
            exists although `new` is set.
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
    """Replace a file's whole content with JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _name(error: BaseException, path: Path) -> None:
    """Put the path into a system error that lacks one."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
