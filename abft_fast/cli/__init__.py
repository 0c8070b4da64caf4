"""The command line: options are parsed, a command is called, its result is printed."""

from abft_fast.cli import analyze as analyze
from abft_fast.cli.app import main

__all__ = ["main"]
