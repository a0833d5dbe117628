"""Attach a checkpoint's bytes to a model's unbound weights. No byte is read or copied."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from moec.spec.errors import refuse
from moec.weights.shard import TensorEntry

_DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "uint8": ir.DataType.UINT8,
}


def load_onnx(path: Path) -> ir.Model:
    """The model at `path`; its weights stay where they are.

    Raises:
        MoecError: it is gone, or damaged (exit code 1).
    """
    try:
        return ir.load(path)
    except (OSError, DecodeError, ir.serde.SerdeError, ValueError) as error:
        refuse(path, error, "the ONNX of an artefact", "build the artefact again", exit_code=1)


def bind(model: ir.Model, entries: Mapping[str, TensorEntry], root: Path) -> None:
    """Point the weights of `model` into files below `root`.

    Weight inputs become initializers; weights that were bound before are bound anew. `entries`
    holds the bytes of every weight by name; entries that the model does not use do no harm.
    """
    graph = model.graph
    weights = [*graph.inputs, *graph.initializers.values()]
    for weight in weights:
        entry = entry_of(weight.name or "", entries)
        if entry is None:
            continue
        weight.const_value = ir.ExternalTensor(
            entry.file.relative_to(root).as_posix(),
            entry.offset,
            entry.nbytes,
            _DTYPES[entry.dtype],
            shape=ir.Shape(entry.shape),
            name=str(weight.name),
            base_dir=root,
        )
    bound = [each for each in graph.inputs if each.name and entry_of(each.name, entries)]
    for weight in bound:
        graph.inputs.remove(weight)
        graph.register_initializer(weight)


def entry_of(name: str, entries: Mapping[str, TensorEntry]) -> TensorEntry | None:
    """The bytes of a weight: a parameter, or one expert of it, "PARAMETER[INDEX]"."""
    parameter, _, index = name.partition("[")
    entry = entries.get(parameter)
    return entry[int(index.rstrip("]"))] if entry and index else entry
