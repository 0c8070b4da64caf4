"""Report the progress of a run: bars on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from abft_fast.runtime.launch import is_main

_PLAIN_LINES = 4  # a task reports this often where there is no terminal


def plain_console(**options: Any) -> Console:
    """Return a console that prints every text as it is, also `[red]` and `:cat:`.

    Args:
        options: what else rich's `Console` takes.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)


class Progress:
    """Print messages and bars to stderr, so that stdout holds results only.

    Of several processes, only the main one prints.
    """

    def __init__(self) -> None:
        self._silent = not is_main()
        self.console = plain_console(stderr=True, quiet=self._silent)
        self._said: list[str] = []
        self._log: Path | None = None

    def say(self, line: str) -> None:
        """Print one line without wrapping it; write it to the run's log as well."""
        self.console.print(line, soft_wrap=True)
        self._log_or_keep([line])

    def show(self, table: Table) -> None:
        """Print a table; write it to the run's log as well."""
        self.console.print(table)
        text = io.StringIO()
        plain_console(file=text, width=100).print(table)
        self._log_or_keep(text.getvalue().splitlines())

    def keep(self, log: Path) -> None:
        """Write all lines, those so far and those to come, to a file as well."""
        if self._silent:
            return
        self._log = log
        _append(log, self._said)

    def _log_or_keep(self, lines: list[str]) -> None:
        if self._log is None:
            self._said += lines
        else:
            _append(self._log, lines)

    @contextmanager
    def bar(
        self, what: str, total: int, tokens: int, done: int = 0
    ) -> Iterator[Callable[..., None]]:
        """Show a bar for the block.

        Args:
            what: the bar's title.
            total: how many items there are.
            tokens: tokens that the block computes; the time left is estimated from them.
            done: how many items are done before the block starts.

        Yields:
            `advance(count, tokens, note="")`, which the block calls after each part of the work.
        """
        started, computed = time.perf_counter(), 0

        def pace(new_tokens: int) -> tuple[str, str]:
            """Return the tokens a second so far, and the time left at this pace."""
            nonlocal computed
            computed += new_tokens
            seconds = time.perf_counter() - started
            left = timedelta(seconds=round(seconds * (tokens - computed) / max(computed, 1)))
            return f"{computed / max(seconds, 1e-9):,.0f} tokens/s", f"{left} left"

        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            with RichProgress(*columns, console=self.console) as rich:
                task = rich.add_task(what, total=total, completed=done, note="")

                def advance_bar(count: int, new_tokens: int, note: str = "") -> None:
                    rate, _ = pace(new_tokens)
                    rich.update(task, advance=count, note=_joined(rate, note))

                yield advance_bar
            return
        finished = done

        def advance(count: int, new_tokens: int, note: str = "") -> None:
            nonlocal finished
            quarter = finished * _PLAIN_LINES // total
            finished += count
            rate, left = pace(new_tokens)
            if finished * _PLAIN_LINES // total > quarter:
                self.say(f"{what}: {_joined(f'{finished}/{total}', note, rate, left)}")

        yield advance


def _append(log: Path, lines: list[str]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def _joined(*parts: str) -> str:
    """Join the parts that are not empty."""
    return ", ".join(filter(None, parts))
