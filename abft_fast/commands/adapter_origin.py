"""The run that an adapter is from, so that it is not tested on what it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abft_fast import data
from abft_fast.errors import UserError
from abft_fast.options import EvalConfig, Options, PredictConfig, datasets, flag
from abft_fast.options.resolve import read_yaml
from abft_fast.training.run_folder import Run


def differences(config: EvalConfig | PredictConfig) -> list[str]:
    """A line where prompts or weights are not like those of the adapter's run."""
    run = _options(config.adapter) if config.adapter is not None else {}
    if not run:
        return []
    now = config.model_dump(mode="json")
    names = [name for name in ("k", "prompt_form", "label_token", "quantized") if name in now]
    if run["dataset"] not in data.DATASETS and now.get("dataset") in (None, run["dataset"]):
        names.append("template")
        now["template"] = config.template and str(config.template.resolve())
    found = [_given(name, run[name]) for name in names if run[name] != now[name]]
    return [f"adapter {config.adapter} was trained with {', '.join(found)}"] if found else []


def check_tested_apart(config: EvalConfig) -> None:
    """Make sure that a split of the user's data tests on no row that the adapter was trained on.

    Raises:
        UserError: it is another split than that of the adapter's run, or the data have changed.
    """
    run = _options(config.adapter)
    if not run or not config.data_are_own:
        return
    dataset = datasets.by_options(config)
    if dataset.test_path != dataset.training_path:
        return  # test rows are in a file of their own
    now = config.model_dump(mode="json")
    digest = dict(dataset.files)[str(dataset.training_path.resolve())]
    trained_on = Run(config.adapter.resolve().parent).data.get(run["dataset"])
    if run["dataset"] != now["dataset"] and digest != trained_on:
        return
    what = f"adapter {config.adapter} was trained on rows of {config.dataset} that this tests on"
    if digest != trained_on:
        raise UserError(f"{what}, as the file has changed since: put it back, or give --test-file")
    for name in ("test_file", "test_share", "split_seed", "label_column"):
        if run[name] != now[name]:
            given = _given(name, run[name])
            raise UserError(f"{what}: its run had {given}; give that, or other rows by --test-file")


def _given(name: str, value: Any) -> str:
    """An option as a user gives it."""
    if value is None or value is False:
        return f"no {flag(name)}"
    return flag(name) if value is True else f"{flag(name)} {value}"


def _options(adapter: Path) -> dict[str, Any]:
    """Of the run whose folder the adapter is in; empty where it is in none."""
    path = adapter.resolve().with_name("config.yaml")
    options = read_yaml(path) if path.is_file() else {}
    known = {name for name, field in Options.model_fields.items() if not field.exclude}
    return options if known <= options.keys() else {}
