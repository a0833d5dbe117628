"""How commands write to the terminal: lines, JSON, and a progress bar.

Paths, names and notes come from files that a stranger may have written, so the consoles print
square brackets and colons as they are: they take nothing for markup or emoji.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

console = Console(markup=False, emoji=False, highlight=False)
errors = Console(stderr=True, markup=False, emoji=False, highlight=False)


def say(text: str, style: str | None = None) -> None:
    """Print a line to stdout; only the terminal wraps it."""
    console.print(text, style=style, soft_wrap=True)


def error_line(text: str, style: str | None = None) -> None:
    """Print a line to stderr; only the terminal wraps it."""
    errors.print(text, style=style, soft_wrap=True)


def print_json(value: object) -> None:
    """Print plain data as JSON."""
    typer.echo(json.dumps(value, indent=1))


@contextmanager
def bar(quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show one progress bar, and yield the callback that moves it: (stage, done, total).

    Nothing is shown with `quiet`, or where stdout is no terminal.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("start", total=1)
        yield lambda stage, done, total: progress.update(
            task, description=stage, completed=done, total=total
        )
