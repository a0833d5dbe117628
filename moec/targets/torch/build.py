"""How target `torch` builds: a `torch.export` program for each part, without weights in it."""

from pathlib import Path

from torch import fx

from moec.artefact.engine_options import EngineOptions
from moec.artefact.manifest import Ports
from moec.artefact.placement import Bound
from moec.exporters.builder import Builder, Wanted
from moec.exporters.torch.program import Program, graphs_of, load, program_of
from moec.graph_builder.passes.torch_support import check_fusible, is_fusible
from moec.spec.model import ModelSpec
from moec.weights.joined import FUSED, PLAIN, joined_packings, plain_packings
from moec.weights.packing import Packing


def dialect(chosen: str, spec: ModelSpec) -> str:
    """The dialect of plain ops for a model with features that fused ops lack; else `chosen`."""
    return chosen if is_fusible(spec.text) else PLAIN


def check(wanted: Wanted) -> None:
    """Refuse a scheme that the fused FP8 ops cannot express; plain programs take every model.

    Raises:
        MoecError: the message names the field of the spec, its value, and the values allowed.
    """
    if wanted.dialect == FUSED:
        check_fusible(wanted.spec)


def graphs(wanted: Wanted) -> dict[str, fx.GraphModule]:
    """The graph of each part, of the ops that the dialect has."""
    return graphs_of(wanted.spec, wanted.compute, wanted.dialect)


def lower(wanted: Wanted, graph: fx.GraphModule, part: str) -> tuple[Program, dict[str, Packing]]:
    """Turn `graph` into a program; `graph` must not be used afterwards.

    Also return how wide weights are packed; `packings` does that for FP8.
    """
    wide = {} if wanted.spec.scheme else plain_packings(wanted.spec, wanted.compute)
    return program_of(graph), wide


def packings(spec: ModelSpec) -> dict[str, Packing]:
    """How the wide weights of `spec` become FP8 by its scheme."""
    return joined_packings(spec) if is_fusible(spec.text) else plain_packings(spec)


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
    dialects=(FUSED, PLAIN),
    check=check,
    graphs=graphs,
    lower=lower,
    packings=packings,
    save_unbound=save_unbound,
    save_bound=save_bound,
    ports=ports_of,
    load=load,
    dialect=dialect,
)
