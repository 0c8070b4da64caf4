"""The verbs of `abft-fast analyze`: check the options, call a command, name its files."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from abft_fast.cli.app import app, command_with
from abft_fast.commands import checks
from abft_fast.options import (
    AttentionConfig,
    CmapConfig,
    DcmConfig,
    PathConfig,
    PlaneConfig,
    RestrictConfig,
    ShiftConfig,
    ShowConfig,
)
from abft_fast.options.resolve import resolve
from abft_fast.runtime import streams
from abft_fast.runtime.progress import Progress

Options = TypeVar("Options")

verbs = typer.Typer(no_args_is_help=True, help="See what training did to a model's attention.")
app.add_typer(verbs, name="analyze")


@command_with(AttentionConfig, verbs)
def attention(flags: dict[str, Any]) -> None:
    """Average what every head attends to, before and after, by layer and head."""
    _run("attention", resolve(AttentionConfig, flags), checks.check_analyze_prompts)


@command_with(ShowConfig, verbs)
def show(flags: dict[str, Any]) -> None:
    """Show the last token's attention of every head on one prompt, also as an HTML page."""
    _run("show", resolve(ShowConfig, flags), checks.check_analyze_prompts)


@command_with(ShiftConfig, verbs)
def shift(flags: dict[str, Any]) -> None:
    """Measure how far W_Q and W_K moved, by layer and head."""
    _run("shift", resolve(ShiftConfig, flags), checks.check_analyze)


@command_with(CmapConfig, verbs)
def cmap(flags: dict[str, Any]) -> None:
    """Put the tuned model's heads into the base, group by group: which carry the gain."""
    _run("cmap", resolve(CmapConfig, flags), checks.check_analyze_prompts)


@command_with(RestrictConfig, verbs)
def restrict(flags: dict[str, Any]) -> None:
    """Keep what training changed in the weights of chosen heads only, and test the rest."""
    _run("restrict", resolve(RestrictConfig, flags), checks.check_analyze_prompts)


@command_with(PathConfig, verbs)
def path(flags: dict[str, Any]) -> None:
    """Measure what each head does to the answer directly, and through induction heads."""
    _run("path", resolve(PathConfig, flags), checks.check_analyze_prompts)


@command_with(DcmConfig, verbs)
def dcm(flags: dict[str, Any]) -> None:
    """Learn which heads carry the label word, the position, and the query's text."""
    _run("dcm", resolve(DcmConfig, flags), checks.check_analyze_prompts)


@command_with(PlaneConfig, verbs)
def plane(flags: dict[str, Any]) -> None:
    """Test the plane of two solutions and their base, the path between them and beyond them."""
    _run("plane", resolve(PlaneConfig, flags), checks.check_analyze_prompts)


def _run(name: str, config: Options, check: Callable[[Options], object]) -> None:
    """Run the command of one verb, which needs torch, after its options are checked."""
    streams.check_stdout()
    check(config)
    module = importlib.import_module(f"abft_fast.commands.analyze.{name}")
    for path in getattr(module, name)(config, Progress()).written:
        print(path)
