"""Find the run that trained an adapter or a model, so that no row is trained on and tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abft_fast import data
from abft_fast.data.tables import place_to_save
from abft_fast.errors import UserError
from abft_fast.options import (
    ComparedOnPromptsOptions,
    DrawnPromptOptions,
    EvalConfig,
    Options,
    PredictConfig,
    datasets,
    flag,
)
from abft_fast.training.run_folder import RunFolder


def differences(config: EvalConfig | PredictConfig | ComparedOnPromptsOptions) -> list[str]:
    """Return a line for each adapter whose run had other prompts or weights."""
    return [line for folder in config.adapter_folders for line in _differences(config, folder)]


def _differences(
    config: EvalConfig | PredictConfig | ComparedOnPromptsOptions, adapter: Path
) -> list[str]:
    if (run := _run_of(adapter)) is None:
        return []
    options = run.options
    now = config.model_dump(mode="json")
    names: list[str] = [
        name for name in ("k", "prompt_form", "label_token", "quantized") if name in now
    ]
    dataset = options["dataset"]
    if dataset not in data.NAMES and now.get("dataset") in (None, dataset):
        names.append("template")
        now["template"] = config.template and str(config.template.resolve())
    others = [_given(name, options[name]) for name in names if options[name] != now[name]]
    return [f"adapter {adapter} was trained with {', '.join(others)}"] if others else []


def check_tested_apart(config: DrawnPromptOptions, trained: Path) -> None:
    """Refuse to test rows of the user's data that trained a model.

    Args:
        config: the options of the test.
        trained: folder of the adapter or of the whole model; one that is no run's is let pass.

    Raises:
        UserError: the test file was trained on, the split differs from that of the run, or the data
            have changed.
    """
    if not config.data_are_own:
        return
    run = _run_of(trained)
    if run is None:
        return
    options = run.options
    dataset = datasets.own_from_options(config)
    digests, trained_on = dict(dataset.files), _trained_digests(run)
    if dataset.test_path != dataset.training_path:
        if digests[place_to_save(dataset.test_path)] in trained_on:
            raise UserError(
                f"{trained} was trained on rows of {dataset.test_path}, which are to be tested: "
                "give other rows with --test-file"
            )
        return
    now = config.model_dump(mode="json")
    same_content = digests[place_to_save(dataset.training_path)] in trained_on
    if options["dataset"] != now["dataset"] and not same_content:
        return
    what = f"{trained} was trained on rows of {config.dataset} that are to be tested"
    if not same_content:
        raise UserError(
            f"{what}, because the file has changed since: restore the file, or give --test-file"
        )
    for name in ("test_file", "test_share", "split_seed", "label_column"):
        if options[name] != now[name]:
            given = _given(name, options[name])
            raise UserError(
                f"{what}: its run had {given}; give the same, or other rows with --test-file"
            )


def _trained_digests(run: RunFolder) -> set[str]:
    """Return the SHA-256 of the user's files that a run may have trained on."""
    options = run.options
    untrained = {options["test_file"], options["template"]}
    if options["dataset"] not in data.NAMES:
        untrained.add(str(Path(options["dataset"]) / "test"))  # of a folder with parts
    return {digest for place, digest in run.data.items() if place not in untrained}


def _given(name: str, value: Any) -> str:
    """Return an option as a user writes it."""
    if value is None or value is False:
        return f"no {flag(name)}"
    return flag(name) if value is True else f"{flag(name)} {value}"


def _run_of(trained: Path) -> RunFolder | None:
    """Return the run whose folder holds the adapter or model; None if the folder is not a run's."""
    run = RunFolder(trained.resolve().parent)
    known = {name for name, field in Options.model_fields.items() if not field.exclude}
    return run if known <= run.options.keys() else None
