"""Check an ONNX file that a stranger may have written, before anything runs or follows it.

External data of an ONNX file may name any file, and operators of further domains may do anything.
moec itself writes little of what ONNX allows: external data only for weights of the decoder or the
tower, operators of a few domains, and functions of these in a domain of their own. All else is
refused.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from moec.artefact.artefact import Artefact
from moec.artefact.stored import stored_kinds
from moec.exporters.onnx.external_data import entry_of, kinds_of
from moec.exporters.onnx.lowering import FUNCTIONS
from moec.exporters.onnx.ort_cuda import FUSED_OPS
from moec.exporters.onnx.weight_inputs import pieces_of
from moec.graph_builder import ops
from moec.spec.bounded.own import check_utf8
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.spec.mtp.layer import stored_layers
from moec.weights.joined import ORT_CUDA
from moec.weights.shard import TensorEntry

_EXTERNAL = onnx.TensorProto.EXTERNAL
_KEYS = {"location", "offset", "length"}
#: domain -> the operators of it that moec writes; of ONNX's own domain moec may write any
_WRITES = {
    "com.microsoft": {
        "GroupQueryAttention",
        "MatMulNBits",
        "MoE",
        "QMoE",
        "SkipSimplifiedLayerNormalization",
    },
    "trt": {"Attention"},
    "moec": {"MoecMoe", *(each.name for each in (*FUSED_OPS, ops.attention_fp8))},
}


#: nodes that a function may have for each expert, and twice that for the layer; moec writes 52
EACH_EXPERT = 80


def read_checked(artefact: Artefact, part: str) -> onnx.ModelProto:
    """Read the ONNX file of a part, and check it; the bytes of its weights stay in their files.

    Raises:
        MoecError: the file cannot be read (exit code 1). Or it has external data that is not the
            place of a weight in the manifest, functions, or operators that moec never writes.
    """
    file = artefact.graph(part)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        expected = "a readable ONNX model of an artefact"
        refuse(file, error, expected, "build the artefact again", exit_code=1)
    check_model(file, model, _places(artefact, part), most_nodes(artefact.manifest.spec))
    return model


def load_checked(artefact: Artefact, part: str) -> ir.Model:
    """Like `read_checked`, as a model to change.

    Raises:
        MoecError: as `read_checked`; or the file is damaged (exit code 1).
    """
    proto = read_checked(artefact, part)
    try:
        return _shared(proto)
    except (ir.serde.SerdeError, ValueError, TypeError) as error:
        expected = "a readable ONNX model of an artefact"
        refuse(artefact.graph(part), error, expected, "build the artefact again", exit_code=1)


def _shared(proto: onnx.ModelProto) -> ir.Model:
    """`proto` as a model whose inputs of one type and shape share these: it has 90,000 weights.

    onnx_ir drops what a file says of the inputs of a function; these get their types back, so that
    the model is written again as it was.
    """
    first: dict[bytes, int] = {}
    like: list[int] = []
    for at, each in enumerate(proto.graph.input):
        like.append(first.setdefault(each.type.SerializeToString(deterministic=True), at))
        if like[at] != at:
            each.ClearField("type")
    model = ir.from_proto(proto)
    inputs = model.graph.inputs
    for each, at in zip(inputs, like, strict=True):
        each.type, each.shape = inputs[at].type, inputs[at].shape
    for function, written in zip(model.functions.values(), proto.functions, strict=True):
        infos = {info.name: info for info in written.value_info}
        for each in function.inputs:
            if each.name in infos:
                ir.serde.deserialize_value_info_proto(infos[each.name], each)
    return model


def _places(artefact: Artefact, part: str) -> dict[str, TensorEntry]:
    """Where the manifest says that each stored tensor is, in a shard as the graph names it."""
    manifest = artefact.manifest
    folder = manifest.weights.data_folder(part)
    kinds = stored_kinds(manifest.spec, manifest.packings)
    found = {
        name: TensorEntry(
            name,
            kinds[name][1],
            kinds[name][0],
            Path(ref.file).relative_to(folder),
            ref.offset,
            ref.length,
        )
        for name, ref in manifest.weights.tensors.items()
        if name in kinds
    }
    if manifest.dialect == ORT_CUDA:
        found |= pieces_of(manifest.spec, manifest.packings.values(), found)
    return found


def most_nodes(spec: ModelSpec) -> int:
    """The most nodes that all calls of functions may make: each layer calls one for its experts.

    A runtime puts the nodes of a function in the place of each call, which takes 0.1 ms a node. A
    file of 200 kB could ask for millions.
    """
    experts = spec.text.experts
    layers = sum(layer.moe for layer in stored_layers(spec.text))
    return layers * EACH_EXPERT * (experts.count + 2) if experts else 0


def check_model(file: Path, model: Any, places: Mapping[str, TensorEntry], calls_make: int) -> None:
    """Refuse what moec never writes into an ONNX file.

    `places` says where each stored tensor is, by name, in a shard as the file must name it.
    `calls_make` is the most nodes that all calls of functions may make.

    Raises:
        MoecError: the message names the first tensor, operator or field.
    """
    if model.training_info:
        _refuse(file, "training_info", "training data of a model", "a plain graph")
    functions = {each.name for each in model.functions}
    for each in (
        *model.opset_import,
        *(each for of in model.functions for each in of.opset_import),
    ):
        if each.domain not in ("", "ai.onnx", FUNCTIONS, *_WRITES):
            _refuse(file, f"domain {each.domain}", "operators that moec does not write", _known())
    for depth, graph in graphs_inside(model.graph):
        if graph.sparse_initializer:
            _refuse(file, graph.name, "sparse initializers", "dense ones")
        for tensor in graph.initializer:
            if tensor.data_location == _EXTERNAL or tensor.external_data:
                entry = entry_of(tensor.name, places) if depth == 0 else None
                _check_place(file, tensor, entry)
        for node in graph.node:
            _check_node(file, node, functions)
    _check_functions(file, model, calls_make)


def _check_functions(file: Path, model: Any, most: int) -> None:
    """Refuse functions that moec never writes, or whose calls make far more nodes than a model."""
    sizes = dict[str, int]()
    for function in model.functions:
        if function.domain != FUNCTIONS or function.name in sizes:
            found = "a function that moec does not write"
            _refuse(file, f"function {function.domain}::{function.name}", found, _known())
        sizes[function.name] = 0
        for depth, graph in graphs_inside(function):
            sizes[function.name] += len(graph.node)
            if depth and (graph.sparse_initializer or graph.initializer):
                _refuse(file, function.name, "initializers in a function", "inputs and constants")
            for node in graph.node:
                _check_node(file, node, set())  # no function calls another, so each ends
    calls = (node for _, graph in graphs_inside(model.graph) for node in graph.node)
    total = sum(sizes.get(node.op_type, 0) for node in calls if node.domain == FUNCTIONS)
    if total > most:
        _refuse(file, "functions", f"calls that make {total:,} nodes", f"at most {most:,}")


def relocate(artefact: Artefact, part: str, model: Any) -> Path:
    """Let external data of `model` name the real files of the shards, below the returned folder.

    `model` is the graph of `part`. ONNX Runtime refuses a location that is a link to a file
    elsewhere, as each file of a download cache is.

    Raises:
        MoecError: the folder's path is not UTF-8, which ONNX Runtime does not take.
    """
    weights = artefact.manifest.weights
    folder = weights.data_folder(part)
    shards = {
        Path(name).relative_to(folder).as_posix(): artefact.shard(name) for name in weights.shards
    }
    root = Path(os.path.commonpath([file.parent for file in shards.values()]))
    check_utf8(root)
    names = {name: file.relative_to(root).as_posix() for name, file in shards.items()}
    if any(name != new for name, new in names.items()):
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = names[entry.value]
    return root


def graphs_inside(graph: Any, depth: int = 0) -> Iterator[tuple[int, Any]]:
    """`graph` and all graphs inside it, each with its depth."""
    yield depth, graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH or attribute.HasField("g"):
                yield from graphs_inside(attribute.g, depth + 1)
            for inner in attribute.graphs:
                yield from graphs_inside(inner, depth + 1)


def _check_node(file: Path, node: Any, functions: set[str]) -> None:
    known = functions if node.domain == FUNCTIONS else _WRITES.get(node.domain)
    if node.domain not in ("", "ai.onnx") and (known is None or node.op_type not in known):
        found = "an operator that moec does not write"
        _refuse(file, f"node {node.name}: {node.domain}::{node.op_type}", found, _known())
    for attribute in node.attribute:
        tensors = [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else ())]
        sparse = attribute.HasField("sparse_tensor") or attribute.sparse_tensors
        if sparse or any(each.data_location == _EXTERNAL or each.external_data for each in tensors):
            where = f"node {node.name}: {attribute.name}"
            _refuse(file, where, "external or sparse data", "data in the attribute itself")


def _check_place(file: Path, tensor: Any, entry: TensorEntry | None) -> None:
    """Refuse external data unless it is the place of the weight of this name."""
    given = {each.key: each.value for each in tensor.external_data}
    where = f"weight {tensor.name}"
    odd = set(given) != _KEYS or len(tensor.external_data) > len(_KEYS)  # a key may be there twice
    if entry is None or tensor.data_location != _EXTERNAL or odd:
        _refuse(
            file,
            where,
            f"external data in {given.get('location')!r}"[:200],
            "external data of weights in the manifest alone",
        )
    place = (entry.file.as_posix(), str(entry.offset), str(entry.nbytes))
    found = (given["location"], given["offset"], given["length"])
    kinds = [(dtype.value, shape) for dtype, shape in kinds_of(entry)]
    kind = kinds[0]
    if found != place or (tensor.data_type, tuple(tensor.dims)) not in kinds:
        _refuse(
            file,
            where,
            f"{', '.join(found)}, type {tensor.data_type}, shape {list(tensor.dims)}"[:200],
            f"{', '.join(place)}, type {kind[0]}, shape {list(kind[1])}, as the manifest says",
        )


def _known() -> str:
    return "operators of ONNX, and " + ", ".join(
        f"{domain}::{name}" for domain, each in _WRITES.items() for name in sorted(each)
    )


def _refuse(file: Path, where: str, found: str, expected: str) -> NoReturn:
    refuse(f"{file}: {where}", found, expected, "build the artefact again")
