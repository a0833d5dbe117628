"""How target `torch` builds: a `torch.export` program for each part, without weights in it."""

from pathlib import Path

from torch import fx

from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import Ports
from moec.artefact.placement import Bound
from moec.exporters.builder import Builder, Wanted
from moec.exporters.torch.program import Program, graphs_of, load, program_of
from moec.graph_builder.passes.torch_support import check_fusible
from moec.weights.joined import joined_packings
from moec.weights.packing import Packing


def check(wanted: Wanted) -> None:
    """Refuse a model that the fused FP8 ops cannot express.

    Raises:
        MoecError: the message names the field of the spec, its value, and the values allowed.
    """
    check_fusible(wanted.spec)


def graphs(wanted: Wanted) -> dict[str, fx.GraphModule]:
    """The graph of each part: fused FP8 ops in the decoder, plain ops in the vision tower."""
    return graphs_of(wanted.spec, wanted.compute)


def lower(wanted: Wanted, graph: fx.GraphModule, part: str) -> tuple[Program, dict[str, Packing]]:
    """Turn `graph` into a program; `graph` must not be used afterwards."""
    return program_of(graph), {}


def save_unbound(program: Program, path: Path) -> None:
    """Write the program's file."""
    program.save(path)


def save_bound(program: Program, path: Path, bound: Bound, options: EngineOptions) -> None:
    """Write the program's file. Weights are inputs, so that `bound` changes nothing in it."""
    program.save(path)


def ports_of(program: Program) -> Ports:
    """The inputs and outputs of `program`, without its weights."""
    return program.ports


BUILDER = Builder(
    dialects=("torch",),
    check=check,
    graphs=graphs,
    lower=lower,
    packings=joined_packings,
    save_unbound=save_unbound,
    save_bound=save_bound,
    ports=ports_of,
    load=load,
)
