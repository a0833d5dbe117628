"""ONNX external data: let the weights of a model point to bytes of other files, and write the file.

A model may have 90,000 weights. onnx_ir writes each dimension of each anew, which takes most of a
build; here weights of one type and shape are written as copies of the first one.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import cast

import onnx
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
    # A model has many more weights than files and shapes.
    places = lru_cache(lambda file: file.relative_to(root).as_posix())
    shapes = lru_cache(ir.Shape)
    bound: dict[ir.Value, None] = {}
    for weight in (*graph.inputs, *graph.initializers.values()):
        entry = entry_of(weight.name or "", entries)
        if entry is None:
            continue
        dtype, shape = kinds_of(entry)[weight.dtype == ir.DataType.UINT4]
        weight.const_value = ir.ExternalTensor(
            places(entry.file),
            entry.offset,
            entry.nbytes,
            dtype,
            shape=shapes(shape),
            name=str(weight.name),
            base_dir=root,
        )
        bound[weight] = None
    others = [each for each in graph.inputs if each not in bound]
    graph.inputs.clear()  # to remove one by one would take quadratic time
    graph.inputs.extend(others)
    for weight in bound:
        graph.register_initializer(weight)


def write_model(model: ir.Model, path: Path) -> None:
    """Write `model` to `path`: the same bytes as `ir.save` writes.

    Remarks in a file that somebody else wrote, such as documentation of a weight, are left out.
    """
    graph = model.graph
    known = list(graph.initializers.values())
    inputs, weights = _split(graph.inputs, lambda each: each.const_value is None)
    others, bound = _split(known, _is_outside)
    rest = copy.copy(model)
    rest.graph = ir.GraphView(  # type: ignore[assignment]  # which serialize_model takes too
        inputs,
        graph.outputs,
        nodes=graph,
        initializers=others,
        doc_string=graph.doc_string,
        opset_imports=graph.opset_imports,
        name=graph.name,
        metadata_props=graph.metadata_props,
    )
    proto = ir.serde.serialize_model(rest)
    infos = _infos(weights)
    proto.graph.input.extend(infos)
    after = [*proto.graph.value_info]
    first = sum(not each.is_graph_input() for each in others)
    del proto.graph.value_info[first:]
    proto.graph.value_info.extend(_infos(bound))
    proto.graph.value_info.extend(after[first:])
    proto.graph.initializer.extend(_tensors(bound))
    path.write_bytes(proto.SerializeToString())


def _split(
    values: Sequence[ir.Value], wanted: Callable[[ir.Value], bool]
) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
    """`values` before the last ones that are all `wanted`, and these."""
    at = len(values)
    while at and wanted(values[at - 1]):
        at -= 1
    return values[:at], values[at:]


def _is_outside(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.ExternalTensor) and not value.is_graph_input()


def _infos(values: Iterable[ir.Value]) -> Iterator[onnx.ValueInfoProto]:
    """What a file says of the names, types and shapes of `values`."""
    alike: dict[object, onnx.ValueInfoProto] = {}
    for value in values:
        key = value.dtype, value.shape is None, *(value.shape or ())
        if key not in alike:
            alike[key] = ir.serde.serialize_value(value)
        alike[key].name = value.name or ""
        yield alike[key]  # `extend` makes a copy


def _tensors(values: Iterable[ir.Value]) -> Iterator[onnx.TensorProto]:
    """Where a file says that the bytes of `values` are."""
    alike: dict[object, onnx.TensorProto] = {}
    for value in values:
        tensor = cast(ir.ExternalTensor, value.const_value)
        key = tensor.dtype, *tensor.shape
        if key not in alike:
            alike[key] = ir.serde.serialize_tensor(tensor)
        alike[key].name = value.name or ""
        for entry, each in zip(
            alike[key].external_data, (tensor.location, tensor.offset, tensor.length), strict=True
        ):
            entry.value = str(each)
        yield alike[key]  # `extend` makes a copy


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
