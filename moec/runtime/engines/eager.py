"""The reference engine: the fx graph itself, on torch, over weights mapped from their shards."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from moec.artefact.artefact import Entry
from moec.graph_builder.parts import build_graph
from moec.graph_builder.passes.follow import follow
from moec.graph_builder.passes.inject import inject
from moec.graph_builder.passes.tap import tap
from moec.runtime.engines.engine import Run
from moec.spec.model import ModelSpec
from moec.weights.packing import Packed
from moec.weights.view import view


def eager_engine(
    spec: ModelSpec,
    entries: Mapping[str, Entry],
    precision: str = "fp32",
    taps: Sequence[str] = (),
    part: str = "model",
    given: Sequence[str] = (),
    near: float | None = None,
) -> Run:
    """Run a part of `spec`, "model" or "vision", in `precision` on the CPU.

    `taps` names inner values to return as well, `given` those that callers feed: see `inject`. With
    `near`, callers may feed choices of experts that count at near ties: see `follow`.

    Weights stay in their files and dtype; each op casts what it uses, so that memory holds one
    weight at a time. Packed weights are unpacked first, all of them.
    """
    graph = build_graph(spec, precision, part=part)
    fill(graph, entries)
    inject(graph, given)
    if near is not None:
        follow(graph, near)
    if taps:
        tap(graph, taps)
    nodes = list(graph.graph.nodes)
    inputs = {node.meta["name"]: node.meta["default"] for node in nodes if node.op == "placeholder"}
    outputs = nodes[-1].meta["outputs"]

    @torch.inference_mode()
    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = [
            feeds[name] if default is None else feeds.get(name, default)
            for name, default in inputs.items()
        ]
        return dict(zip(outputs, graph(*given), strict=True))

    return run


def fill(graph: fx.GraphModule, entries: Mapping[str, Entry]) -> None:
    """Replace the meta weights of `graph` by views of their bytes, or by what packed ones mean."""
    for name in dict(graph.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        entry = entries[name]
        found = entry.read() if isinstance(entry, Packed) else view(entry)
        weight = nn.Parameter(found, requires_grad=False)
        setattr(graph.get_submodule(owner), leaf, weight)
