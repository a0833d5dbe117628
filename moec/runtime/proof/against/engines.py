"""The engines that a checkpoint can be compared in, and the process in which one of them runs.

Each has a script, which imports no part of moec: the engine may live in another environment.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moec.spec.errors import refuse

#: seconds that an engine may take to load a checkpoint and to run the prompts
PATIENCE = 3600
_ERROR = re.compile(r"\b\w*(Error|Exception): .{1,300}")


@dataclass(frozen=True, slots=True)
class Other:
    """An engine that is not moec's.

    Attributes:
        title: what people call it.
        script: the file beside this one that runs it.
        rounds: whether it rounds the inputs of products as the checkpoint's scheme says.
        computes: the dtype that it computes in.
        install: how to get it.
    """

    title: str
    script: str
    rounds: bool
    computes: str
    install: str


OTHERS = {
    "vllm": Other(
        "vLLM", "run_vllm.py", True, "bf16", "pip install vllm, and a GPU; --python names it"
    ),
    "transformers": Other(
        "transformers",
        "run_transformers.py",
        False,
        "fp32",
        "pip install transformers compressed-tensors accelerate",
    ),
}


class EngineError(Exception):
    """The engine is there, and does not load or run the checkpoint."""


def run_other(name: str, job: dict[str, Any], python: str | Path | None) -> dict[str, Any]:
    """Run the job in engine `name`, in a process of the interpreter `python`; default this one.

    Raises:
        MoecError: there is no such engine or interpreter; or, with exit code 3, the engine or its
            device is missing.
        EngineError: the engine failed; the message has its last words.
    """
    other = find_other(name)
    scripts = (Path(__file__).with_name(each) for each in ("in_process.py", other.script))
    command = [str(python or sys.executable), *map(str, scripts)]
    with tempfile.TemporaryDirectory(prefix="moec-against-") as folder:
        given, taken, log = (Path(folder) / part for part in ("job.json", "found.json", "log"))
        given.write_text(json.dumps(job), encoding="utf-8")
        code = _wait([*command, str(given), str(taken)], log, other)
        if taken.is_file():
            found: dict[str, Any] = json.loads(taken.read_text(encoding="utf-8"))
            words = [each for each in _first_errors(log) if each not in found.get("failed", "")]
        else:
            found = {"failed": f"exit code {code}"}
            words = _first_errors(log) or _lines(log)[-2:]
    if "missing" in found:
        refuse(
            f"--against {name}",
            found["missing"],
            f"{other.title} in {command[0]}",
            other.install,
            exit_code=3,
        )
    if "failed" in found:
        said = "; ".join(filter(None, (found["failed"], " / ".join(words))))
        raise EngineError(f"{other.title}: {said}"[:2000])
    return found


def find_other(name: str) -> Other:
    """The record of engine `name`.

    Raises:
        MoecError: there is no such engine.
    """
    if name not in OTHERS:
        refuse(f"--against {name}", "no such engine", " or ".join(OTHERS), "choose one of them")
    return OTHERS[name]


def _wait(command: list[str], log: Path, other: Other) -> int:
    """Run a command to its end; the process and its own children end with this one."""
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closed by whatever ends this process
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        refuse(f"--python {command[0]}", error.strerror, "a Python interpreter", "correct the path")
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers too
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _first_errors(log: Path) -> list[str]:
    """The first errors in a log, which name the cause; later ones say that something failed."""
    found = [each.group() for line in _lines(log) if (each := _ERROR.search(line))]
    return list(dict.fromkeys(found))[:2]


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()
