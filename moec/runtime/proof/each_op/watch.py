"""Watch a session: compare every call that it makes op by op with the reference."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, fx

from moec.graph_builder.parts import build_graph
from moec.graph_builder.types import TensorType
from moec.runtime.engines.eager import fill
from moec.runtime.engines.engine import Run
from moec.runtime.proof.each_op.call import each_op
from moec.runtime.proof.each_op.distance import Distance, worst
from moec.runtime.proof.under_test import ArtefactUnderTest
from moec.runtime.ranks.group import all_heads
from moec.runtime.session import Session
from moec.spec import names


@dataclass(slots=True)
class Watch:
    """The reference of one part, and what it found of the calls so far.

    Attributes:
        graph: the reference graph, with its weights.
        taps: the inner values that both this graph and the engine's have.
        found: the worst distance of each value, by name, in the order of the graph.
        only: the values to compare; None: all that a call returns.
        whole: makes the whole of a cache from the part that a rank has.
    """

    graph: fx.GraphModule
    taps: list[str]
    found: dict[str, Distance] = field(default_factory=dict)
    only: Collection[str] | None = None
    whole: Callable[[Tensor], Tensor] = Tensor.clone

    def on(self, session: Session, given: Mapping[str, Tensor] | None = None) -> Session:
        """`session`, whose calls are compared.

        Calls use the inner values `given` [tokens, ...] of one sequence, by name, in place of those
        that they compute.
        """
        return replace(session, run=self.run(session.run, given or {}))

    def run(self, engine: Run, given: Mapping[str, Tensor]) -> Run:
        """`engine`, whose calls are compared."""

        def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
            start = int(feeds[names.PAST_LENGTHS][0]) if given else 0
            end = start + feeds[names.INPUT_IDS].shape[1] if given else 0
            here = {name: value[start:end] for name, value in given.items()}
            more = {names.given(name): value for name, value in here.items()}
            before = {
                name: self.whole(value) if names.is_past(name) else value
                for name, value in feeds.items()
            }
            out = engine({**feeds, **more})
            self.compare(before, out, here)
            return out

        return run

    def compare(
        self, feeds: Mapping[str, Tensor], out: Mapping[str, Tensor], given: Mapping[str, Tensor]
    ) -> None:
        """Compare the values `out` of a call with inputs `feeds`.

        The caches in `feeds` are as they were before the call. Engines may keep them as buffers
        [B, kv_heads, slots, head_dim]; the reference has [B, slots, kv_heads * head_dim].
        """
        inputs = {
            name: (value.transpose(1, 2).flatten(2) if value.dim() == 4 else value).cpu()
            for name, value in feeds.items()
            if name != names.PIXEL_VALUES
        } | {name: feeds[name] for name in (names.PIXEL_VALUES,) if name in feeds}
        lengths = feeds.get(names.LENGTHS)
        if self.only is not None:
            out = {name: each for name, each in out.items() if name in self.only}
        known = self.found.values()
        self.found = worst([*known, *each_op(self.graph, inputs, out, lengths, given)])


def watch(tested: ArtefactUnderTest, part: str = "model", file: str | None = None) -> Watch:
    """A watch over the artefact under test, whose reference is part "model" or "vision".

    `file` is the part that runs, if it is another one.
    """
    spec = tested.artefact.manifest.spec
    graph = build_graph(spec, tested.compute, part=part)
    fill(graph, tested.entries())
    nodes = list(graph.graph.nodes)
    outputs = nodes[-1].meta["outputs"]
    inner = [
        node.meta["name"]
        for node in nodes
        if node.op == "call_function"
        and isinstance(node.meta["type"], TensorType)
        and node.meta["name"] not in outputs
    ]
    seen = Watch(graph, tested.shown(file or part, inner))
    if tested.engine.rank.count > 1:
        seen.whole = partial(all_heads, text=spec.text)
    return seen
