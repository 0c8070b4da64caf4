"""The verbs of `abft-fast analyze`: check the options, call a command, name its files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from abft_fast.cli.app import app, command_with
from abft_fast.commands import checks
from abft_fast.options import (
    AttentionConfig,
    CmapConfig,
    PathConfig,
    PlaneConfig,
    RestrictConfig,
    ShiftConfig,
    ShowConfig,
)
from abft_fast.options.resolve import resolve
from abft_fast.runtime import streams
from abft_fast.runtime.progress import Progress

if TYPE_CHECKING:  # it imports what writes files
    from abft_fast.commands.analyze.results import Results

verbs = typer.Typer(no_args_is_help=True, help="See what training did to a model's attention.")
app.add_typer(verbs, name="analyze")


@command_with(AttentionConfig, verbs)
def attention(flags: dict[str, Any]) -> None:
    """Average what every head attends to, before and after, by layer and head."""
    config = resolve(AttentionConfig, flags)
    streams.check_stdout()
    checks.check_analyze_prompts(config)
    from abft_fast.commands.analyze.attention import attention

    _name_files(attention(config, Progress()))


@command_with(ShowConfig, verbs)
def show(flags: dict[str, Any]) -> None:
    """Show the last token's attention of every head on one prompt, as a page to point at."""
    config = resolve(ShowConfig, flags)
    streams.check_stdout()
    checks.check_analyze_prompts(config)
    from abft_fast.commands.analyze.show import show

    _name_files(show(config, Progress()))


@command_with(ShiftConfig, verbs)
def shift(flags: dict[str, Any]) -> None:
    """Measure how far W_Q and W_K moved, by layer and head."""
    config = resolve(ShiftConfig, flags)
    streams.check_stdout()
    checks.check_analyze(config)
    from abft_fast.commands.analyze.shift import shift

    _name_files(shift(config, Progress()))


@command_with(CmapConfig, verbs)
def cmap(flags: dict[str, Any]) -> None:
    """Put the tuned model's heads into the base, group by group: which carry the gain."""
    config = resolve(CmapConfig, flags)
    streams.check_stdout()
    checks.check_analyze_prompts(config)
    from abft_fast.commands.analyze.cmap import cmap

    _name_files(cmap(config, Progress()))


@command_with(RestrictConfig, verbs)
def restrict(flags: dict[str, Any]) -> None:
    """Keep what training changed in the weights of chosen heads only, and test the rest."""
    config = resolve(RestrictConfig, flags)
    streams.check_stdout()
    checks.check_analyze_prompts(config)
    from abft_fast.commands.analyze.restrict import restrict

    _name_files(restrict(config, Progress()))


@command_with(PathConfig, verbs)
def path(flags: dict[str, Any]) -> None:
    """Measure what each head does to the answer directly, and through induction heads."""
    config = resolve(PathConfig, flags)
    streams.check_stdout()
    checks.check_analyze_prompts(config)
    from abft_fast.commands.analyze.path import path

    _name_files(path(config, Progress()))


@command_with(PlaneConfig, verbs)
def plane(flags: dict[str, Any]) -> None:
    """Test the plane of two solutions and their base, the path between them and beyond them."""
    config = resolve(PlaneConfig, flags)
    streams.check_stdout()
    checks.check_analyze_prompts(config)
    from abft_fast.commands.analyze.plane import plane

    _name_files(plane(config, Progress()))


def _name_files(results: Results) -> None:
    for path in results.written:
        print(path)
