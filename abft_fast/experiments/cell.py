"""A cell of a sweep: one command with its options, its name, and how the sweep file calls it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from abft_fast.options import EvalConfig, TrainConfig
from abft_fast.training.run_folder import MOVABLE, OF_THIS_CALL

VANILLA = "vanilla"

CALIBRATIONS = {
    VANILLA: "none", "contextual": "contextual", "domain": "domain", "batch": "batch"
}  # fmt: skip
"""The methods that only evaluate, and the value of `calibration` that each stands for."""

SAID_BY_METHOD = frozenset({"calibration", "stream"})
"""Options that split no runs of such a method: it says the first, the second changes no score."""

PLACEMENT = frozenset(OF_THIS_CALL)
"""Options that say where a cell runs. The name of a cell does not depend on them."""

WITHOUT_RESULT = PLACEMENT | {
    "token_budget", "attention_backend", "checkpointing", "save_steps", "stream_states", "tracker",
    "no_eval", "no_eval_before", "no_eval_after", "no_save", "no_report",
}  # fmt: skip
"""Options that change no result."""

_IN_NAMES_WHEN_UNSET = {"template", "test_file", "meta_datasets", "plain_text", "mauve_prefix"}
"""Options whose None is in the names of cells, as it always was; no new option may change them."""


@dataclass(frozen=True)
class Cell:
    """One process of a sweep.

    Attributes:
        command: `train` or `eval`.
        method: a method of `train`, or a key of `CALIBRATIONS`.
        config: the options of the command.
        labels: names that the sweep file gives, by axis: `{"model": "big", "setting": "w/o PID"}`.
        title: one line for people, in the words of the sweep file.
        data: path and SHA-256 of each of the user's own data files.
    """

    command: str
    method: str
    config: TrainConfig | EvalConfig
    labels: dict[str, str]
    title: str
    data: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The name of the cell's folder, such as `gpt2-sst2-ABFT-seed0-0123456789`.

        The name depends on options and data alone, not on the data's folder: the same cell has the
        same name in every sweep and on every machine.
        """
        changed = self.config.model_dump(mode="json", exclude_defaults=True, exclude=set(PLACEMENT))
        changed = {n: v for n, v in changed.items() if v is not None or n in _IN_NAMES_WHEN_UNSET}
        for name in changed.keys() & MOVABLE:
            changed[name] = _without_folders(changed[name])
        digests = [digest for _, digest in self.data]
        identity = json.dumps([self.command, self.method, changed, digests], sort_keys=True)
        parts = [_last_part(self.config.model), _last_part(self.config.dataset_name), self.method]
        if isinstance(self.config, TrainConfig):
            parts.append(f"seed{self.config.seed}")
        return "-".join([*parts, hashlib.sha256(identity.encode()).hexdigest()[:10]])


def _without_folders(data: str | None) -> str | None:
    """Return the names of the user's files, or of datasets, that an option lists by commas."""
    return data and ",".join(path.rsplit("/", 1)[-1] for path in data.split(","))


def _last_part(path: str) -> str:
    """Return a path's last part, with characters that a folder's name may have."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", path.rstrip("/").split("/")[-1])
