"""Write a graph as a .pt2 file with `torch.export`: our ops stay ops, and weights become inputs.

The inputs of a program are first those of the graph and then its weights. Each has its name with
dots replaced by underscores. A program therefore runs on any device, and parts or sessions can
share weights.

A session never loads the file: it builds the same program again from the spec. To open a program by
hand, import `moec.graph_builder.ops` and call `torch.export.load(file).module()`. Do so only with a
file that you built yourself, because `torch.export.load` runs code that a file may contain.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from moec.artefact.artefact import Artefact
from moec.artefact.manifest import Port, Ports
from moec.exporters.torch.archive import canonical, difference
from moec.graph_builder.fused import build_fused
from moec.graph_builder.parts import parts_of
from moec.graph_builder.passes.inject import inject
from moec.graph_builder.passes.tap import tap
from moec.graph_builder.passes.weights_as_inputs import lift_weights
from moec.graph_builder.plain import build_plain
from moec.graph_builder.types import TensorType
from moec.graph_builder.vision import build_vision
from moec.spec.model import ModelSpec
from moec.spec.sharding import ALONE, Rank
from moec.weights.joined import FUSED, PLAIN, unquantised

#: symbolic sizes that may be 0; all others are at least 1
_MAY_BE_ZERO = ("image_tokens",)


@dataclass(frozen=True, slots=True)
class Program:
    """The bytes of a .pt2 file, and its inputs and outputs without the weights."""

    data: bytes
    ports: Ports

    def save(self, path: Path) -> None:
        """Write the .pt2 file to `path`."""
        path.write_bytes(self.data)


def part_graph(
    spec: ModelSpec,
    precision: str,
    part: str = "model",
    taps: Sequence[str] = (),
    given: Sequence[str] = (),
    dialect: str = FUSED,
    rank: Rank = ALONE,
    greedy: bool = False,
) -> fx.GraphModule:
    """The graph of a part as target `torch` runs it in one of its dialects.

    In the dialect `FUSED` the decoder consists of fused FP8 ops, and the vision tower of plain ops
    without quantisation. In `PLAIN` both consist of plain ops, but for the MoE layers. `taps` names
    values that become further outputs. Inputs "NAME.given" replace the values `given`. A `rank` has
    its part of a fused decoder, and the whole of the vision tower. With `greedy` a fused decoder
    gives the likeliest tokens in place of logits.
    """
    if dialect == PLAIN:
        return build_plain(spec, precision, taps, given, part)
    if part == "model":
        return build_fused(spec, precision, taps, given, rank, greedy)
    graph = build_vision(unquantised(spec, precision), precision)
    return tap(inject(graph, given), taps)


def graphs_of(spec: ModelSpec, precision: str, dialect: str = FUSED) -> dict[str, fx.GraphModule]:
    """Every graph of an artefact of target `torch`, by part."""
    return {part: part_graph(spec, precision, part, dialect=dialect) for part in parts_of(spec)}


def program_of(graph: fx.GraphModule) -> Program:
    """Export `graph` as a program. The call changes `graph`, which cannot be used afterwards.

    Every process with this version of torch makes the same bytes.
    """
    ports = ports_of(graph)
    file = io.BytesIO()
    torch.export.save(_export(lift_weights(graph)), file)
    return Program(canonical(file.getvalue()), ports)


def ports_of(graph: fx.GraphModule) -> Ports:
    """The inputs and outputs of `graph`, whose weights are no inputs."""
    nodes = list(graph.graph.nodes)
    inputs = _ports([n for n in nodes if n.op == "placeholder"])
    return Ports(inputs=inputs, outputs=_ports(nodes[-1].args[0], nodes[-1].meta["outputs"]))


def load(artefact: Artefact, part: str) -> Program:
    """Build the program of a part of an artefact again, from the spec in its manifest.

    The stored file is not read, because it may come from a stranger.
    """
    manifest = artefact.manifest
    dialect = manifest.dialect
    return program_of(part_graph(manifest.spec, manifest.compute, part, dialect=dialect))


def same_program(artefact: Artefact, part: str) -> str | None:
    """Compare the stored file of a part with what the exporter writes now for the same spec.

    Nothing in the file is unpickled or evaluated. Returns None if the bytes are the same, and
    otherwise a short description of the first difference. A file that another version of torch
    wrote has other bytes although it may be sound; the description then names both versions, and
    says whether the nodes differ.
    """
    return difference(artefact.graph(part), load(artefact, part).data)


def _ports(nodes: Sequence[fx.Node], names: Sequence[str] = ()) -> tuple[Port, ...]:
    return tuple(
        Port(
            name=name,
            dtype=str(node.meta["type"].dtype).removeprefix("torch."),
            shape=node.meta["type"].shape,
        )
        for node, name in zip(nodes, names or [n.meta["name"] for n in nodes], strict=True)
    )


def _export(graph: fx.GraphModule) -> ExportedProgram:
    """Export `graph`, traced with fake tensors that have a shape but no memory."""
    dims: dict[str, tuple[Any, int]] = {}

    def sizes(of: TensorType) -> tuple[list[int], dict[int, Any]]:
        """Sizes to trace with, and the symbolic sizes by axis. Each symbol has its own size."""
        for dim in of.shape:
            if isinstance(dim, str) and dim not in dims:
                smallest = 0 if dim in _MAY_BE_ZERO else 1
                dims[dim] = Dim(dim, min=smallest), 3 + 2 * len(dims)
        known = {i: dims[dim] for i, dim in enumerate(of.shape) if isinstance(dim, str)}
        shape = [known[i][1] if i in known else dim for i, dim in enumerate(of.shape)]
        return shape, {i: dim for i, (dim, _) in known.items()}

    types = [n.meta["type"] for n in graph.graph.nodes if n.op == "placeholder"]
    drawn = [sizes(of) for of in types]
    with FakeTensorMode(shape_env=ShapeEnv()):
        values = tuple(
            torch.empty(shape, dtype=of.dtype) for of, (shape, _) in zip(types, drawn, strict=True)
        )
    symbols = tuple(by_position for _, by_position in drawn)
    program = torch.export.export(graph, values, dynamic_shapes=symbols)
    program.example_inputs = None  # otherwise the file would contain them
    return program
