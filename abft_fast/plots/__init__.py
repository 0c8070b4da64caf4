"""Pictures in one style: `style` draws with matplotlib, which the extra `plots` brings."""

from __future__ import annotations

import importlib.util

from abft_fast.errors import UserError

NEEDED = ("matplotlib", "jinja2")
"""The packages that the extra brings."""

INSTALL = "`pip install 'abft-fast[plots]'`"


def missing() -> list[str]:
    """Return the packages of the extra that are not installed; nothing is imported."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def check_installed(what: str) -> None:
    """Refuse to draw where a package of the extra `plots` is not installed.

    Args:
        what: what draws, as a user calls it, such as `abft-fast report`.

    Raises:
        UserError: a package is missing; the line names the extra.
    """
    if lacking := missing():
        raise UserError(f"{what} needs {' and '.join(lacking)}: {INSTALL}")
