"""The objects that TensorRT calls back: a logger, a writer of engines, a progress monitor.

Each is made for a package, whose base class it needs. An exception that leaves one of them is
printed by TensorRT and then forgotten, so none may.
"""

import re
from collections.abc import Callable
from typing import Any, BinaryIO

#: what says nothing, or what this package knows by other means
_NOISE = re.compile(
    r"^\[checkMacros\.cpp::catchCudaError"  # follows every error where there is no GPU
    r"|Make sure (in|out)put .* has Int64 binding"
    r"|\[RemoveDeadLayers\]"
    r"|A node named .* already exists"
    r"|ModelImporter\.cpp:1\d\d: (While parsing|---|Node name)"
)
_LENGTH = 1000  # characters of a message


def new_log(trt: Any, tell: Callable[[str], None]) -> Any:
    """A logger that keeps `errors` and `warnings`, and tells each error as it comes.

    A process may have one: TensorRT keeps the first, and ignores all others.
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
    """A writer of an engine into `file`: `size` bytes so far, `error` where one did not go.

    TensorRT calls a build good whatever a writer returns or raises: ask for `error` afterwards.
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
    """A monitor that reports how far a build is, in thousandths; it never goes back.

    TensorRT's phases nest: a phase has the share of one step of the phase that it is part of.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[float, float]] = {}  # where it is, what a step is worth
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
