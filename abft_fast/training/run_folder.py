"""Make, read and continue the folder of a run; never overwrite one unasked.

Nothing here needs torch, so that results are read quickly.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from abft_fast.data import NAMES
from abft_fast.data.tables import name_of
from abft_fast.errors import UserError
from abft_fast.options import TrainConfig, flag
from abft_fast.options.base import shell_command
from abft_fast.options.resolve import read_yaml, resolve, write_yaml
from abft_fast.options.training_data import DATASET_LISTS, listed_names
from abft_fast.runtime.files import (
    check_output_folder,
    final_name,
    remove_leftovers,
    unused_folder,
    write_json,
    write_text,
)
from abft_fast.runtime.lock import LOCK, FolderLock, check_free

OF_THIS_CALL = ("device", "device_map")
"""Options that a resumed run may be given anew, beside `force`, which no run keeps."""

MOVABLE = ("dataset", "test_file", "template", *DATASET_LISTS, "plain_text", "mauve_prefix")
"""Options that name the user's files, which may have moved when a run is resumed."""

_IN_EVERY_CONFIG = frozenset({
    "model", "dataset", "k", "prompt_form", "label_token", "on_long_prompt", "token_budget",
    "device", "mixed_precision", "train_samples", "epochs", "pseudo_batch_size", "lr", "gradient",
    "trainable", "lora_r", "penalty", "reward", "adaptation", "pid_p", "pid_i", "pid_d",
    "head_filter", "checkpointing", "seed", "save_steps", "no_eval", "tracker",
})  # fmt: skip
"""The first release's options: a config.yaml that lacks one is damaged. Never add to it."""

_LATER_DEFAULTS = {
    name: field.default
    for name, field in TrainConfig.model_fields.items()
    if not field.exclude and name not in _IN_EVERY_CONFIG
}
"""A new option's default is what the program did before, so runs without the option have it."""


class RunFolder:
    """Read and write the files of one training run.

    `_ENTRIES` names the files of a run; `config.yaml` makes the folder a run.

    Attributes:
        folder: where they are.
        checkpoints: the folder of checkpoints.
        is_created: whether this process has made the run's files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self._environment = folder / "environment.json"
        self._metrics = folder / "metrics.jsonl"
        self._evaluation = folder / "evaluation.json"
        self._attention = folder / "attention.json"
        self._token_budget = folder / "token_budget.json"
        self._lock: FolderLock | None = None
        self.is_created = False

    @classmethod
    def reserve(cls, config: TrainConfig) -> RunFolder:
        """Choose the folder of a new run; write nothing yet.

        Raises:
            UserError: the folder cannot be made or written; another run is using it; it is not
                empty and `overwrite` is off; or it holds a file that does not belong to a run.
        """
        folder = config.output_dir or unused_folder(Path("runs") / _name(config))
        check_output_folder(folder)
        run = cls(folder)
        check_free(folder, run._busy)
        if folder.is_dir() and (content := _content(folder)):
            if not config.overwrite:
                ways = "choose another --output-dir, or pass --overwrite"
                if run.is_begun:
                    ways += f", or continue it with --resume {shlex.quote(str(folder))}"
                raise UserError(f"output folder {folder} is not empty: {ways}")
            foreign = sorted(p.name for p in content if final_name(p.name) not in _ENTRIES)
            if foreign:
                raise UserError(
                    f"output folder {folder} holds {foreign[0]}, which no run writes, so "
                    "--overwrite does not empty the folder: choose another --output-dir"
                )
        return run

    @classmethod
    def open(
        cls, folder: Path, given: Mapping[str, Any] | None = None
    ) -> tuple[RunFolder, TrainConfig]:
        """Open a run to continue it; return it with its options.

        Args:
            folder: the run's folder.
            given: options that replace the run's own: where its model and its files are now, or
                `OF_THIS_CALL`.

        Raises:
            UserError: the folder holds no run, the run goes on, a file of it is damaged, or a file
                of the user is gone.
        """
        given = {} if given is None else given
        run = cls(folder)
        check_free(folder, run._busy)
        if not run.is_begun:
            raise UserError(f"--resume {folder}: the folder holds no run (it has no config.yaml)")
        options = run.options
        if missing := sorted(_IN_EVERY_CONFIG - set(options)):
            raise UserError(f"--resume {folder}: config.yaml lacks the option {missing[0]}")
        for path in (run._environment, run._evaluation, run._attention, run._token_budget):
            _read_json(path)
        for name in MOVABLE:
            _check_place(folder, name, options[name], given.get(name))
        config = resolve(TrainConfig, {**options, **given}).moved_from(options)
        if run.data and "dataset" not in given and config.data_are_own:
            paths = [Path(path) for path in run.data]
            names = [name_of(place) for path in paths for place in (path, path.parent)]
            if name_of(Path(config.dataset)) not in names:
                raise UserError(
                    f"{folder / 'config.yaml'} names {config.dataset}, but the run began with "
                    f"{paths[0]}, and prompts are drawn by a file's name: restore that line, and "
                    f"give --dataset {config.dataset}"
                )
        return run, config

    def resume_command(self, config: TrainConfig) -> str:
        """Return the command that continues the run with these options."""
        own = self.options
        now = config.model_dump(mode="json")
        names = [
            name for name in ("model", *OF_THIS_CALL, *MOVABLE) if now.get(name) != own.get(name)
        ]
        if config.force:
            names.append("force")
        return shell_command("train", "--resume", self.folder, *config.as_arguments(names))

    @property
    def is_begun(self) -> bool:
        """Return whether the folder holds a run that can be continued."""
        return (self.folder / "config.yaml").is_file()

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of the run; empty if the folder holds no run.

        An option that the program did not have yet is at its default.
        """
        if not self.is_begun:
            return {}
        return {**_LATER_DEFAULTS, **read_yaml(self.folder / "config.yaml")}

    def create(
        self,
        config: TrainConfig,
        trained_parameters: int,
        files: Mapping[str, str],
        environment: Mapping[str, Any],
    ) -> None:
        """Make the folder, empty it if the options ask for that, and write what is known so far.

        Args:
            config: the run's options.
            trained_parameters: how many parameters are trained.
            files: SHA-256 of the user's own data files, by path.
            environment: what the run runs on (from `runtime.environment.describe`), its model
                file (from `models.gguf.identity`), and `base` (from `models.base_identity`).

        Raises:
            UserError: another run has taken the folder in the meantime.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in _content(self.folder):
            if not config.overwrite:
                raise UserError(f"output folder {self.folder} was taken by another run")
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        about = {**environment, "trained_parameters": trained_parameters, "data": dict(files)}
        try:
            write_json(self._environment, about)
            write_yaml(config, self.folder / "config.yaml")  # last: it makes the folder a run
        except BaseException:  # Ctrl-C, too: a run without these files could not be continued
            shutil.rmtree(self.folder)
            raise
        self.is_created = True

    def discard(self) -> None:
        """Remove the folder if this process made it and it has no results."""
        if self.is_created and not (self._evaluation.is_file() or self._metrics.is_file()):
            shutil.rmtree(self.folder, ignore_errors=True)

    def hold(self, say: Callable[[str], None]) -> None:
        """Make and lock the folder; remove files that a killed process left half written.

        Args:
            say: prints a line where the folder cannot be locked.

        Raises:
            UserError: another run is using the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.folder, self._busy, say)
        for folder in (self.folder, self.checkpoints, *self.checkpoints.glob("*-*")):
            remove_leftovers(folder)

    def release(self) -> None:
        """Let other processes run in the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def _busy(self) -> str:
        return f"another run is using {self.folder}: wait until it ends, or use another folder"

    @property
    def data(self) -> dict[str, str]:
        """Return the SHA-256 of the user's own data files at the start of the run, by path."""
        return _read_json(self._environment).get("data", {})

    @property
    def base(self) -> dict[str, Any] | None:
        """Return the base that the run trains, from `models.base_identity`; None if unrecorded."""
        return _read_json(self._environment).get("base")

    def record_base(self, base: Mapping[str, Any]) -> None:
        """Record the base where its weights were read after the run began."""
        write_json(self._environment, {**_read_json(self._environment), "base": dict(base)})

    def check_data(self, files: Mapping[str, str]) -> None:
        """Refuse the user's own data if their content is not that of the run's beginning.

        Args:
            files: SHA-256 by path, in the order of `create`; a file may have moved since.

        Raises:
            UserError: a file has another SHA-256.
        """
        # Two options may have named one file, and name copies of it now.
        now, then = ({digest: path for path, digest in f.items()} for f in (files, self.data))
        for (digest, path), (known, known_path) in itertools.zip_longest(
            now.items(), then.items(), fillvalue=("", "")
        ):
            if digest == known:
                continue
            if path != known_path:
                raise UserError(
                    f"run {self.folder} began with {known_path or 'no such file'}, and "
                    f"{path or 'nothing'} has another content (SHA-256 differs): give the same file"
                )
            raise UserError(
                f"{path} has changed since run {self.folder} began (SHA-256 differs): restore "
                "the file, or start a new run with --config "
                f"{shlex.quote(str(self.folder / 'config.yaml'))}"
            )

    @property
    def evaluation(self) -> dict[str, dict[str, Any]]:
        """Return metrics by side (`before`, `after`), then by dataset; empty before any evaluation.

        With several tests, those of a side are by test, then by dataset: see `options.of_one_test`.
        """
        return _read_json(self._evaluation)

    @property
    def attention(self) -> dict[str, dict[str, Any]]:
        """Return attention behavior, in the form of `evaluation`."""
        return _read_json(self._attention)

    def record_evaluation(
        self, when: str, metrics: dict, attention: dict, details: dict | None = None
    ) -> None:
        """Record one side, in the form of `evaluation`, and the details of its first dataset.

        evaluation.json is written last, because it tells a resumed run that the side is done.
        """
        if details is not None:
            write_text(self._details(when), json.dumps(details) + "\n")
        for path, found in ((self._attention, attention), (self._evaluation, metrics)):
            content = _read_json(path)
            content[when] = found
            write_json(path, content)

    def details(self, when: str) -> dict[str, Any]:
        """Return every prediction of one side and more, from `evaluation.details`; empty if none.

        With several tests, by test.
        """
        return _read_json(self._details(when))

    def _details(self, when: str) -> Path:
        return self.folder / f"details-{when}.json"

    @property
    def token_budget(self) -> int | None:
        """Return the recorded token budget; None if none is recorded."""
        return _read_json(self._token_budget).get("tokens")

    def record_token_budget(self, tokens: int) -> None:
        """Record the token budget for a resumed run."""
        write_json(self._token_budget, {"tokens": tokens})

    def texts(self, sample: str) -> list[str]:
        """Return a recorded sample of texts; empty if it is not recorded."""
        return _read_json(self.folder / f"texts-{sample}.json").get("texts", [])

    def record_texts(self, sample: str, texts: list[str]) -> None:
        """Record a sample of texts."""
        write_json(self.folder / f"texts-{sample}.json", {"texts": texts})

    @property
    def mauve(self) -> dict[str, Any]:
        """Return the recorded MAUVE scores; empty if there are none."""
        return _read_json(self.folder / "mauve.json")

    def record_mauve(self, scores: dict[str, Any]) -> None:
        """Record the MAUVE scores."""
        write_json(self.folder / "mauve.json", scores)

    @property
    def artifact(self) -> Path:
        """Return the folder of the trained adapter or model."""
        adapter = self.folder / "adapter"
        return adapter if adapter.is_dir() else self.folder / "model"

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append a step's row to metrics.jsonl."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())  # as checkpoints are: none is on the disk before its row

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl, without a row that a crash cut short."""
        rows = []
        if self._metrics.is_file():
            for line in self._metrics.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return rows

    def forget_metrics_after(self, step: int) -> None:
        """Delete the rows of the steps that a resumed run takes again."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        write_text(self._metrics, "".join(json.dumps(row) + "\n" for row in rows))


_ENTRIES = {
    "config.yaml", "environment.json", "run.log", "metrics.jsonl", "evaluation.json",
    "attention.json", "token_budget.json", "checkpoints", "adapter", "model", "abft-fast",
    "details-before.json", "details-after.json", "report.html",
    "texts-before.json", "texts-before-again.json", "texts-after.json", "mauve.json",
}  # fmt: skip


def _content(folder: Path) -> list[Path]:
    """Return what a folder holds besides its lock."""
    return [path for path in folder.iterdir() if path.name != LOCK]


def _check_place(folder: Path, name: str, recorded: str | None, given: str | None) -> None:
    """Refuse a file that is gone, and a new path for an option that names no file.

    Args:
        folder: the folder of the run to resume.
        name: an option of `MOVABLE`.
        recorded: its value in the run.
        given: its new value, if one is given.
    """
    is_list = name in DATASET_LISTS
    places = listed_names(recorded) if is_list else [recorded] if recorded else []
    files = [place for place in places if place not in NAMES]
    if given is not None:
        if not files:
            raise UserError(f"--resume uses the run's own options: leave out {flag(name)}")
        return
    for place in files:
        if not (os.path.isfile(place) or os.path.isdir(place)):
            raise UserError(
                f"--resume {folder}: {place} is not there any more: give its new place by "
                f"{flag(name)}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): restore the file, or start a new run with --config "
            f"{shlex.quote(str(path.with_name('config.yaml')))}"
        ) from None


def _name(config: TrainConfig) -> str:
    model = _plain(config.model.rstrip("/").split("/")[-1])
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{model}-{_plain(config.dataset_name)}"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)
