"""The command line: parses options, calls, prints. Options themselves are in config.py."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table

from abft_fast.cli.original_options import translate
from abft_fast.commands import adapter_origin
from abft_fast.data import mauve_prefixes
from abft_fast.errors import Interrupted, ProcessEnded, RunError, SaidByMain, UserError
from abft_fast.models.files import check_adapter, check_model, check_model_folder
from abft_fast.options import (
    CommandOptions,
    EvalConfig,
    MergeConfig,
    Options,
    PlanConfig,
    PredictConfig,
    SweepConfig,
    TableConfig,
    TrainConfig,
    datasets,
    flag,
    is_positional,
)
from abft_fast.options.resolve import resolve
from abft_fast.runtime import launch
from abft_fast.runtime.files import check_output, check_output_folder, write_json, write_text
from abft_fast.training import picl

_INTERRUPTED = 130  # exit code

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Attention Behavior Fine-Tuning of language models.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command(config_class: type[CommandOptions]) -> Callable:
    """Register a function as a command that takes every option of a config class."""

    def decorate(function: Callable[[dict[str, Any]], None]) -> Callable:
        def command(**flags: Any) -> None:
            function({name: value for name, value in flags.items() if value is not None})

        command.__name__, command.__doc__ = function.__name__.rstrip("_"), function.__doc__
        command.__signature__ = inspect.Signature(
            [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if is_positional(field) else None,
                    annotation=_option(name, field),
                )
                for name, field in config_class.model_fields.items()
            ]
        )
        return app.command()(command)

    return decorate


def _option(name: str, field: FieldInfo) -> Any:
    """A typer option; None means not given, everything else is pydantic's to judge."""
    text = f"{field.description} {default_text(field)}".strip()
    if is_positional(field):
        return Annotated[str, typer.Argument(metavar=name.upper(), help=text, show_default=False)]
    if field.annotation is bool:
        names = f"{flag(name)}/--no-{flag(name)[2:]}" if field.default else flag(name)
        return Annotated[bool | None, typer.Option(names, help=text, show_default=False)]
    option = typer.Option(flag(name), help=text, metavar=values_text(field), show_default=False)
    return Annotated[(list[str] if get_origin(field.annotation) is list else str) | None, option]


def default_text(field: FieldInfo) -> str:
    """A default as help and README show it."""
    if field.default in (None, []) or field.is_required() or field.annotation is bool:
        return "[on]" if field.default is True else ""
    return f"[{field.default}]"


def values_text(field: FieldInfo) -> str:
    """The kind of value an option takes."""
    kind = field.annotation
    kinds = (kind,) if get_origin(kind) is Literal else get_args(kind) or (kind,)
    return "|".join(_kind_text(k) for k in kinds if k is not type(None))


def _kind_text(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return "TEXT" if kind is str else kind.__name__.upper()


def _check_data(config: Options) -> None:
    """Say what is wrong with the user's own data before what is slow to import is."""
    training = isinstance(config, TrainConfig)
    if config.data_are_own:
        dataset = datasets.by_options(config)
        if training and config.method in ("ABFT", "E2E"):
            dataset.check_training(config.k)
        dataset.check_test(config.k)
    if not training:
        return
    if config.method == "PICL" and config.plain_text is not None:
        picl.check(picl.paragraphs(config.plain_text), config.k)
    if config.mauve_test:
        if config.mauve_prefix is not None:
            mauve_prefixes.read_prefixes(config.mauve_prefix)
        mauve_prefixes.check_installed()


_OF_THIS_CALL = ("force", "device", "device_map")
"""Options that a resumed run may be given anew."""


@_command(TrainConfig)
def train_(flags: dict[str, Any]) -> None:
    """Fine-tune attention behavior on a dataset, and evaluate before and after."""
    config = resolve(TrainConfig, flags)
    extra = sorted(set(flags) - {"resume", "debug", *_OF_THIS_CALL})
    if config.resume is not None and extra:
        extra = ", ".join(map(flag, extra))
        raise UserError(f"--resume goes on with the run's own options: leave out {extra}")
    from abft_fast.training.run_folder import Run

    if config.resume is None:
        run = Run.reserve(config)
        _check_data(config)
    else:
        run, options = Run.open(config.resume)
        here = {name: getattr(config, name) for name in _OF_THIS_CALL if name in flags}
        config = options.model_copy(update=here)
        run.check_data(datasets.file_hashes(config))
    check_model(config.model)
    from abft_fast.runtime.environment import uses_cpu

    cpu = uses_cpu(config.device)  # needs torch alone
    from abft_fast.commands.report import print_run
    from abft_fast.runtime import processes
    from abft_fast.runtime.progress import Progress
    from abft_fast.training.loop import train

    with processes.running(cpu):
        run = Run(processes.from_main(run.folder))  # its name has the time
        try:
            train(config, run, Progress(), new="resume" not in flags)
        except KeyboardInterrupt:
            if config.no_save or not run.is_begun:
                raise
            line = f"interrupted; continue with `abft-fast train --resume {run.folder}`"
            raise Interrupted(line) from None
    if launch.is_main():
        print_run(run)


@_command(EvalConfig)
def eval_(flags: dict[str, Any]) -> None:
    """Evaluate a model, with or without an adapter, on a dataset's test prompts."""
    config = resolve(EvalConfig, flags)
    if config.output is not None:
        check_output(config.output, read=datasets.paths(config))
    if config.adapter is not None:
        check_adapter(config.adapter)
    check_model(config.model)
    _check_data(config)
    if config.adapter is not None:
        adapter_origin.check_tested_apart(config)
    from abft_fast.runtime.environment import uses_cpu

    cpu = uses_cpu(config.device)  # needs torch alone
    from abft_fast.commands.report import print_evaluation
    from abft_fast.commands.session import Job, check_same_data
    from abft_fast.models import trainable
    from abft_fast.runtime import processes
    from abft_fast.runtime.progress import Progress

    with processes.running(cpu):
        check_same_data(config)
        with processes.fail_together():
            job = Job(config, Progress())
            tests = job.evaluation_sets()
            job.show_data(tests[0].prompts)
            for line in (*adapter_origin.differences(config), *config.without_effect):
                job.progress.say(line)
            job.load()
            if config.adapter is not None:
                job.model = trainable.load_adapter(job.model, config.adapter)
            job.keep_label_rows(tests)
            job.check_attention(tests[0].prompts)
        metrics, attention = job.evaluate(tests, "evaluating")
        if config.output is not None:
            processes.run_on_main(write_json, config.output, metrics)
    if launch.is_main():
        print_evaluation(metrics, attention)


@_command(PlanConfig)
def plan_(flags: dict[str, Any]) -> None:
    """Tell how much memory `train` takes with these options, without loading weights."""
    config = resolve(PlanConfig, flags)
    if config.resume is not None:
        options = config.resume / "config.yaml"
        raise UserError(f"--resume is for train: plan a run by --config {options}")
    check_model_folder(config.model)
    _check_data(config)
    from abft_fast.commands.report import print_plan
    from abft_fast.memory.plan import plan_run
    from abft_fast.runtime.progress import Progress

    print_plan(config.model, *plan_run(config, Progress()))


@_command(PredictConfig)
def predict_(flags: dict[str, Any]) -> None:
    """Label the texts of a file, with demonstrations from another file."""
    config = resolve(PredictConfig, flags)
    if launch.process_count() > 1:
        raise UserError("predict runs in one process: start it without a launcher")
    from abft_fast.commands.prediction_files import (
        check_files,
        check_queries,
        open_output,
        read_demonstrations,
    )

    check_model(config.model)
    check_files(config)
    dataset = read_demonstrations(config)
    check_queries(config, dataset.label_words)
    with open_output(config, dataset.label_words) as writer:
        from abft_fast.commands.predict import predict
        from abft_fast.runtime.progress import Progress

        predict(config, dataset, writer, Progress())


@_command(MergeConfig)
def merge_(flags: dict[str, Any]) -> None:
    """Merge adapters into their model's weights, each with a coefficient."""
    config = resolve(MergeConfig, flags)
    check_output_folder(config.output_dir, new=True)
    for folder, _ in config.adapters:
        check_adapter(folder)
    check_model(config.model)
    from abft_fast.commands.merge import merge
    from abft_fast.runtime.progress import Progress

    merge(config, Progress())
    print(f"merged model: {config.output_dir}")


@_command(SweepConfig)
def sweep_(flags: dict[str, Any]) -> None:
    """Run a grid of models, datasets, methods, seeds and settings, or continue it."""
    config = resolve(SweepConfig, flags)
    from abft_fast.experiments.sweep import plan_sweep, run_sweep
    from abft_fast.runtime.progress import Progress

    cells = plan_sweep(config)
    if config.dry_run:
        for cell in cells:
            print(f"{cell.title}  {cell.name}")
        return
    folder = run_sweep(config, cells, Progress())
    print(f"results: {folder / 'results.csv'}; `abft-fast table {folder}` makes a table of them")


@_command(TableConfig)
def table_(flags: dict[str, Any]) -> None:
    """Make a table of the paper from the runs below a folder."""
    config = resolve(TableConfig, flags)
    if config.output is not None:
        check_output(config.output)
    from abft_fast.experiments.records import read_records
    from abft_fast.experiments.tables.format import FORMATS
    from abft_fast.experiments.tables.layouts import make_table

    text = FORMATS[config.format](make_table(config, read_records(config.folder)))
    if config.output is None:
        print(text, end="")
    else:
        write_text(config.output, text)


@app.command()
def doctor() -> None:
    """Check versions, device, data and disk, and list what a run would use."""
    from abft_fast.commands.doctor import diagnose

    findings, problems = diagnose()
    table = Table(show_header=False)
    for what, found in findings:
        table.add_row(what, found)
    Console(highlight=False).print(table)
    if problems:
        raise RunError("; ".join(problems))


def main() -> None:
    """Entry point: one line an error; exit 2 for the user's mistakes, 1 for failures."""
    debug = "--debug" in sys.argv
    if not debug:
        _quiet()
    try:
        code = app(translate(sys.argv[1:]), standalone_mode=False)
        if code == _INTERRUPTED:  # typer returns it in place of the exception
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exception(error)
        message, code = _explain(error)
        message = " ".join(message.split())
        if isinstance(error, ProcessEnded):
            launch.exit_at_once(message, code)
        if not launch.is_main() and _same_everywhere(error):
            launch.exit_after_main(code, seconds=0 if code == _INTERRUPTED else 10)
        if message:
            print(f"abft-fast: {message}", file=sys.stderr)
    sys.exit(code)


def _same_everywhere(error: BaseException) -> bool:
    """Whether every process of a run ends with this error, so that one is enough to say it."""
    kinds = (UserError, RunError, SaidByMain, typer.TyperException)
    return isinstance(error, (*kinds, Interrupted, KeyboardInterrupt))


def _explain(error: BaseException) -> tuple[str, int]:
    """The line a user reads and the exit code."""
    match error:
        case UserError() | Interrupted():
            return str(error), 2 if isinstance(error, UserError) else _INTERRUPTED
        case typer.TyperException():
            return error.format_message(), 2
        case KeyboardInterrupt() | typer.Abort():
            return "interrupted", _INTERRUPTED
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"the disk is full: {error.filename or 'nothing more can be written'}", 1
        case SaidByMain():
            return "", error.exit_code
        case OSError() if error.filename and error.strerror:
            line = f"{error.filename}: {error.strerror}"
        case RunError() | OSError():
            line = str(error)
        case _:
            line = f"{type(error).__name__}: {error} (--debug shows where)"
    return line, 1


def _quiet() -> None:
    """Keep other libraries' notices out of what a run says."""
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
