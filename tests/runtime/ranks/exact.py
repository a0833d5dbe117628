"""Run fused programs without rounding to FP8, so that sharing changes no number.

Each rank quantises its part of a token with a scale of its own, which is all that differs between
what ranks compute together and what one process computes. Here codes stay as wide as they were.

As a script, in each of several ranks: exact.py FOLDER ARTEFACT... writes what every rank finds.
"""

import sys
from collections.abc import Mapping
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from moec.artefact.artefact import Artefact, open_artefact
from moec.graph_builder import ops
from moec.graph_builder.fused import build_fused
from moec.graph_builder.ops.fp8 import token_scale
from moec.graph_builder.ops.registry import OPS
from moec.runtime.engines.engine import Limits
from moec.runtime.engines.weights import load
from moec.runtime.ranks.group import all_heads, join
from moec.runtime.session import Session
from moec.spec.model import ModelSpec
from moec.spec.sharding import Rank

#: tokens in a call at most
PIECE = 60
#: tokens that ranks draw without a seed
DRAWN = "drawn"


def unrounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `encode` gives, without rounding."""
    scale = token_scale.eager(x, 0, None)
    return x.float() / scale[:, None], scale


class Unchecked(fx.Interpreter):
    """Runs a graph's ops without the checks of operands, which want codes in FP8."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is getitem:
            return getitem(*args)
        return OPS[target._schema.name.partition("::")[2]].eager(*args)


def taps_of(spec: ModelSpec) -> list[str]:
    """The router logits and the choices of all layers, and the residual stream."""
    layers = spec.text.all_layers
    inner = [f"layers.{layer.index}.moe.{name}" for layer in layers if layer.moe for name in
             ("router", "route.1")]  # fmt: skip
    return [*inner, *(f"layers.{layer.index}.out" for layer in layers)]


def exact(artefact: Artefact, rank: Rank) -> Session:
    """A session in float32 on the weights of `artefact`; `encode` must be `unrounded`."""
    spec, taps = artefact.manifest.spec, taps_of(artefact.manifest.spec)
    graph = build_fused(spec, "fp32", taps, rank=rank).to_empty(device="cpu")
    weights = load(artefact, "cpu", "model", rank)
    with torch.no_grad():
        for name, weight in graph.named_parameters():
            assert weight.shape == weights[name].shape
            weight.copy_(weights[name])
    nodes = list(graph.graph.nodes)
    inputs = [node.meta["name"] for node in nodes if node.op == "placeholder"]
    defaults = {n.meta["name"]: n.meta["default"] for n in nodes if n.op == "placeholder"}
    outputs = nodes[-1].meta["outputs"]

    @torch.inference_mode()
    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = [feeds.get(name, defaults[name]) for name in inputs]
        return dict(zip(outputs, Unchecked(graph).run(*given), strict=True))

    # fewer than a chunk, and no divisor of it: calls end within chunks and at their borders
    limits = Limits("buffers", min(PIECE, (spec.text.chunk or PIECE) - 1))
    return Session(spec, "fp32", "torch", run, artefact, limits=limits, rank=rank)


def results(session: Session) -> dict[str, Tensor]:
    """What a session computes for three rows of different length, two of them over a border."""
    spec, vocab = session.spec, session.spec.text.vocab
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([(spec.text.chunk or 0) + 9, 1, (spec.text.chunk or 0) - 2])

    def draw(*shape: int) -> Tensor:
        return torch.randint(6, vocab, shape, generator=generator)

    ids = draw(3, int(lengths.max()))
    ids[0, :2] = torch.tensor([0, vocab - 1])  # rows of the first and of the last rank
    found = session.trace(ids, lengths, taps_of(spec))
    found["prefill"], cache = session.prefill(ids, lengths=lengths)
    found |= {f"decode.{i}": session.decode(draw(3), cache) for i in range(4)}  # over a border
    found["extend"] = session.extend(draw(3, 9), torch.tensor([9, 0, 4]), cache)
    for name, tensor in cache.tensors.items():
        found[name] = tensor if session.rank.count == 1 else all_heads(tensor, spec.text)
    return found


if __name__ == "__main__":
    folder, *artefacts = map(Path, sys.argv[1:])
    ops.encode.eager = unrounded
    mine = join("cpu")
    found = {}
    for path in artefacts:
        session = exact(open_artefact(path), mine)
        drawn = session.generate(torch.tensor([[5, 6]]), max_new_tokens=9, temperature=2.0, stop=())
        found[path.name] = results(session) | {DRAWN: drawn}
    torch.save(found, folder / f"{mine.count}.{mine.index}.pt")
