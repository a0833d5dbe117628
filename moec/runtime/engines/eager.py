"""The eager reference: run the fx graph op by op in torch, on weights mapped from their shards."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from moec.artefact.artefact import Entry
from moec.graph_builder.parts import build_graph
from moec.graph_builder.passes.follow import follow
from moec.graph_builder.passes.follow_codes import follow_codes
from moec.graph_builder.passes.inject import inject
from moec.graph_builder.passes.tap import tap
from moec.graph_builder.weights import set_weight
from moec.runtime.engines.engine import Run
from moec.spec.model import ModelSpec
from moec.weights.packing import Packed
from moec.weights.view import view

#: how far float32 sums in another order are off, as a share of a token's largest element: the proof
#: finds a third of 1e-6 to 3e-6
ROUNDING = 4e-6


def eager_engine(
    spec: ModelSpec,
    entries: Mapping[str, Entry],
    precision: str = "fp32",
    taps: Sequence[str] = (),
    part: str = "model",
    given: Sequence[str] = (),
    near: float | None = None,
    codes: Sequence[str] = (),
) -> Run:
    """Open a part of `spec`, "model" or "vision", to run in `precision` on the CPU.

    Weights stay in their files and in their dtype. Each op casts the weight that it uses, so that
    memory holds one cast weight at a time. Packed weights are all unpacked into memory at once.

    Args:
        taps: inner values that a call returns besides the outputs.
        given: inner values that callers may feed in place of the computed ones: see `inject`.
        near: a limit, with which callers may feed choices of experts at near ties: see `follow`.
        codes: values in FP8 that callers feed, which count where a rounding decides: see
            `follow_codes`.
    """
    graph = build_graph(spec, precision, part=part)
    fill(graph, entries)
    follow_codes(graph, codes, ROUNDING)
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
    """Replace the meta weights of `graph` by views of their bytes; unpack packed weights."""
    for name in dict(graph.named_parameters()):
        entry = entries[name]
        set_weight(graph, name, entry.read() if isinstance(entry, Packed) else view(entry))
