"""How target `throwaway` builds: a part's file is the spec."""

from pathlib import Path
from typing import Any

from torch import fx

from moec.artefact.artefact import Artefact
from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import Port, Ports
from moec.artefact.placement import Bound
from moec.exporters.builder import Builder, Wanted
from moec.graph_builder.parts import build_graph, parts_of
from moec.spec.errors import refuse
from moec.weights.packing import Packing


def check(wanted: Wanted) -> None:
    experts = wanted.spec.text.experts.count
    if experts > 16:
        refuse("text.experts.count", experts, "16 or fewer", "use --target onnx")


def graphs(wanted: Wanted) -> dict[str, fx.GraphModule]:
    spec, compute = wanted.spec, wanted.compute
    return {part: build_graph(spec, compute, part=part) for part in parts_of(spec)}


def lower(wanted: Wanted, graph: fx.GraphModule, part: str) -> tuple[Any, dict[str, Packing]]:
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return (wanted.spec.model_dump_json(), _ports(nodes)), {}


def _ports(nodes: list[fx.Node]) -> Ports:
    inputs = tuple(
        Port(name=node.meta["name"], dtype="float32", shape=node.meta["type"].shape)
        for node in nodes
    )
    return Ports(inputs=inputs, outputs=())


def save_unbound(model: Any, path: Path) -> None:
    path.write_text(model[0])


def save_bound(model: Any, path: Path, bound: Bound, options: EngineOptions) -> None:
    path.write_text(model[0])


def load(artefact: Artefact, part: str) -> Any:
    return artefact.graph(part).read_text(), artefact.manifest.ports(part)


BUILDER = Builder(
    dialects=("spec",),
    check=check,
    graphs=graphs,
    lower=lower,
    packings=lambda spec: {},
    save_unbound=save_unbound,
    save_bound=save_bound,
    ports=lambda model: model[1],
    load=load,
)
