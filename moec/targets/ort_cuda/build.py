"""How target `ort-cuda` builds: the graphs of target torch, lowered to nodes of our own domain."""

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from torch import fx

from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import Ports
from moec.artefact.placement import Bound
from moec.exporters.builder import Wanted
from moec.exporters.onnx.ort_cuda import give_caches
from moec.exporters.onnx.write import lower_model, ports, save_checked
from moec.exporters.torch.program import graphs_of
from moec.graph_builder.passes.torch_support import check_fusible
from moec.spec.model import ModelSpec
from moec.targets.onnx.build import BUILDER as ONNX
from moec.weights.joined import ORT_CUDA, joined_packings
from moec.weights.packing import Packing

#: the key of a property that an input has which is a weight
WEIGHT = "moec.weight"


def check(wanted: Wanted) -> None:
    """Refuse a model or a scheme that the fused FP8 ops cannot express.

    Raises:
        MoecError: the message names the field of the spec, its value, and the values allowed.
    """
    check_fusible(wanted.spec)


def graphs(wanted: Wanted) -> dict[str, fx.GraphModule]:
    """The graph of each part, as target torch has it."""
    return graphs_of(wanted.spec, wanted.compute)


def lower(wanted: Wanted, graph: fx.GraphModule, part: str) -> tuple[ir.Model, dict[str, Packing]]:
    """Lower `graph`; its weights are inputs. `packings` says how they are packed."""
    fed = {node.meta["name"] for node in graph.graph.nodes if node.op == "placeholder"}
    model = lower_model(graph, wanted.dialect, f"{wanted.spec.name} {part}", part).model
    give_caches(model)
    # The kernels read no slot counts, which only the op's eager meaning needs.
    unused = [each for each in model.graph.inputs if not each.uses()]
    for each in unused:
        model.graph.inputs.remove(each)
    for each in model.graph.inputs:
        if each.name not in fed:
            each.metadata_props[WEIGHT] = "1"
    return model, {}


def save(model: ir.Model, path: Path, bound: Bound, options: EngineOptions) -> None:
    """Write the model. Weights are inputs, so that `bound` changes nothing in it."""
    save_checked(model, path)


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
)
