"""The child process of `moec.spec.bounded.worker`: answer calls until the input ends."""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from moec.spec.bounded.limits import MEMORY
from moec.spec.errors import MoecError

#: what a function returns: data that JSON has, and bytes
Result = tuple[Any, bytes | bytearray | memoryview]


def main() -> None:
    """Read requests from stdin, and write replies to stdout.

    The memory is limited once, the processor time for each call. The process writes no files.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no reply
    while line := sys.stdin.buffer.readline():
        head = json.loads(line)
        data = sys.stdin.buffer.read(head["bytes"])
        reply, blob = _answer(head, data)
        output.write(json.dumps(reply | {"bytes": len(blob)}).encode() + b"\n")
        output.write(blob)
        output.flush()


def _answer(head: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + head["seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))
    module, _, name = head["call"].partition(":")
    try:
        function: Callable[..., Result] = getattr(import_module(module), name)
        value, blob = function(data, **head["arguments"])
    except MoecError as error:
        parts = error.where, error.found, error.expected, error.next_step
        return {"refused": [*parts, error.exit_code]}, b""
    except MemoryError:
        return {"out_of_memory": True}, b""
    return {"value": value}, blob  # type: ignore[return-value]


if __name__ == "__main__":
    main()
