"""The folder of a run: what is in it, how it is made, continued and never overwritten unasked."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from abft_fast.config import TrainConfig, read_yaml, resolve, write_yaml
from abft_fast.environment import describe
from abft_fast.errors import UserError
from abft_fast.files import write_json, write_text


class Run:
    """`config.yaml`, `environment.json`, `metrics.jsonl`, `evaluation.json`, `checkpoints/` and
    `adapter/` (or `model/`) of one training run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self._metrics = folder / "metrics.jsonl"
        self._evaluation = folder / "evaluation.json"

    @classmethod
    def reserve(cls, config: TrainConfig) -> Run:
        """The folder a new run will have; nothing is written yet.

        Raises:
            UserError: it holds something and `overwrite` is off, or something that is no run.
        """
        folder = config.output_dir or Path("runs") / _name(config)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"output folder {folder} is a file: choose another --output-dir")
        if folder.is_dir() and any(folder.iterdir()):
            if not config.overwrite:
                raise UserError(
                    f"output folder {folder} is not empty: choose another --output-dir, "
                    f"pass --overwrite, or continue it with --resume {folder}"
                )
            if not (folder / "config.yaml").is_file():
                raise UserError(
                    f"output folder {folder} is not a run of abft-fast, so --overwrite does not "
                    "empty it: choose another --output-dir"
                )
        return cls(folder)

    @classmethod
    def open(cls, folder: Path) -> tuple[Run, TrainConfig]:
        """A run to continue, and its options.

        Raises:
            UserError: the folder is no run.
        """
        if not (folder / "config.yaml").is_file():
            raise UserError(f"--resume {folder}: no run there (no config.yaml)")
        return cls(folder), resolve(TrainConfig, read_yaml(folder / "config.yaml"))

    def create(self, config: TrainConfig) -> None:
        """Make the folder, empty it where that was asked for, and write what is known so far."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        write_json(self.folder / "environment.json", describe())
        write_yaml(config, self.folder / "config.yaml")

    @property
    def evaluation(self) -> dict[str, Any]:
        """What evaluation.json holds; empty before the first evaluation."""
        if not self._evaluation.is_file():
            return {}
        return json.loads(self._evaluation.read_text(encoding="utf-8"))

    def record_evaluation(self, when: str, dataset: str, metrics: dict, attention: dict) -> None:
        """Add one side, `before` or `after`, to evaluation.json."""
        content = self.evaluation
        content.setdefault(when, {})[dataset] = metrics
        content.setdefault("attention", {}).setdefault(when, {})[dataset] = attention
        write_json(self._evaluation, content)

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


def _name(config: TrainConfig) -> str:
    model = re.sub(r"[^A-Za-z0-9._]+", "-", config.model.rstrip("/").split("/")[-1])
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{model}-{config.dataset}"
