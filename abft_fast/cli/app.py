"""Parse the command line, call a command, print its result.

The options are in `options`, the work is in `commands` and `experiments`. Every command here checks
its options by `commands.checks` first. It imports the module that does the work after that, so that
a mistake is answered before torch is imported.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from abft_fast.cli import errors
from abft_fast.cli.original_options import translate
from abft_fast.commands import checks, printing
from abft_fast.commands.prediction_files import open_output
from abft_fast.errors import RunError
from abft_fast.options import (
    CommandOptions,
    DoctorConfig,
    EvalConfig,
    FigureConfig,
    MergeConfig,
    PlanConfig,
    PredictConfig,
    ReportConfig,
    SweepConfig,
    TableConfig,
    TrainConfig,
    flag,
    is_positional,
)
from abft_fast.options.base import shell_command
from abft_fast.options.resolve import resolve
from abft_fast.runtime import launch, streams
from abft_fast.runtime.files import check_output, write_text
from abft_fast.runtime.progress import Progress

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # its table would leave 18 of 80 columns to the text
    help="Attention Behavior Fine-Tuning of language models.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def command_with(config_class: type[CommandOptions], parent: typer.Typer = app) -> Callable:
    """Register a function as a command that takes every option of a config class."""

    def decorate(function: Callable[[dict[str, Any]], None]) -> Callable:
        def command(**flags: Any) -> None:
            with streams.stdout_complete():
                function({name: value for name, value in flags.items() if value is not None})

        command.__name__, command.__doc__ = function.__name__.rstrip("_"), function.__doc__
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # typer reads it
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
        return parent.command()(command)

    return decorate


def _option(name: str, field: FieldInfo) -> Any:
    """Return a typer option; pydantic checks its value, and None means that it is not given."""
    text = f"{field.description} {default_text(field)}".strip()
    if is_positional(field):
        argument = typer.Argument(metavar=name.upper(), help=text, show_default=False)
        return Annotated[_given(field), argument]
    if field.annotation is bool:
        names = f"{flag(name)}/--no-{flag(name)[2:]}" if field.default else flag(name)
        return Annotated[bool | None, typer.Option(names, help=text, show_default=False)]
    short = ["-o"] if name == "output" else []
    option = typer.Option(
        flag(name), *short, help=text, metavar=values_text(field), show_default=False
    )
    return Annotated[_given(field) | None, option]


def _given(field: FieldInfo) -> Any:
    """Return the type by which typer hands over what is given."""
    return list[str] if get_origin(field.annotation) is list else str


def default_text(field: FieldInfo) -> str:
    """Return a default as help and documentation show it."""
    if field.default in (None, []) or field.is_required() or field.annotation is bool:
        return "[on]" if field.default is True else ""
    return f"[{field.default}]"


def values_text(field: FieldInfo) -> str:
    """Return the kind of value that an option takes, such as `INT` or `ours|staicc`."""
    kind = field.annotation
    kinds = (kind,) if get_origin(kind) is Literal else get_args(kind) or (kind,)
    return "|".join(_kind_text(k) for k in kinds if k is not type(None))


def _kind_text(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return "TEXT" if kind is str else kind.__name__.upper()


@command_with(TrainConfig)
def train(flags: dict[str, Any]) -> None:
    """Fine-tune attention behavior on a dataset, and evaluate before and after."""
    config, run = checks.check_train(flags)
    from abft_fast.commands.train import train

    run = train(config, run, Progress())
    if launch.is_main():
        printing.print_run(run)


@command_with(EvalConfig)
def eval_(flags: dict[str, Any]) -> None:
    """Evaluate a model, with or without an adapter, on a dataset's test prompts."""
    config = resolve(EvalConfig, flags)
    if config.output is None:
        streams.check_stdout()
    checks.check_evaluate(config)
    from abft_fast.commands.evaluate import evaluate

    metrics, attention = evaluate(config, Progress())
    if launch.is_main():
        printing.print_evaluation(config.test_type, metrics, attention)


@command_with(PlanConfig)
def plan(flags: dict[str, Any]) -> None:
    """Tell how much memory `train` takes with these options, without loading weights."""
    config = resolve(PlanConfig, flags)
    streams.check_stdout()
    checks.check_plan(config)
    if config.stream:
        from abft_fast.commands.streamed.plan import plan_stream

        printing.print_streamed_plan(config.model, *plan_stream(config, Progress()))
        return
    from abft_fast.commands.plan import plan

    printing.print_plan(config.model, *plan(config, Progress()))


@command_with(PredictConfig)
def predict(flags: dict[str, Any]) -> None:
    """Label the texts of a file, with demonstrations from another file."""
    config = resolve(PredictConfig, flags)
    dataset = checks.check_predict(config)
    with open_output(config, dataset.label_words) as writer:
        from abft_fast.commands.predict import predict

        predict(config, dataset, writer, Progress())


@command_with(MergeConfig)
def merge(flags: dict[str, Any]) -> None:
    """Merge adapters into their model's weights, each with a coefficient."""
    config = resolve(MergeConfig, flags)
    checks.check_merge(config)
    from abft_fast.commands.merge import merge

    merge(config, Progress())
    print(f"merged model: {config.output_dir}")


@command_with(SweepConfig)
def sweep(flags: dict[str, Any]) -> None:
    """Run a grid of models, datasets, methods, seeds and settings, or continue it."""
    config = resolve(SweepConfig, flags)
    from abft_fast.experiments.sweep import plan_sweep, run_sweep

    cells = plan_sweep(config)
    if config.dry_run:
        streams.check_stdout()
        for cell in cells:
            print(f"{cell.title}  {cell.name}")
        return
    folder = run_sweep(config, cells, Progress())
    table_of_them = shell_command("table", folder)
    print(f"results: {folder / 'results.csv'}; `{table_of_them}` makes a table of them")


@command_with(TableConfig)
def table(flags: dict[str, Any]) -> None:
    """Make a table of the paper from the runs below a folder."""
    config = resolve(TableConfig, flags)
    if config.output is None:
        streams.check_stdout()
    else:
        check_output(config.output)
    from abft_fast.experiments.records import read_records
    from abft_fast.experiments.tables.format import FORMATS
    from abft_fast.experiments.tables.layouts import make_table

    text = FORMATS[config.format](make_table(config, read_records(config.folder)))
    if config.output is None:
        print(text, end="")
    else:
        write_text(config.output, text)


@command_with(ReportConfig)
def report(flags: dict[str, Any]) -> None:
    """Write one HTML page about runs: accuracy, attention, ten prompts, cost and options."""
    config = resolve(ReportConfig, flags)
    check_output(config.output)
    from abft_fast.commands.report import report

    report(config.runs, config.output)
    print(f"report: {config.output}")


@command_with(FigureConfig)
def figure(flags: dict[str, Any]) -> None:
    """Draw a figure of the paper from the folders that runs left."""
    config = resolve(FigureConfig, flags)
    streams.check_stdout()
    from abft_fast.experiments.figures.make import make_figure

    for path in make_figure(config):
        print(f"written: {path}")


@command_with(DoctorConfig)
def doctor(flags: dict[str, Any]) -> None:
    """Check versions, device, data and disk, and list what a run would use."""
    config = resolve(DoctorConfig, flags)
    streams.check_stdout()
    from abft_fast.commands.doctor import diagnose

    findings, problems = diagnose()
    speeds = ""
    if config.measure is not None:
        from abft_fast.commands.streamed.speeds import measure

        measured, speeds = measure(config.measure)
        findings += measured
    printing.print_findings(findings)
    if speeds:
        print(f"plan --stream with these speeds: {speeds}")
    if problems:
        raise RunError("; ".join(problems))


def main() -> None:
    """Run the command line; exit 2 for a user's mistake, 1 for a failure, 130 if interrupted."""
    streams.prepare()
    debug = "--debug" in sys.argv
    if not debug:
        _quiet()
    try:
        launch.check_environment()
        with launch.signals_as_interrupt(), streams.stdout_complete():
            code = app(translate(sys.argv[1:]), standalone_mode=False)
        if code == errors.INTERRUPTED:  # typer returns the code in place of the exception
            raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        code = errors.report(error, traceback=debug)
    sys.exit(code)


def _quiet() -> None:
    """Silence the notices of other libraries."""
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    main()
