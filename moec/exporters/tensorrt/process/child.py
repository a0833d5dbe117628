"""The child process that builds one TensorRT engine, because TensorRT may end its process.

It reads a `Job` as JSON from standard input. It writes one line of JSON for each event to standard
output: {"progress": [stage, done, total]}, {"error": a message of TensorRT}, and at the end
{"built": a Built} or {"refused": the arguments of a MoecError}.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from moec.artefact.engine_job import PARTIAL, Built, Job
from moec.artefact.process_memory import memory
from moec.exporters.tensorrt.api import add_plugins, load, new_builder, select_architectures
from moec.exporters.tensorrt.callbacks import new_log, new_monitor, new_writer
from moec.exporters.tensorrt.failures import failure
from moec.exporters.tensorrt.process.checks import (
    check_network,
    check_profiles,
    check_used,
    summary,
    unused_of,
)
from moec.exporters.tensorrt.process.parse import parse
from moec.spec.errors import MoecError

#: called with the kind of an event and its content
Tell = Callable[[str, Any], None]
_PR_SET_PDEATHSIG = 1


def build(job: Job, file: BinaryIO, tell: Tell) -> Built:
    """Build the TensorRT engine of `job` into `file`, and call `tell` with each event.

    Raises:
        MoecError: the package is missing, the model or the job is not supported, or TensorRT fails.
        OSError: the file cannot be written.
    """
    seconds = dict[str, float]()

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        tell("progress", (name, 0, 1))
        yield
        seconds[name] = round(time.perf_counter() - start, 3)
        tell("progress", (name, 1, 1))

    with stage("start"):
        trt = load(job.package)
        log = new_log(trt, lambda text: tell("error", text))
        builder = new_builder(trt, log)
        config = builder.create_builder_config()
        select_architectures(trt, config, job.architectures)
        add_plugins(trt, job.plugins, log)
    with stage("parse"):
        network = builder.create_network()
        parser = trt.OnnxParser(network, log)
        weights = parse(parser, job, log)
    with stage("check"):
        check_network(trt, network, job)
        check_profiles(network, job)
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        layer_types, precisions = summary(layers)
    with stage("build"):
        _add_profiles(builder, config, job)
        if hasattr(config, "progress_monitor"):
            config.progress_monitor = new_monitor(
                trt, lambda done, total: tell("progress", ("build", done, total))
            )
        writer = new_writer(trt, file)
        done = builder.build_serialized_network_to_stream(network, config, writer)
        _flush(file, writer)
    if not done or not writer.size:
        raise failure(job.onnx, job, log.errors)
    check_used(job, unused_of(log.warnings))
    del weights  # TensorRT reads the mapped weights until the engine is built
    return Built(
        package=job.package,
        version=trt.__version__,
        architectures=job.architectures,
        size=writer.size,
        seconds=seconds,
        peak_bytes=memory().peak,
        layers=len(layers),
        layer_types=layer_types,
        precisions=precisions,
        messages=tuple(log.warnings),
    )


def _add_profiles(builder: Any, config: Any, job: Job) -> None:
    for each in job.profiles:
        profile = builder.create_optimization_profile()
        for name, span in each.items():
            profile.set_shape(name, span.min, span.opt, span.max)
        config.add_optimization_profile(profile)


def _flush(file: BinaryIO, writer: Any) -> None:
    """Write out `file`; raise the error of an earlier write that failed."""
    if writer.error:
        raise writer.error
    file.flush()


def _die_with_parent() -> None:
    """Let Linux kill this process with its parent: a build may hold all memory for an hour."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Build the job on standard input."""
    _die_with_parent()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries that print to standard output now print to standard error

    def tell(kind: str, what: Any) -> None:
        out.write(json.dumps({kind: what}) + "\n")
        out.flush()

    job = Job.model_validate_json(sys.stdin.read())
    try:
        with open(job.engine + PARTIAL, "wb") as file:
            built = build(job, file, tell)
        tell("built", built.model_dump())
    except MoecError as error:
        tell("refused", (*error.args, error.exit_code))
    except OSError as error:
        tell(
            "refused",
            (
                job.engine,
                error.strerror or str(error),
                "a file that can be written, with room on the disk",
                "choose another path, or make room on the disk",
                2,
            ),
        )
    os._exit(0)  # the result is out; skip TensorRT's destructors


if __name__ == "__main__":
    main()
