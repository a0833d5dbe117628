"""Stdout and stderr as the command line uses them, whatever they are connected to.

A stdout that fails stops the command: nobody reads what it prints. A stderr that fails does not,
because there is nowhere left to say so. A character that the terminal's encoding lacks is written
as a backslash and its number.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from moec.spec.errors import refuse


class Unwritable(BaseException):
    """Stdout cannot be written. No Exception, so that no code takes it for an error of a file."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.closed = error.errno == errno.EPIPE  # the reader has gone, as `head` does
        self.why = error.strerror or str(error)


class _Stream:
    """The process's stdout or stderr; `stops` says whether a failure stops the command."""

    def __init__(self, stream: Any, stops: bool) -> None:
        self._stream, self._stops = stream, stops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._failures():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._failures():
            self._stream.flush()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._drop()
            if self._stops:
                raise Unwritable(error) from None

    def _drop(self) -> None:
        """Send the rest to /dev/null, or Python complains when it flushes at the end."""
        with suppress(OSError, ValueError):  # a stream of tests has no number
            number = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


@contextmanager
def standard_streams(quiet: bool) -> Iterator[None]:
    """Replace `sys.stdout` and `sys.stderr` while the block runs; `quiet` drops stdout.

    Raises:
        MoecError: stdout was closed before the command started.
        Unwritable: stdout cannot be written.
    """
    before = sys.stdout, sys.stderr
    for number in (0, 1, 2):
        # A file that the command opens would get the number of a closed stream, and what C++
        # libraries log would go into that file.
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in filter(None, before):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    needed = quiet or not all(before)
    nowhere = open(os.devnull, "w", encoding="utf-8") if needed else None  # noqa: SIM115
    try:
        sys.stdout = _Stream(nowhere if quiet else before[0] or nowhere, stops=True)
        sys.stderr = _Stream(before[1] or nowhere, stops=False)
        yield
    finally:
        sys.stdout, sys.stderr = before
        if nowhere:
            nowhere.close()


def is_quiet_rank() -> bool:
    """Whether torchrun started this process as a rank other than 0.

    Such a process prints no results of a command that ranks run together.
    """
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def check_stdout() -> None:
    """Refuse a stdout that was closed before the command started, before any work is done."""
    if sys.__stdout__ is None:
        refuse("stdout", "closed", "an open stdout", "add >/dev/null to drop what is printed")
