"""How commands write to the terminal: lines, tables, data, JSON, and a progress bar.

Paths, names and notes come from files that a stranger may have written. The consoles take nothing
in them for markup or emoji, and characters that would steer the terminal are made visible.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from moec.spec.errors import MoecError, visible


class _Console(Console):
    """Every text in a line or a table becomes a `Text` here."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


console = _Console(markup=False, emoji=False, highlight=False)
errors = _Console(stderr=True, markup=False, emoji=False, highlight=False)


def say(text: str, style: str | None = None) -> None:
    """Print a line to stdout; only the terminal wraps it."""
    console.print(text, style=style, soft_wrap=True)


def error_line(text: str, style: str | None = None) -> None:
    """Print a line to stderr; only the terminal wraps it."""
    errors.print(text, style=style, soft_wrap=True)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        error_line(f"note: {record.getMessage()}")


@contextmanager
def logs_as_notes() -> Iterator[None]:
    """Print what moec logs in a block as notes on stderr: why something takes long."""
    log, notes = logging.getLogger("moec"), _Notes()
    log.addHandler(notes)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(notes)


def note_cpu(device: str, gpus: int | None) -> None:
    """Say that `gpus` processes share the processor, for a user who forgot the device."""
    if gpus is not None and gpus > 1 and device == "cpu":
        error_line(f"note: {gpus} processes share the cores of this machine; GPUs: --device cuda")


def show_error(error: MoecError) -> None:
    """Print a refusal to stderr, a line for each of its parts."""
    for line in f"error: {error}".split("\n"):
        error_line(line, "red")


def write(text: str) -> None:
    """Write data, such as the text of a model or a file, to stdout, at once and without a newline.

    A terminal gets it with visible control characters; a file or a pipe gets it as it is.
    """
    sys.stdout.write(visible(text, keep="\n\t") if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_json(value: object) -> None:
    """Print plain data as JSON, in printable ASCII."""
    write(json.dumps(value, indent=1).replace("\x7f", "\\u007f") + "\n")


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
            task, description=visible(stage), completed=done, total=total
        )
