"""Run a function in a child process that has little memory and time, and that may die.

Decoders of images, tokenizers, templates and regular expressions come from other libraries. What
they read may loop, allocate without end, or abort the process, and nothing in Python can stop that.
So they run in a child process, which sends plain data back: JSON and bytes, never pickles.

A request and a reply are the same: a line of JSON, which has the number of bytes that follow it.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from moec.spec.bounded import limits
from moec.spec.errors import refuse

_ROOT = Path(__file__).parents[3]
_COMMAND = (sys.executable, "-P", "-B", "-m", "moec.spec.bounded.worker_process")
#: no libraries that start threads, each of which would take address space
_QUIET = {
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
#: a call that waits, and takes no processor time, ends after this many times its seconds
_PATIENCE = 8
#: a child that has sent this much is not used again: its memory may be in pieces
_LARGE = 1 << 26


class Worker:
    """A child process, which starts at the first call. One thread at a time talks to it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        """Whether the child of this process still runs."""
        process = self._process
        return process is not None and self._owner == os.getpid() and process.poll() is None

    def ask(
        self,
        call: str,
        arguments: dict[str, Any],
        data: bytes = b"",
        *,
        where: object,
        what: str,
        next_step: str,
        more_seconds: int = 0,
    ) -> tuple[Any, bytes]:
        """Call a function in the child; return its value and its bytes.

        Args:
            call: the function, such as "package.module:name". It takes `data` and `arguments`.
            arguments: values that JSON has, by name.
            data: bytes for the function.
            where: what the input is, for messages.
            what: what the call does with it, for messages, such as "decode it".
            next_step: what the user can do if the call fails.
            more_seconds: processor time that the call may take beyond `limits.SECONDS`.

        Raises:
            MoecError: the function raised one; or it took too much memory or time, or died.
        """
        seconds = limits.SECONDS + more_seconds
        with self._lock:
            process = self._started()
            clock = threading.Timer(seconds * _PATIENCE, process.kill)
            clock.daemon = True
            clock.start()
            try:
                head = {"call": call, "arguments": arguments, "seconds": seconds}
                reply, blob = _exchange(process, head, data)
                if len(blob) > _LARGE or reply.get("out_of_memory"):
                    self.close()
            except (OSError, EOFError, ValueError):
                reply, blob = {"died": self._end()}, b""
            except BaseException:  # Ctrl-C: the next reply would be of this call
                self._end()
                raise
            finally:
                clock.cancel()
        if "value" in reply:
            return reply["value"], blob
        if "refused" in reply:
            *parts, code = reply["refused"]
            refuse(*parts, exit_code=code)
        found = {
            -signal.SIGXCPU: f"it takes over {seconds} s to {what}",
            -signal.SIGKILL: f"it takes over {seconds} s, or too much memory, to {what}",
        }.get(reply.get("died", 0), f"a process that tried to {what} broke down")
        if reply.get("out_of_memory"):
            found = f"it takes over {limits.MEMORY >> 20} MiB of memory to {what}"
        expected = f"a file that needs at most {seconds} s and {limits.MEMORY >> 20} MiB"
        refuse(where, found, expected, next_step)

    def close(self) -> None:
        """End the child; the next call starts another."""
        self._end()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self.alive:
            assert self._process is not None
            return self._process
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C goes to this process, which ends the child
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | _QUIET,
        )
        return self._process

    def _end(self) -> int:
        """End the child; return what it ended with, which tells why if it has died by itself."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return 0
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()  # a child without input ends
        try:
            return process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return 0


def _exchange(
    process: "subprocess.Popen[bytes]", head: dict[str, Any], data: bytes
) -> tuple[dict[str, Any], bytes]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(head | {"bytes": len(data)}).encode() + b"\n")
    process.stdin.write(data)
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise EOFError
    reply: dict[str, Any] = json.loads(line)
    blob = process.stdout.read(reply["bytes"])
    if len(blob) < reply["bytes"]:
        raise EOFError
    return reply, blob


@cache
def shared() -> Worker:
    """The worker for calls that need no earlier call."""
    worker = Worker()
    atexit.register(worker.close)
    return worker
