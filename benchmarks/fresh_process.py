"""Call a function in a new Python process, to measure its memory and to survive its failures."""

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from moec.artefact.process_memory import memory


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a call: its value or an error, and the peak memory of its process."""

    value: Any = None
    error: str = ""
    peak_bytes: int = 0


def call(function: Callable[..., Any], *arguments: Any, limit_s: float = 900) -> Outcome:
    """Run `function` for at most `limit_s` seconds, and return its outcome.

    The output that it prints is dropped. An error of `function` is in the outcome, and not raised.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return Outcome(error=f"> {limit_s:.0f} s: stopped")
        outcome: Outcome = receiver.recv()
        process.join(10)  # give the process time to end by itself
        return outcome
    except EOFError:  # the process was killed, probably because it ran out of memory
        process.join()
        return Outcome(error=f"process died, exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        value, error = function(*arguments), ""
    except Exception as raised:
        value, error = None, _reason(raised)
    sender.send(Outcome(value, error, memory().peak))


def _reason(error: BaseException) -> str:
    """The type of the error, and the first line of its original cause."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    name = type(error).__name__
    if cause is not error:
        name += f" from {type(cause).__name__}"
    return f"{name}: {next(iter(str(cause).splitlines()), '')}"
