"""The objects that TensorRT calls: a logger, a writer of engines, a progress monitor.

Each class needs a base class of the loaded package, so that a function makes it. No exception may
leave a callback, because TensorRT only prints it and goes on.
"""

import re
from collections.abc import Callable
from typing import Any, BinaryIO

#: messages without information, or with information that moec has from elsewhere
_NOISE = re.compile(
    r"^\[checkMacros\.cpp::catchCudaError"  # follows every error where there is no GPU
    r"|Make sure (in|out)put .* has Int64 binding"
    r"|\[RemoveDeadLayers\]"
    r"|A node named .* already exists"
    r"|ModelImporter\.cpp:1\d\d: (While parsing|---|Node name)"
)
_LENGTH = 1000  # characters of a message


def new_log(trt: Any, tell: Callable[[str], None]) -> Any:
    """Make a logger that keeps `errors` and `warnings`, and calls `tell` with each new error.

    A process can have only one: TensorRT keeps the first logger and ignores all others.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity > trt.ILogger.WARNING or _NOISE.search(msg):
                return
            text = " ".join(msg.split())[:_LENGTH]
            kept = self.warnings if severity == trt.ILogger.WARNING else self.errors
            if text not in kept:
                kept.append(text)
                if kept is self.errors:
                    tell(text)

    return Log()


def new_writer(trt: Any, file: BinaryIO) -> Any:
    """Make a writer that writes a TensorRT engine to `file`.

    `size` counts the bytes written; `error` holds the error of a write that failed. Ask for `error`
    after a build, because TensorRT reports success whatever a writer returns or raises.
    """

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.size = 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.error:
                return 0
            try:
                file.write(data)
            except OSError as error:
                self.error = error
                return 0
            self.size += len(data)
            return len(data)

    return Writer()


def new_monitor(trt: Any, report: Callable[[int, int], None]) -> Any:
    """Make a monitor that calls `report` with the progress of a build, in thousandths.

    The progress never decreases. TensorRT's phases are nested: a whole phase counts as one step of
    the phase around it.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[float, float]] = {}  # progress, share of one step
            self.shown = 0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            start, share = self.phases.get(parent_phase or "", (0.0, 1.0))
            self.phases[phase_name] = (start, share / max(num_steps, 1))

        def step_complete(self, phase_name: str, step: int) -> bool:
            at, share = self.phases.get(phase_name, (0.0, 0.0))
            self.phases[phase_name] = (at + share, share)
            done = min(round(1000 * (at + share)), 1000)
            if done > self.shown:
                self.shown = done
                report(done, 1000)
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

    return Monitor()
