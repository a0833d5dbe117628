"""Calibrate: measure how large the inputs of linear layers, keys and values get.

Static FP8 scales are computed from these magnitudes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from moec.graph_builder import ops
from moec.graph_builder.ops.moe import matrices, over_chosen
from moec.graph_builder.ops.operands import Moe, SeparateMoe
from moec.graph_builder.parts import build_graph
from moec.graph_builder.roles import cached
from moec.runtime.cache import new_cache
from moec.runtime.engines.eager import fill
from moec.runtime.inputs.token_file import read_rows
from moec.spec import names
from moec.spec.calibration import Calibration
from moec.spec.errors import refuse
from moec.spec.model import ModelSpec
from moec.weights.name_map import read_model

#: the bins of a power of two, which limit the error of a percentile to 1.1 %; and the smallest and
#: the largest power of two in the histogram
_BINS, _LOW, _HIGH = 64, -40, 24


class _Magnitudes:
    """The largest magnitude of all values given to `add`, and a histogram for percentiles."""

    def __init__(self, percentile: float) -> None:
        self.share, self.largest, self.seen = percentile / 100, 0.0, 0
        self.bins = torch.zeros((_HIGH - _LOW) * _BINS, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        if not x.numel():
            return
        size = x.detach().abs().flatten()
        most = size.max().item()
        if not most <= self.largest:  # a NaN stays, because no later value is above it
            self.largest = most
        self.seen += size.numel()
        if self.share < 1:
            at = ((size.float().clamp(min=1e-30).log2() - _LOW) * _BINS).long()
            self.bins += at.clamp(0, len(self.bins) - 1).bincount(minlength=len(self.bins))

    @property
    def found(self) -> float:
        """The wanted percentile of the magnitudes."""
        if self.share >= 1:
            return self.largest
        at = int((self.bins.cumsum(0) >= self.share * self.seen).nonzero()[0])
        return float(min(self.largest, 2.0 ** ((at + 1) / _BINS + _LOW)))


class _Observer(fx.Interpreter):
    """Runs the unquantised graph and records the inputs of linear layers and caches."""

    def __init__(self, graph: fx.GraphModule, percentile: float) -> None:
        super().__init__(graph)
        self.new: Callable[[], _Magnitudes] = lambda: _Magnitudes(percentile)
        self.inputs: dict[str, list[_Magnitudes]] = {}
        self.caches: dict[str, _Magnitudes] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.target == ops.linear.target:
            weight: Any = n.args[1]
            self._site(weight.meta["name"], 1)[0].add(args[0])
        elif n.target == ops.cache_append.target:
            self.caches.setdefault(cached(n, "calibrate"), self.new()).add(args[1])
        elif n.target == ops.moe.target:
            return self._moe(n, Moe(*args), len(args[4]))
        elif n.target == ops.separate_moe.target:
            return self._moe(n, SeparateMoe(*args), len(args[5]))
        return super().run_node(n)

    def _site(self, name: str, count: int) -> list[_Magnitudes]:
        """The magnitudes of the inputs of weight `name`, one for each of `count` experts."""
        return self.inputs.setdefault(name, [self.new() for _ in range(count)])

    def _moe(self, n: fx.Node, moe: Moe[Tensor] | SeparateMoe[Tensor], count: int) -> Tensor:
        layer = names.layer_of(n.meta["name"])
        assert layer is not None
        into, between = (self._site(each, count) for each in names.routed(layer))

        def ffn(expert: int, rows: Tensor) -> Tensor:
            into[expert].add(rows)
            gate_up, down = matrices(moe, expert)
            gate, up = (rows @ gate_up).chunk(2, -1)
            act: Tensor = ops.swiglu.eager(gate, up)
            between[expert].add(act)
            return act @ down

        return over_chosen(moe, ffn)


def calibrate(
    checkpoint: str | Path,
    tokens: str | Path | Tensor,
    *,
    percentile: float = 100.0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    batch: int = 4,
) -> Calibration:
    """Run the unquantised model in `checkpoint` over sequences of tokens, in float32.

    Args:
        checkpoint: the folder of a checkpoint whose weights are not FP8.
        tokens: int64 [sequences, length], or a file of them; see `read_rows`.
        percentile: which percentile of the magnitudes to take in each place; 100 is the largest.
        progress: called with (stage, done, total), where the numbers count sequences.
        batch: the sequences that run at once.

    Raises:
        MoecError: the weights are FP8 already, the tokens cannot be read, or values in the model
            are not finite.
    """
    folder = Path(checkpoint)
    spec, _, entries = read_model(folder)
    if spec.scheme:
        refuse(
            folder,
            spec.scheme.shown,
            "wide weights",
            "calibrate the checkpoint that they were made from",
        )
    if not 0 < percentile <= 100:
        expected = "a percentile above 0 and at most 100"
        refuse("--percentile", percentile, expected, "leave --percentile out")
    rows = read_rows(tokens, spec, folder)
    graph = build_graph(spec)
    fill(graph, entries)
    observer = _Observer(graph, percentile)
    with torch.inference_mode():
        for start in range(0, len(rows), batch):
            progress("calibrate", start, len(rows))
            observer.run(*feeds(spec, graph, rows[start : start + batch]))
    progress("calibrate", len(rows), len(rows))
    return _result(spec.name, observer, rows.numel(), percentile)


def feeds(spec: ModelSpec, graph: fx.GraphModule, ids: Tensor) -> list[Tensor]:
    """What `graph`, the eager decoder of `spec`, takes for ids [B, S] and empty caches."""
    count, length = ids.shape
    cache = new_cache(spec, "fp32", count, 0)
    given = {
        names.INPUT_IDS: ids,
        names.PAST_LENGTHS: cache.lengths,
        names.LENGTHS: torch.full((count,), length),
        names.LOGIT_INDEX: torch.full((count, 1), length - 1),
        **cache.tensors,
    }
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return [given.get(node.meta["name"], node.meta["default"]) for node in places]


def _result(model: str, observer: _Observer, tokens: int, percentile: float) -> Calibration:
    every = observer.inputs | {name: [site] for name, site in observer.caches.items()}
    for name, sites in every.items():
        if not all(site.largest < torch.inf for site in sites):
            refuse(
                f"calibration of {model}: {name}",
                "values that are not finite",
                "finite weights",
                f"moec validate, on an artefact of {model}",
            )
    inputs: dict[str, float | tuple[float, ...]] = {}
    unseen: list[str] = []
    for name, sites in observer.inputs.items():
        found = [site.found if site.seen else None for site in sites]
        if len(sites) == 1:
            inputs[name] = sites[0].found
            continue
        most = max(size for size in found if size is not None)
        inputs[name] = tuple(most if size is None else size for size in found)
        unseen += [names.expert_of(name, i) for i, size in enumerate(found) if size is None]
    caches = {name: site.found for name, site in observer.caches.items()}
    return Calibration(
        model=model,
        tokens=tokens,
        percentile=percentile,
        inputs=inputs,
        caches=caches,
        unseen=tuple(unseen),
    )
