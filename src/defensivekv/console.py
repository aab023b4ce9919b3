"""Text and tables on a terminal, or in a pipe, as they are."""

from rich.console import Console
from rich.table import Table

_WIDEST = 400


def make_console(*, stderr: bool = False) -> Console:
    """A console that makes no pictures of `:words:`, and breaks no lines where nobody looks."""
    console = Console(stderr=stderr, emoji=False, highlight=False)
    console.soft_wrap = not console.is_terminal
    return console


def print_whole(table: Table, console: Console) -> None:
    """Prints each row on one line even where the terminal is narrower: it wraps them, and a pipe should get them whole.

    For columns with `no_wrap`.
    """
    width = Console(width=_WIDEST).measure(table).maximum
    Console(file=console.file, emoji=False, width=max(console.width, width)).print(table)
