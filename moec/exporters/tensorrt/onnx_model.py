"""Write graphs as ONNX for TensorRT, with weights as external data or as inputs of the engine."""

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import fx

from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import Ports
from moec.exporters.onnx.external_data import set_external_data, write_model
from moec.exporters.onnx.write import lower_model, ports
from moec.exporters.precision import fp8_packings
from moec.exporters.tensorrt.support import wants_plugin
from moec.graph_builder.decoder import build_decoder
from moec.graph_builder.parts import build_graph, parts_of
from moec.graph_builder.passes.buffers import keep_buffers
from moec.graph_builder.passes.fused.fuse import fuse_experts
from moec.graph_builder.passes.quantize import quantize
from moec.graph_builder.passes.static import make_static
from moec.spec import names
from moec.spec.model import ModelSpec
from moec.weights.joined import joined_packings
from moec.weights.packing import Packing
from moec.weights.shard import TensorEntry

#: the first runs the experts with ONNX operators, the second with the MoE plugin
DIALECTS = ("tensorrt", "tensorrt-plugin")


def graphs_of(
    spec: ModelSpec, precision: str, dialect: str, options: EngineOptions
) -> dict[str, fx.GraphModule]:
    """Every graph of a TensorRT artefact, by part."""
    graphs = {part: build_graph(spec, precision, part=part) for part in parts_of(spec)}
    if dialect == "tensorrt-plugin":
        wide = build_decoder(spec.model_copy(update={"scheme": None}), precision)
        graphs["model"] = quantize(fuse_experts(wide, spec), spec)
    make_static(keep_buffers(graphs["model"]), options.slots(spec))
    return graphs


def packings_of(spec: ModelSpec) -> dict[str, Packing]:
    """How unquantised weights of `spec` are packed to FP8.

    If the MoE plugin runs the experts, they get the layout of its kernels.
    """
    found = fp8_packings(spec)
    if wants_plugin(spec):
        found |= {
            name: each
            for name, each in joined_packings(spec).items()
            if names.of_moe(name) and each.fp8
        }
    return found


def lower(graph: fx.GraphModule, name: str, part: str) -> tuple[ir.Model, dict[str, Packing]]:
    """`graph` as ONNX; no input and no node that nobody uses."""
    lowered = lower_model(graph, DIALECTS[0], name, part)
    RemoveUnusedNodesPass()(lowered.model)
    inputs = lowered.model.graph.inputs
    for each in [each for each in inputs if not each.uses()]:
        inputs.remove(each)
    return lowered.model, lowered.packings


def save_bound(
    model: ir.Model, path: Path, entries: Mapping[str, TensorEntry], root: Path, bindings: str
) -> None:
    """Write the model. Weights are external data below `root`, except weight inputs.

    `bindings` says which weights stay inputs: "none", "experts" or "all".
    """
    shapes = {each.name: each.shape for each in model.graph.inputs}
    inside = {
        name: entry
        for name, entry in entries.items()
        if bindings != "all"
        and not (bindings == "experts" and names.holds_routed(name))
        and shapes.get(name, entry.shape)
        == entry.shape  # else `entry` is one of several joined tensors
    }
    set_external_data(model, inside, root)
    write_model(model, path)


def ports_of(model: ir.Model) -> Ports:
    """The inputs and outputs of a caller, without weight inputs."""
    data = [each for each in model.graph.inputs if names.is_input(str(each.name))]
    return Ports(inputs=ports(data), outputs=ports(model.graph.outputs))
