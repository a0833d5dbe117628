"""Judge static scales by what they do: how far a rounded input is from the input.

Engine and reference take the same static scales, so that both are wrong where these are. A scale
that is far too large rounds everything to zero, and one that is far too small saturates.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from moec.artefact.artefact import Artefact, Entry
from moec.graph_builder import ops
from moec.graph_builder.ops.fp8 import expert_ffn
from moec.graph_builder.ops.moe import over_chosen
from moec.graph_builder.ops.operands import Fp8Moe
from moec.graph_builder.parts import build_graph
from moec.runtime.calibrate import feeds
from moec.runtime.engines.eager import fill
from moec.runtime.proof.report import Check
from moec.spec import names
from moec.spec.model import ModelSpec
from moec.spec.scheme import STATIC
from moec.weights.packed.hashed import tensor_sha256

#: the largest error of the values that share a scale, relative: that of the middle token or that of
#: all together, whichever is less. E4M3 alone makes 0.03. Small tokens beside large ones, and large
#: ones that saturate, make one of both larger. Five tokens an expert for calibrate gave up to 0.48.
LIMIT = 0.6
#: fewer tokens say nothing of a scale
ENOUGH = 3


def static_scales(spec: ModelSpec, entries: Mapping[str, Entry], ids: Tensor) -> Iterator[Check]:
    """Check every static scale of the decoder of `spec` that tokens ids [B, S] reach."""
    if spec.scheme is None or not spec.scheme.static:
        return
    graph = build_graph(spec)
    fill(graph, entries)
    observer = _Observer(graph)
    with torch.inference_mode():
        observer.run(*feeds(spec, graph, ids))
    errors = {site: _error(torch.cat(found, 1)) for site, found in observer.norms.items()}
    known = {site: error for site, error in errors.items() if error is not None}
    wrong = {site: error for site, error in known.items() if not error <= LIMIT}
    for site, error in wrong.items():
        detail = "how far rounded values are from the values; more text for calibrate may help"
        yield Check(f"static scale: {site}", "error", error, LIMIT, detail)
    if known and not wrong:
        detail = f"{len(known)} scales; too few tokens for {len(errors) - len(known)}"
        yield Check("static scales", "error", max(known.values()), LIMIT, detail)


def _error(norms: Tensor) -> float | None:
    """The error of one scale, from the norms of errors and of values [2, tokens]."""
    off, size = norms[:, norms[1] > 0]
    if len(size) < ENOUGH:
        return None
    return min(float((off / size).median()), float(off.norm() / size.norm()))


def static_bytes(artefact: Artefact) -> Iterator[Check]:
    """Check that the scales of a packed file are the bytes that the build hashed.

    The tokens of a proof do not reach every expert, whose inputs may have a scale of their own.
    """
    weights, detail = artefact.manifest.weights, "other bytes than were written"
    for name, expected in weights.hashes.items():
        ref = weights.tensors[name]
        if names.is_scale(name) and ref.length <= 1 << 16:
            file = artefact.shard(ref.file)
            if tensor_sha256(file, ref.offset, ref.length, expected.pieces) != expected.sha256:
                yield Check(f"static scale: {name}", "agreement", 0.0, 1.0, detail)


class _Observer(fx.Interpreter):
    """Runs a graph and records norms of what static scales round, by scale: [2, tokens]."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.norms: dict[str, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.target == ops.quantize.target and self._is_stored(n.args[1]):
            codes = super().run_node(n)
            x, scale, axis, block = args
            wide = ops.dequantize.eager(codes, scale, axis, block, "fp32")
            self._add(str(n.args[1].meta["name"]), x, wide)  # type: ignore[union-attr]
            return codes
        if n.target == ops.fp8_moe.target and (moe := Fp8Moe(*args)).inputs in STATIC:
            return over_chosen(moe, expert_ffn(moe, self._of_layer(str(n.meta["name"]), moe)))
        return super().run_node(n)

    def _is_stored(self, scale: Any) -> bool:
        return isinstance(scale, fx.Node) and scale.op == "get_attr"

    def _of_layer(
        self, name: str, moe: Fp8Moe[Tensor]
    ) -> Callable[[str, int, Tensor, Tensor], None]:
        both = {"gate_up": moe.gate_up_input, "down": moe.down_input}
        one = {
            label: len({float(s) for each in scales for s in each.flatten()}) == 1
            for label, scales in both.items()
        }

        def seen(label: str, expert: int, x: Tensor, on_grid: Tensor) -> None:
            layer = f"{names.moe(names.layer_of(name) or 0)}.{label}"
            self._add(layer if one[label] else names.expert_of(layer, expert), x, on_grid)

        return seen

    def _add(self, site: str, x: Tensor, on_grid: Tensor) -> None:
        size = x.float().flatten(0, -2).norm(dim=-1)
        off = (on_grid.float() - x.float()).flatten(0, -2).norm(dim=-1)
        self.norms.setdefault(site, []).append(torch.stack([off, size]))
