"""A text file of the user's, one thing a line."""

from __future__ import annotations

from pathlib import Path

from abft_fast.errors import UserError


def read_lines(file: Path, option: str) -> list[str]:
    """Its lines that are not empty, stripped.

    Args:
        option: the flag that named it, such as `--plain-text`.

    Raises:
        UserError: it cannot be read or is not UTF-8.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{option} {file}: {reason}") from None
    return [stripped for line in lines if (stripped := line.strip())]
