"""Parse an ONNX file into a TensorRT network, with external data in any folder.

TensorRT itself reads external data only from below the model's folder. This module maps the files
and gives TensorRT the addresses.
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

    Returns:
        The mapped weights. The caller must keep them until the TensorRT engine is built.

    Raises:
        MoecError: TensorRT does not support the model, or weights are missing.
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
    """Map the bytes of the weight `name`, without reading them."""
    try:
        if path not in files:
            files[path] = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:  # ValueError: an empty file
        expected = "the file that holds the weight"
        refuse(f"{path}: weight {name}", error, expected, "bind the weights again")
    whole = files[path]
    start = int(entry.get("offset", 0))
    end = start + int(entry.get("length", whole.size - start))
    if end > whole.size:
        refuse(
            f"{path}: weight {name}",
            f"{whole.size} bytes",
            f"at least {end} bytes",
            "bind the weights again",
        )
    return whole[start:end]


def _refused(parser: Any, job: Job, log: Any) -> MoecError:
    """The error that the parser reported first; the later ones follow from it."""
    where, found = job.onnx, list(log.errors)
    if parser.num_errors:
        error = parser.get_error(0)
        operator = error.node_operator()
        if operator:
            where = f"{job.onnx}: node {error.node_name() or error.node()} ({operator})"
        found = [error.desc(), *found]
    return failure(where, job, found)
