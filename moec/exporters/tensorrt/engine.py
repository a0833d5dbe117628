"""Build a TensorRT engine from an ONNX file, in a child process.

TensorRT ends its process on some errors. The child can die without ending this process.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from moec.artefact.engine_job import PARTIAL, Built, Job
from moec.exporters.tensorrt.api import PACKAGES
from moec.exporters.tensorrt.failures import failure, ran_out
from moec.spec.errors import MoecError, refuse

#: (stage, done, total); the stages are "start", "parse", "check" and "build"
Progress = Callable[[str, int, int], None]

_COMMAND = (sys.executable, "-m", "moec.exporters.tensorrt.process.child")
_ROOT = Path(__file__).parents[3]  # the child finds moec here, even if it is not installed
_KEPT_LINES = 40  # of the child's standard error


def build_engine(
    job: Job,
    progress: Progress = lambda stage, done, total: None,
    timeout: float | None = None,
) -> Built:
    """Build the TensorRT engine `job.engine` from `job.onnx`. A failed build leaves no file.

    Args:
        job: what to build.
        progress: called with (stage, done, total), from this thread.
        timeout: seconds after which to stop the build; None for no limit.

    Raises:
        MoecError: exit code 3: the package or a GPU is missing; 2: the job is impossible, or the
            file cannot be written; 1: TensorRT refuses the model, changed it, or died.
    """
    engine = Path(job.engine)
    partial = Path(job.engine + PARTIAL)
    if engine.is_dir():
        refuse(engine, "a folder", "a path for the engine's file", "choose another path")
    try:
        built = _run(job, progress, timeout)
        os.replace(partial, engine)
        return built
    finally:
        with suppress(OSError):  # the folder may not even be there
            partial.unlink(missing_ok=True)


@dataclass(slots=True)
class _Child:
    """What the child reported: its result, TensorRT's errors, and its last lines of stderr."""

    built: Built | None = None
    refused: MoecError | None = None
    errors: list[str] = field(default_factory=list)
    stderr: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))


def _run(job: Job, progress: Progress, timeout: float | None) -> Built:
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    reported, late = _Child(), threading.Event()
    clock = None
    process = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C goes to this process, which ends the child
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    try:
        reader = threading.Thread(target=_collect, args=(process, reported.stderr), daemon=True)
        reader.start()
        if timeout is not None:
            clock = threading.Timer(timeout, _time_out, (process, late))
            clock.start()
        _converse(process, job, reported, progress)
        process.wait()
        reader.join()
    finally:
        if clock:
            clock.cancel()
        _kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                with suppress(BrokenPipeError):
                    pipe.close()
    if reported.built:
        return reported.built
    if reported.refused:
        raise reported.refused
    raise _died(job, reported, process.returncode, timeout if late.is_set() else None)


def _kill(process: "subprocess.Popen[str]") -> None:
    """End the child and the processes that it started, which would keep its pipes open."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _time_out(process: "subprocess.Popen[str]", late: threading.Event) -> None:
    late.set()
    _kill(process)


def _collect(process: "subprocess.Popen[str]", lines: deque[str]) -> None:
    with suppress(ValueError):  # the pipe is closed if the build was interrupted
        for line in process.stderr or ():
            if line.strip():
                lines.append(line.strip())


def _converse(
    process: "subprocess.Popen[str]", job: Job, reported: _Child, progress: Progress
) -> None:
    assert process.stdin and process.stdout
    with suppress(BrokenPipeError):  # the child died at once; its standard error says why
        process.stdin.write(job.model_dump_json())
        process.stdin.close()
    for line in process.stdout:
        if not line.endswith("\n"):  # the child was killed while it wrote
            break
        event = json.loads(line)
        if "progress" in event:
            progress(*event["progress"])
        elif "error" in event:
            reported.errors.append(event["error"])
        elif "built" in event:
            reported.built = Built.model_validate(event["built"])
        elif "refused" in event:
            reported.refused = MoecError(*event["refused"])


def _died(job: Job, reported: _Child, code: int, timeout: float | None) -> MoecError:
    """The error for a child that ended without a result."""
    title = PACKAGES[job.package][0]
    where = f"{title}: {job.onnx}"
    if timeout is not None:
        return MoecError(
            where,
            f"still building after {timeout:g} seconds",
            f"an engine after {timeout:g} seconds at most",
            "allow more time",
            exit_code=1,
        )
    words = [*reported.errors, *reversed(reported.stderr)]
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if -code == signal.SIGKILL or ran_out(words):
        words = [f"killed ({how}), probably because it ran out of memory: out of memory", *words]
        return failure(where, job, words)
    last = words[0] if words else "it wrote no message"
    return MoecError(
        where,
        f"it died ({how}): {last}",
        "a build that runs to its end",
        "build again; if it dies again, build without plugins or with another --precision",
        exit_code=1,
    )
