"""The folder of a run: what is in it, how it is made, continued and never overwritten unasked."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abft_fast.errors import UserError
from abft_fast.options import TrainConfig
from abft_fast.options.resolve import read_yaml, resolve, write_yaml
from abft_fast.runtime.files import check_output_folder, final_name, write_json, write_text


class Run:
    """`config.yaml`, `environment.json`, `run.log`, `metrics.jsonl`, `evaluation.json`,
    `attention.json`, `checkpoints/` and `adapter/` (or `model/`) of one training run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self._environment = folder / "environment.json"
        self._metrics = folder / "metrics.jsonl"
        self._evaluation = folder / "evaluation.json"
        self._attention = folder / "attention.json"
        self._token_budget = folder / "token_budget.json"

    @classmethod
    def reserve(cls, config: TrainConfig) -> Run:
        """The folder a new run will have; nothing is written yet.

        Raises:
            UserError: it cannot be made or written, or holds something and `overwrite` is off, or
                holds something not of a run.
        """
        folder = config.output_dir or _unused(Path("runs") / _name(config))
        check_output_folder(folder)
        if folder.is_dir() and any(folder.iterdir()):
            if not config.overwrite:
                raise UserError(
                    f"output folder {folder} is not empty: choose another --output-dir, "
                    f"pass --overwrite, or continue it with --resume {folder}"
                )
            foreign = sorted(p.name for p in folder.iterdir() if final_name(p.name) not in _ENTRIES)
            if foreign:
                raise UserError(
                    f"output folder {folder} holds {foreign[0]}, which is not of a run, so "
                    "--overwrite does not empty it: choose another --output-dir"
                )
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> tuple[Run, TrainConfig]:
        """A run to continue, and its options.

        Raises:
            UserError: the folder is no run, or a file of it is damaged.
        """
        run = cls(folder)
        if not run.is_begun:
            raise UserError(f"--resume {folder}: no run there (no config.yaml)")
        options = read_yaml(folder / "config.yaml")
        missing = {n for n, f in TrainConfig.model_fields.items() if not f.exclude} - set(options)
        if missing:
            raise UserError(f"--resume {folder}: its config.yaml lacks {sorted(missing)[0]}")
        for path in (run._environment, run._evaluation, run._attention, run._token_budget):
            _read_json(path)
        return run, resolve(TrainConfig, options)

    @property
    def is_begun(self) -> bool:
        """Whether there is a run that can be continued."""
        return (self.folder / "config.yaml").is_file()

    def create(
        self, config: TrainConfig, trained_parameters: int, files: Mapping[str, str]
    ) -> None:
        """Make the folder, empty it where that was asked for, and write what is known so far.

        Args:
            config: the run's options.
            trained_parameters: how many there are.
            files: SHA-256 of the user's own data files.

        Raises:
            UserError: another run has taken the folder in the meantime.
        """
        new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in list(self.folder.iterdir()):
            if not config.overwrite:
                raise UserError(f"output folder {self.folder} was taken by another run")
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        from abft_fast.runtime.environment import (
            describe,  # torch, which reading a run does without
        )

        found = {"trained_parameters": trained_parameters, "data": dict(files)}
        try:
            write_yaml(config, self.folder / "config.yaml")
            write_json(self._environment, {**describe(), **found})
        except OSError:  # a run without them could not be continued
            (self.folder / "config.yaml").unlink(missing_ok=True)
            if new:
                self.folder.rmdir()
            raise

    @property
    def data(self) -> dict[str, str]:
        """SHA-256, by path, of the user's own data files that the run began with."""
        return _read_json(self._environment).get("data", {})

    def check_data(self, files: Mapping[str, str]) -> None:
        """Make sure that the user's own data are what the run began with.

        Raises:
            UserError: a file has changed.
        """
        known = self.data
        for path, digest in files.items():
            if known.get(path) != digest:
                raise UserError(
                    f"{path} is not what run {self.folder} began with (SHA-256 differs): put it "
                    f"back, or start a new run by --config {self.folder / 'config.yaml'}"
                )

    @property
    def evaluation(self) -> dict[str, dict[str, dict[str, float]]]:
        """Metrics by side, `before` and `after`, and dataset; empty before the first evaluation."""
        return _read_json(self._evaluation)

    @property
    def attention(self) -> dict[str, dict[str, dict[str, float]]]:
        """The same for attention behavior."""
        return _read_json(self._attention)

    def record_evaluation(self, when: str, metrics: dict, attention: dict) -> None:
        """Add one side, by dataset; evaluation.json last, as it tells that the side is done."""
        for path, found in ((self._attention, attention), (self._evaluation, metrics)):
            content = _read_json(path)
            content[when] = found
            write_json(path, content)

    @property
    def token_budget(self) -> int | None:
        """What `--token-budget auto` found; None before."""
        return _read_json(self._token_budget).get("tokens")

    def record_token_budget(self, tokens: int) -> None:
        """Remember it for a resumed run."""
        write_json(self._token_budget, {"tokens": tokens})

    def texts(self, sample: str) -> list[str] | None:
        """Texts a model has written; None before."""
        return _read_json(self.folder / f"texts-{sample}.json").get("texts")

    def record_texts(self, sample: str, texts: list[str]) -> None:
        """Keep a sample of texts."""
        write_json(self.folder / f"texts-{sample}.json", {"texts": texts})

    @property
    def mauve(self) -> dict[str, Any]:
        """Scores of the samples; empty before."""
        return _read_json(self.folder / "mauve.json")

    def record_mauve(self, found: dict[str, Any]) -> None:
        """Keep the scores."""
        write_json(self.folder / "mauve.json", found)

    @property
    def artifact(self) -> Path:
        """What a finished run leaves: its adapter or its model."""
        adapter = self.folder / "adapter"
        return adapter if adapter.is_dir() else self.folder / "model"

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add a step's row to metrics.jsonl."""
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a row cut short by a crash is not one."""
        rows = []
        if self._metrics.is_file():
            for line in self._metrics.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    break
        return rows

    def forget_metrics_after(self, step: int) -> None:
        """Drop rows of steps that a resumed run takes again."""
        rows = [row for row in self.metrics() if row["step"] <= step]
        write_text(self._metrics, "".join(json.dumps(row) + "\n" for row in rows))


_ENTRIES = {
    "config.yaml", "environment.json", "run.log", "metrics.jsonl", "evaluation.json",
    "attention.json", "token_budget.json", "checkpoints", "adapter", "model", "abft-fast",
    "texts-before.json", "texts-before-again.json", "texts-after.json", "mauve.json",
}  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): put it back, or start a new run by --config "
            f"{path.with_name('config.yaml')}"
        ) from None


def _unused(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that is not there."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not path.exists())


def _name(config: TrainConfig) -> str:
    model = _plain(config.model.rstrip("/").split("/")[-1])
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{model}-{_plain(config.dataset_name)}"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", name)
