"""How target `onnx` builds: it lowers every spec to ONNX's standard operators."""

from pathlib import Path

import onnx_ir as ir
from torch import fx

from moec.artefact.artefact import Artefact
from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import Ports
from moec.artefact.placement import Bound
from moec.exporters.builder import Builder, Wanted
from moec.exporters.onnx.standard import OPSET
from moec.exporters.onnx.strangers import load_checked
from moec.exporters.onnx.write import graphs_of, lower_model, ports, save_bound, save_checked
from moec.exporters.precision import published_packings
from moec.weights.packing import Packing


def check(wanted: Wanted) -> None:
    """Refuse nothing: plain ONNX expresses every spec in every precision of the target."""


def graphs(wanted: Wanted) -> dict[str, fx.GraphModule]:
    """The graph of each part, after the passes that the dialect needs."""
    return graphs_of(wanted.spec, wanted.compute, wanted.dialect)


def lower(wanted: Wanted, graph: fx.GraphModule, part: str) -> tuple[ir.Model, dict[str, Packing]]:
    """Lower `graph` with the rules of the dialect; also return how its weights must be packed."""
    name = f"{wanted.spec.name} {part}"
    lowered = lower_model(graph, wanted.dialect, name, part, wanted.turned)
    return lowered.model, lowered.packings


def load(artefact: Artefact, part: str) -> ir.Model:
    """Read the ONNX file of a part; its weights stay in their files."""
    return load_checked(artefact, part)


def save(model: ir.Model, path: Path, bound: Bound, options: EngineOptions) -> None:
    """Make all weights of `model` refer to their files, and write the model."""
    save_bound(model, path, bound.entries, bound.root)


def ports_of(model: ir.Model) -> Ports:
    """All inputs and outputs of `model`."""
    return Ports(inputs=ports(model.graph.inputs), outputs=ports(model.graph.outputs))


BUILDER = Builder(
    dialects=("standard",),
    check=check,
    graphs=graphs,
    lower=lower,
    packings=published_packings,
    save_unbound=save_checked,
    save_bound=save,
    ports=ports_of,
    load=load,
    opset=OPSET,
)
