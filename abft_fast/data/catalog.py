"""Find a dataset by its name."""

from __future__ import annotations

from functools import cache

from abft_fast.data import staicc_files, tables
from abft_fast.data.boxes import BOXES, Boxes
from abft_fast.data.dataset import Dataset
from abft_fast.data.staicc_files import DATASETS, STAICC_ORDER
from abft_fast.errors import UserError, closest

NAMES = (*DATASETS, *BOXES)
"""Every dataset that has a name: StaICC's, and those that are generated."""

_ALIASES = {"boxes": "boxes7"}  # the number of boxes in the paper


def resolve_name(name: str) -> str:
    """Return the dataset that a name in any case, or the original's index 0-9, stands for.

    Raises:
        UserError: there is no such dataset.
    """
    lowered = name.strip().lower()
    lowered = _ALIASES.get(lowered, lowered)
    if lowered.isdecimal() and int(lowered) < len(STAICC_ORDER):
        return STAICC_ORDER[int(lowered)]
    if lowered not in NAMES:
        raise UserError(
            f"dataset {name!r} is unknown: use one of {', '.join(NAMES)}, an index 0-9, or "
            f"data of your own ({tables.FORMATS}){closest(lowered, NAMES)}"
        )
    return lowered


def origin(name: str) -> str:
    """Return whose a dataset of `NAMES` is, for a message."""
    return "generated" if name in BOXES else "StaICC's"


@cache
def load(name: str) -> Dataset:
    """Read a dataset of StaICC after checking its file's SHA-256, or make a generated one.

    Raises:
        UserError: the name is unknown, StaICC is missing, or the file is not the pinned one.
    """
    name = resolve_name(name)
    return Boxes.of(name) if name in BOXES else staicc_files.read(name)
