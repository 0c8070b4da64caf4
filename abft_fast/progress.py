"""What a run says while it works: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_PLAIN_LINES = 4  # a task reports this often where there is no terminal


class Progress:
    """Messages and bars on stderr, so that stdout holds results only."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def say(self, line: str) -> None:
        """One line, unwrapped."""
        self.console.print(line, soft_wrap=True, markup=False)

    @contextmanager
    def bar(self, what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        """Yields `advance(count, note="")`."""
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with RichProgress(*columns, console=self.console) as rich:
                task = rich.add_task(what, total=total, completed=done, note="")
                yield lambda count, note="": rich.update(task, advance=count, note=note)
            return
        finished = done

        def advance(count: int, note: str = "") -> None:
            nonlocal finished
            quarter = finished * _PLAIN_LINES // total
            finished += count
            if finished * _PLAIN_LINES // total > quarter:
                self.say(f"{what}: {finished}/{total}" + (f", {note}" if note else ""))

        yield advance
