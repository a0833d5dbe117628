"""The plain graphs of target torch: the ops of the reference, with whole MoE layers as one op.

They are for models and precisions that the fused ops of `moec.graph_builder.fused` do not express.
Inputs and outputs of the decoder are those of `moec.graph_builder.decoder`: each call gets caches
and returns new ones. Decode steps have a graph of their own, which writes into the caches. The
weights are those of `moec.weights.joined.plain_tensors`.
"""

from collections.abc import Sequence

from torch import fx

from moec.graph_builder.parts import BUILDERS
from moec.graph_builder.passes.fused.quantisation import join_encodes
from moec.graph_builder.passes.inject import inject
from moec.graph_builder.passes.plain.experts import join_experts
from moec.graph_builder.passes.plain.in_place import write_in_place
from moec.graph_builder.passes.plain.products import fuse_products
from moec.graph_builder.passes.quantize import quantize
from moec.graph_builder.passes.skip_norm import join_skip_norms
from moec.graph_builder.passes.tap import tap
from moec.spec.model import ModelSpec
from moec.spec.mtp.model import mtp_of
from moec.weights.joined import plain_spec


def build_plain(
    spec: ModelSpec,
    precision: str = "bf16",
    taps: Sequence[str] = (),
    given: Sequence[str] = (),
    part: str = "model",
) -> fx.GraphModule:
    """Build a part of `spec`, "model", "vision" or "mtp", which computes in `precision`.

    `taps` names inner values that become outputs. `routed_layer` hides its router's logits and
    choice; if they are tapped, the graph computes them again beside the op, with the same ops.
    Inputs "NAME.given" replace the values `given`.
    """
    stored = plain_spec(spec, precision)
    graph = inject(BUILDERS[part](stored, precision), given)
    known = {node.meta.get("name") for node in graph.graph.nodes}
    tap(graph, [name for name in taps if name in known])
    if part != "vision":
        join_experts(graph, mtp_of(stored) if part == "mtp" else stored)
    fuse_products(quantize(graph, stored))
    return tap(graph, [name for name in taps if name not in known])


def build_step(
    spec: ModelSpec, precision: str = "bf16", taps: Sequence[str] = ()
) -> fx.GraphModule:
    """Build the decoder of `build_plain` for decode steps, which write into the caches.

    A call has one token of each sequence. Its norms are joined with the sums before them, and with
    the rounding to FP8 after them.
    """
    return join_encodes(join_skip_norms(write_in_place(build_plain(spec, precision, taps))))
