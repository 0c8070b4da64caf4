"""Check a command's options, files and model folder before anything slow is imported.

This module imports neither torch nor transformers at its top, so a mistake is answered in about a
second. `cli.app` calls a check of this module first and imports the command's own module after it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abft_fast import plots
from abft_fast.commands import adapter_origin, prediction_files
from abft_fast.data import Dataset, mauve_prefixes
from abft_fast.errors import UserError
from abft_fast.models.files import (
    check_adapter,
    check_model,
    check_model_folder,
    is_whole_model,
)
from abft_fast.options import (
    DrawnPromptOptions,
    EvalConfig,
    MergeConfig,
    OutputOptions,
    PlacementOptions,
    PlanConfig,
    PredictConfig,
    ReadPromptOptions,
    TrainConfig,
    datasets,
    flag,
)
from abft_fast.options.base import expanded, shell_command
from abft_fast.options.methods import METHODS
from abft_fast.options.resolve import resolve
from abft_fast.runtime import launch
from abft_fast.runtime.files import check_output, check_output_folder
from abft_fast.training import picl
from abft_fast.training.run_folder import MOVABLE, OF_THIS_CALL, RunFolder


def check_train(flags: dict[str, Any]) -> tuple[TrainConfig, RunFolder]:
    """Reserve the folder of a new run, or open the run to resume.

    Args:
        flags: the options of the command line.

    Returns:
        The run's options and folder. The options of a resumed run are its own.

    Raises:
        UserError: the options, the data, the model or the run's folder do not allow it.
    """
    if "resume" in flags:
        run, config = _resumed(flags)
    else:
        config = resolve(TrainConfig, flags)
        if config.resume is not None:
            raise UserError(f"--resume {config.resume}: give it on the command line, not in a file")
        run = RunFolder.reserve(config)
        _check_data(config)
        check_train_data(config)
    check_model(config.model)
    _check_device(config)
    _check_processes(config)
    return config, run


def _check_processes(config: TrainConfig) -> None:
    if config.stream_states == "disk" and launch.process_count() > 1:
        raise UserError(
            "--stream-states disk works in one process: start it without a launcher, or leave the "
            "option out"
        )


def _resumed(flags: dict[str, Any]) -> tuple[RunFolder, TrainConfig]:
    """Open the run to resume; refuse options other than those that it may be given anew."""
    allowed = {"resume", "debug", "force", "model", *OF_THIS_CALL, *MOVABLE}
    unwanted = sorted(set(flags) - allowed)
    if unwanted:
        names = ", ".join(map(flag, unwanted))
        raise UserError(f"--resume uses the run's own options: leave out {names}")
    run, config = RunFolder.open(Path(expanded(flags["resume"])), flags)
    run.check_data(datasets.file_hashes(config))
    return run, config


def check_evaluate(config: EvalConfig) -> None:
    """Check the files that an evaluation reads and writes.

    Raises:
        UserError: one of them cannot be used.
    """
    if config.output is not None:
        named = [path for path in (config.config, Path(config.model)) if path is not None]
        check_output(config.output, read=[*datasets.paths(config), *named])
    for folder in config.adapter_folders:
        check_adapter(folder)
    check_model(config.model)
    _check_data(config)
    for folder in (*config.adapter_folders, Path(config.model)):
        adapter_origin.check_tested_apart(config, folder)
    _check_device(config)


def check_plan(config: PlanConfig) -> None:
    """Check the data and the model folder that a plan is made for.

    Raises:
        UserError: one of them cannot be used, or `--resume` is given.
    """
    if config.resume is not None:
        planned = shell_command("plan", "--config", config.resume / "config.yaml")
        raise UserError(f"--resume works with train only: plan a run with `{planned}`")
    check_model_folder(config.model)
    _check_data(config)
    check_train_data(config)


def check_predict(config: PredictConfig) -> Dataset:
    """Check the files that a prediction reads and writes; return the demonstrations.

    Raises:
        UserError: one of them cannot be used, or a launcher started several processes.
    """
    if launch.process_count() > 1:
        raise UserError("predict runs in one process: start it without a launcher")
    check_model(config.model)
    prediction_files.check_files(config)
    dataset = prediction_files.read_demonstrations(config)
    prediction_files.check_queries(config, dataset.label_words)
    return dataset


def check_merge(config: MergeConfig) -> None:
    """Check the adapters, the model folder and the output folder of a merge.

    Raises:
        UserError: one of them cannot be used, or a launcher started several processes.
    """
    if launch.process_count() > 1:
        raise UserError("merge runs in one process: start it without a launcher")
    check_output_folder(config.output_dir, new=True)
    for folder, _ in config.adapters:
        if is_whole_model(folder):
            check_model(str(folder))
        else:
            check_adapter(folder)
    check_model(config.model)


def check_analyze(config: OutputOptions) -> None:
    """Check the models and the output folder of an analysis, and that pictures can be drawn.

    Raises:
        UserError: one of them cannot be used, or a launcher started several processes.
    """
    if launch.process_count() > 1:
        raise UserError("analyze runs in one process: start it without a launcher")
    plots.check_installed("abft-fast analyze")
    if config.output_dir is not None:
        check_output_folder(config.output_dir)
    for adapter in config.adapter_folders:
        check_adapter(adapter)
    check_model(config.model)
    for model in config.other_models:
        check_model(model)
    _check_device(config)


def check_analyze_prompts(config: ReadPromptOptions) -> None:
    """Check an analysis that reads prompts, with its data.

    Raises:
        UserError: as `check_analyze`, or the data cannot be used.
    """
    check_analyze(config)
    _check_data(config)
    for trained in (*config.adapter_folders, *map(Path, (config.model, *config.other_models))):
        adapter_origin.check_tested_apart(config, trained)


def check_train_data(config: TrainConfig) -> None:
    """Check the files that only training reads.

    Raises:
        UserError: the plain text or the prefixes of MAUVE cannot be used, or a package is missing.
    """
    if config.plain_text is not None:
        picl.check(picl.paragraphs(config.plain_text), config.k)
    if config.mauve_test:
        if config.mauve_prefix is not None:
            mauve_prefixes.read_prefixes(config.mauve_prefix)
        mauve_prefixes.check_installed()


def _check_data(config: DrawnPromptOptions) -> None:
    """Check that the user's own data allow `--k` demonstrations."""
    if launch.process_count() > 1:
        datasets.refuse_streams(config, "every process")
    if config.data_are_own:
        dataset = datasets.from_options(config)
        if isinstance(config, TrainConfig) and METHODS[config.method].trains_on_tested_dataset:
            dataset.check_training(config.k, config.seen_labels_only)
        dataset.check_test(config.k)


def _check_device(config: PlacementOptions) -> None:
    """Refuse `--device cuda` without a GPU; this needs torch, but nothing slower."""
    from abft_fast.runtime.environment import uses_cpu

    uses_cpu(config.device)
