"""Read files of plain text that hold one text a line."""

from __future__ import annotations

from pathlib import Path

from abft_fast.data.reading import again
from abft_fast.errors import UserError


def read_lines(option: str, file: Path) -> list[str]:
    r"""Read the lines of the UTF-8 file that an option names; leave out blank lines.

    A line ends in `\n`, `\r\n` or `\r`, and not at any other character, such as U+2028.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        text = again(file).read_text(encoding="utf-8-sig")
        lines = text.split("\n")  # \r\n and \r have become \n
    except OSError as error:
        raise UserError(f"{option} {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x}"
        raise UserError(f"{option} {file}: {byte} is not UTF-8: save the file as UTF-8") from None
    return [stripped for line in lines if (stripped := line.strip())]
