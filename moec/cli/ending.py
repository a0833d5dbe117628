"""How a command ends: whatever happens in it, one message on stderr and one exit code."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer

from moec.cli.output import error_line, logs_as_notes, show_error
from moec.cli.stopping import EXIT_CODE, Stopped, stoppable
from moec.cli.streams import Unwritable, check_stdout, is_quiet_rank, standard_streams
from moec.spec.errors import MoecError, understood, visible

#: seconds that a command which writes files may take to clean up after Ctrl-C, and the others
_PATIENT, _BRISK = 10.0, 0.7
_KEPT = (
    ": no unfinished {} is left behind; weights that were packed are kept for the next {} with the "
    "same --out"
)
#: the commands that write files, and what a message says of the files when they are stopped
_WRITERS = {
    "build": _KEPT.format("artefact", "build"),
    "bind": _KEPT.format("artefact", "bind"),
    "quantize": _KEPT.format("checkpoint", "quantize"),
    "engine": "",
    "calibrate": "",
    "library": "",
}
#: commands that ranks run together; only rank 0 prints
_SHARED = ("generate", "validate")

#: the base of Typer's errors about a command line; typed so because its module depends on versions
_UsageError: Any = typer.BadParameter.__mro__[1]


def run(command: Callable[[], int | None], arguments: Sequence[str], notes: Sequence[str]) -> int:
    """Run `command`, which `arguments` stand for; return its exit code.

    `notes` are printed to stderr after everything else, where people see them.
    """
    name = arguments[0] if arguments else ""
    patience = _PATIENT if name in _WRITERS else _BRISK
    message = f"stopped{_WRITERS.get(name, '')}"
    where = " ".join(("moec", *arguments[:1]))
    with standard_streams(quiet=is_quiet_rank() and name in _SHARED):
        try:
            with stoppable(patience, message), logs_as_notes():
                check_stdout()
                os.getcwd()  # torch's libraries abort where it was deleted
                code = command() or 0
                sys.stdout.flush()
        except Stopped:
            error_line(message, "yellow")
            code = EXIT_CODE
        except Unwritable as failure:
            code = 1 if failure.closed else 2
            if not failure.closed:
                show_error(
                    MoecError("stdout", failure.why, "room for the output", "write elsewhere")
                )
        except _UsageError as error:
            code = _show_usage(error)
        except SystemExit as end:  # Rich ends so where the reader of its output has gone
            code = end.code if isinstance(end.code, int) else 1
        except BaseException as error:  # the exit code tells what it was
            clear = understood(error, where) or _bug(error)
            show_error(clear)
            code = clear.exit_code
        for note in notes:
            error_line(f"note: {note}")
        sys.stderr.flush()
    return code


def _show_usage(error: Any) -> int:
    """Show what is wrong with a command line as Typer does, without what would steer a terminal."""
    from typer.rich_utils import rich_format_error

    error.message = visible(error.message, keep="\n")
    rich_format_error(error)
    return int(error.exit_code)


def _bug(error: BaseException) -> MoecError:
    """The message for an exception that nobody foresaw; MOEC_DEBUG shows its traceback too."""
    if os.environ.get("MOEC_DEBUG"):
        for line in traceback.format_exception(error):
            error_line(line.rstrip("\n"))
    at = traceback.extract_tb(error.__traceback__)[-1]
    return MoecError(
        "a bug of moec",
        f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})",
        "a result, or a message that says what to change",
        "report it with the traceback, which the same command prints after MOEC_DEBUG=1",
        1,
    )
