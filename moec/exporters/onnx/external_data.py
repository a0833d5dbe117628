"""ONNX external data: let the weights of a model point to bytes of other files."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from moec.spec.data import dtypes
from moec.spec.names import split_expert
from moec.weights.shard import TensorEntry

#: types of ONNX by our names
ONNX_TYPES = {name: ir.DataType[theirs] for name, theirs in dtypes("name", "onnx").items()}


def set_external_data(model: ir.Model, entries: Mapping[str, TensorEntry], root: Path) -> None:
    """Let the weights of `model` point to bytes of files below `root`.

    Weights that are graph inputs become initializers. Weights that have external data already get
    the new one. `entries` says where the bytes of every weight are, by name; entries that the model
    does not use are ignored. No bytes of weights are read or copied.
    """
    graph = model.graph
    weights = [*graph.inputs, *graph.initializers.values()]
    for weight in weights:
        entry = entry_of(weight.name or "", entries)
        if entry is None:
            continue
        dtype, shape = kinds_of(entry)[weight.dtype == ir.DataType.UINT4]
        weight.const_value = ir.ExternalTensor(
            entry.file.relative_to(root).as_posix(),
            entry.offset,
            entry.nbytes,
            dtype,
            shape=ir.Shape(shape),
            name=str(weight.name),
            base_dir=root,
        )
    inputs = [each for each in graph.inputs if each.name and entry_of(each.name, entries)]
    for weight in inputs:
        graph.inputs.remove(weight)
        graph.register_initializer(weight)


def kinds_of(entry: TensorEntry) -> list[tuple[ir.DataType, tuple[int, ...]]]:
    """ONNX's type and shape of a weight; bytes of 4-bit integers may also be UINT4, two a byte."""
    found = [(ONNX_TYPES[entry.dtype], entry.shape)]
    if entry.dtype == "uint8":
        found.append((ir.DataType.UINT4, (*entry.shape[:-1], 2 * entry.shape[-1])))
    return found


def entry_of(name: str, entries: Mapping[str, TensorEntry]) -> TensorEntry | None:
    """Where the bytes of a weight are; None if `entries` does not have it.

    `name` is a parameter, or one expert of a stacked parameter: "PARAMETER[INDEX]".
    """
    parameter, index = split_expert(name)
    entry = entries.get(parameter)
    return entry if entry is None or index is None else entry[index]
