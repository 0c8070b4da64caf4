"""Write files and folders that a crash cannot leave half done: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import csv
import errno
import itertools
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from abft_fast.errors import UserError
from abft_fast.runtime import targets

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `folder` once the block has filled it.

    Raises:
        FileExistsError: another process has made `folder` in the meantime.
    """
    temporary = _temporary(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                _sync(path)
        _sync(temporary)
        if folder.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        temporary.rename(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        match = re.search(r"I/O error.*\(os error (\d+)\)", str(error))  # safetensors' wording
        if match:
            code = int(match[1])
            raise OSError(code, os.strerror(code), str(folder)) from error
        _name(error, folder)
        raise
    _sync(folder.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """Yield a text file; its content appears at `path` once the block has written it.

    Links are followed, and stay. An existing file keeps its mode and, where that is permitted, its
    owner. A pipe, a device or an open descriptor, as /dev/stdout is, is written to directly.
    """
    target = targets.end_of_links(path)
    if not targets.is_replaced(target):
        try:
            with targets.opened(target) as file:
                yield file
        except BaseException as error:
            _name(error, path)
            raise
        return
    temporary = _temporary(target)
    try:
        with temporary.open("x", encoding="utf-8", newline="") as file:
            _copy_rights(target, temporary)
            yield file
        _sync(temporary)
        try:
            temporary.replace(target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            shutil.copyfile(temporary, target)  # mounted by itself, as a container does it
            temporary.unlink()
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise
    _sync(target.parent)


def final_name(name: str) -> str:
    """Return the final name that belongs to a temporary name; return any other name unchanged."""
    match = _TEMPORARY.fullmatch(name)
    return match[1] if match else name


def unused_folder(folder: Path) -> Path:
    """Return the folder, or the first of folder-2, folder-3, ... that does not exist."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not path.exists())


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written in a folder that no other process writes."""
    for path in list(folder.glob(".*.tmp")):
        if final_name(path.name) == path.name:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace a file's whole content with a text."""
    with atomic_file(path) as file:
        file.write(text)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Replace a file's whole content with a table.

    Args:
        path: the file.
        rows: cells by column; a missing one and None are empty.
        columns: the columns. Unset: those of the first row.
    """
    with atomic_file(path) as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def check_output(path: Path, read: Iterable[Path] = ()) -> None:
    """Refuse an `--output` file that cannot be written, before anything is computed.

    Raises:
        UserError: the path is a folder, it or its folder cannot be written to, or it is one of the
            files in `read`.
    """
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: name a file in it")
    try:
        target = targets.end_of_links(path)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}: name another file") from None
    folder = target.parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise UserError(f"--output {path}: folder {folder} does not exist")
    if not targets.is_replaced(target):
        if target.is_socket() or not os.access(target, os.W_OK):
            raise UserError(f"--output {path} cannot be written to: name another file")
        return
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: no permission to write in {folder}")
    if target.exists():
        if not os.access(target, os.W_OK):
            raise UserError(f"--output {path}: no permission to write to the file")
        if any(other.exists() and target.samefile(other) for other in read):
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
    """Return a name beside `path` that no other writer takes; long names are cut to fit."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")


def _copy_rights(target: Path, temporary: Path) -> None:
    if target.exists():
        status = target.stat()
        with contextlib.suppress(PermissionError):
            os.chown(temporary, status.st_uid, status.st_gid)
        temporary.chmod(stat.S_IMODE(status.st_mode))


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
