"""How target `ort-cuda` builds: the graphs of target torch, lowered to nodes of our own domain."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from torch import fx

from moec.artefact.artefact import Artefact
from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import Ports
from moec.artefact.placement import Bound
from moec.exporters.builder import Wanted
from moec.exporters.onnx.lowering import type_of
from moec.exporters.onnx.ort_cuda import give_caches, weights_as_inputs
from moec.exporters.onnx.strangers import load_checked
from moec.exporters.onnx.write import lower_model, ports, save_bound
from moec.exporters.torch.program import graphs_of
from moec.graph_builder.passes.torch_support import check_fusible
from moec.kernels.sizes import check_sizes
from moec.spec.model import ModelSpec
from moec.targets.onnx.build import BUILDER as ONNX
from moec.weights.joined import ORT_CUDA, PROGRAM_TENSORS, Joined, in_one_piece, joined_packings
from moec.weights.packing import Packing
from moec.weights.view import name_of

#: the key of a property of inputs that are weights: the stored tensors that they are made of
WEIGHT = "moec.weight"


def check(wanted: Wanted) -> None:
    """Refuse a model or a scheme that the fused FP8 ops cannot express, or sizes of no kernel.

    Raises:
        MoecError: the message names the field of the spec, its value, and the values allowed.
    """
    check_fusible(wanted.spec)
    check_sizes(wanted.spec)


def graphs(wanted: Wanted) -> dict[str, fx.GraphModule]:
    """The graph of each part, as target torch has it."""
    return graphs_of(wanted.spec, wanted.compute)


def lower(wanted: Wanted, graph: fx.GraphModule, part: str) -> tuple[ir.Model, dict[str, Packing]]:
    """Lower `graph`; its weights are inputs. `packings` says how they are packed."""
    model = lower_model(graph, wanted.dialect, f"{wanted.spec.name} {part}", part).model
    give_caches(model)
    # The kernels read no slot counts, which only the op's eager meaning needs.
    unused = [each for each in model.graph.inputs if not each.uses()]
    for each in unused:
        model.graph.inputs.remove(each)
    _mark(model, wanted.spec, wanted.compute, part)
    return model, {}


def _mark(model: ir.Model, spec: ModelSpec, compute: str, part: str) -> None:
    """Give the inputs that are weights their property."""
    weights = PROGRAM_TENSORS[ORT_CUDA](spec, compute, part)
    for each in model.graph.inputs:
        if each.name in weights:
            each.metadata_props[WEIGHT] = " ".join(weights[each.name].sources)


def load(artefact: Artefact, part: str) -> ir.Model:
    """Read the ONNX file of a part; its weights are inputs again."""
    model = load_checked(artefact, part)
    weights_as_inputs(model)
    _mark(model, artefact.manifest.spec, artefact.manifest.compute, part)
    return model


def save(model: ir.Model, path: Path, bound: Bound, options: EngineOptions) -> None:
    """Write the model; weights that are one piece of a file become initializers."""
    pieces = {}
    for each in model.graph.inputs:
        sources = tuple(each.metadata_props.pop(WEIGHT, "").split())
        parts = [bound.entries[name] for name in sources if name in bound.entries]
        if sources and len(parts) == len(sources):
            kind = type_of(each)
            shape = tuple(int(size) for size in kind.shape)
            joined = Joined(shape, name_of(kind.dtype), sources)
            whole = in_one_piece(str(each.name), joined, parts)
            if whole:
                pieces[str(each.name)] = whole
            else:
                each.metadata_props[WEIGHT] = " ".join(sources)
    save_bound(model, path, pieces, bound.root)


def packings(spec: ModelSpec) -> dict[str, Packing]:
    """How the wide weights of `spec` become FP8 by its scheme."""
    return joined_packings(spec)


def ports_of(model: ir.Model) -> Ports:
    """The inputs and outputs of `model`, without its weights."""
    inputs = [each for each in model.graph.inputs if WEIGHT not in each.metadata_props]
    return Ports(inputs=ports(inputs), outputs=ports(model.graph.outputs))


BUILDER = replace(
    ONNX,
    dialects=(ORT_CUDA,),
    check=check,
    graphs=graphs,
    lower=lower,
    packings=packings,
    save_bound=save,
    ports=ports_of,
    load=load,
)
