"""Ctrl-C, SIGTERM and a terminal that closes end a command soon, wherever it is.

Python runs a signal's handler only between two of its own instructions, but one call of ONNX
Runtime or torch may take minutes. So a thread watches the signals too: it ends the process if the
handler's exception has not ended the command in time. Artefacts are written so that a process may
end at any moment.
"""

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_CODE = 2
#: set once a command has been stopped; whoever owns the process can then leave at once
stopped = Event()
#: what the watching thread reads when the command has ended; signals have other numbers
_ENDED = b"\0"


class Stopped(BaseException):
    """One of `SIGNALS`; Typer would give a KeyboardInterrupt its own message and exit code."""


@contextmanager
def stoppable(patience: float, message: str) -> Iterator[None]:
    """Raise Stopped in the block at the first signal of `SIGNALS`; end the process at the second.

    The process also ends if the block is still running `patience` seconds after the first. It then
    prints `message`.
    """
    stopped.clear()

    def stop(*_: object) -> None:
        if not stopped.is_set():  # a second exception would interrupt the clean-up after the first
            stopped.set()
            raise Stopped

    def unraisable(report: Any) -> None:
        """Keep quiet of a Stopped that was raised where Python ignores exceptions."""
        if not isinstance(report.exc_value, Stopped):
            ignored(report)

    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    handlers = {
        number: signal.signal(number, stop)
        for number in SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # as by nohup
    }
    woken = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    ignored, sys.unraisablehook = sys.unraisablehook, unraisable
    thread = Thread(target=_watch, args=(reads, patience, message), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = ignored
        os.write(writes, _ENDED)
        thread.join()
        os.close(reads)
        os.close(writes)


def _watch(reads: int, patience: float, message: str) -> None:
    """Wait for a signal, then for the end of the command; end the process if it does not come."""
    if os.read(reads, 1) == _ENDED:
        return
    in_time = bool(select.select([reads], [], [], patience)[0])
    if not in_time or os.read(reads, 1) != _ENDED:
        end_now(message)


def end_now(message: str) -> None:
    """Print `message`, and end the process without waiting for any thread of it."""
    shown = f"{message}\n"
    if os.isatty(2):
        shown = f"\x1b[?25h\n{shown}"  # a progress bar has hidden the cursor
    try:
        os.write(2, shown.encode())
    finally:
        os._exit(EXIT_CODE)
