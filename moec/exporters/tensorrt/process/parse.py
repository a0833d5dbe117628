"""An ONNX file into a TensorRT network; external data goes in by address, from wherever it lies.

TensorRT by itself takes external data only from below the model's own folder.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from moec.artefact.engine_job import Job
from moec.exporters.tensorrt.failures import failure
from moec.exporters.tensorrt.process.source import check_source, graphs
from moec.spec.errors import MoecError, refuse

#: a file of weights, mapped
_Bytes = np.ndarray[Any, Any]


def parse(parser: Any, job: Job, log: Any) -> list[_Bytes]:
    """Parse `job.onnx` into the parser's network.

    Returns the mapped weights, which must be held until the engine is built.

    Raises:
        MoecError: the model is not one for TensorRT, or its weights are not all there.
    """
    model = check_source(job.onnx)
    root = Path(job.weights or os.path.dirname(os.path.abspath(job.onnx)))
    files: dict[Path, _Bytes] = {}
    if not parser.load_model_proto(model.SerializeToString(), job.onnx):
        raise _refused(parser, job, log)
    for graph in graphs(model.graph):
        for held in graph.initializer:
            if held.data_location == onnx.TensorProto.EXTERNAL:
                entry = {each.key: each.value for each in held.external_data}
                data = _mapped(files, root / entry["location"], held.name, entry)
                if not parser.load_initializer(held.name, data.ctypes.data, data.nbytes):
                    raise _refused(parser, job, log)
    if not parser.parse_model_proto():
        raise _refused(parser, job, log)
    return list(files.values())


def _mapped(files: dict[Path, _Bytes], path: Path, name: str, entry: dict[str, str]) -> _Bytes:
    """The bytes of weight `name`, mapped, not read."""
    try:
        if path not in files:
            files[path] = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:  # ValueError: an empty file
        refuse(f"{path}: weight {name}", error, "the file of weights", "bind the weights again")
    whole = files[path]
    start = int(entry.get("offset", 0))
    end = start + int(entry.get("length", whole.size - start))
    if end > whole.size:
        refuse(
            f"{path}: weight {name}",
            f"{whole.size} bytes",
            f"at least {end}",
            "bind the weights again",
        )
    return whole[start:end]


def _refused(parser: Any, job: Job, log: Any) -> MoecError:
    """The parser's first error, which alone says what is wrong."""
    where, found = job.onnx, list(log.errors)
    if parser.num_errors:
        error = parser.get_error(0)
        operator = error.node_operator()
        if operator:
            where = f"{job.onnx}: node {error.node_name() or error.node()} ({operator})"
        found = [error.desc(), *found]
    return failure(where, job, found)
