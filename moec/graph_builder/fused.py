"""The decoder of target torch: fused FP8 ops, which write the caches in place.

The inputs are those of `moec.graph_builder.decoder` without `lengths`, because a call has no
padding. The caches `past.{i}.key` and `past.{i}.value` are buffers, as
`moec.graph_builder.passes.buffers` describes: a call writes into them, and `ring.last`,
`ring.total`, `global.last` and `global.total` say where. The output is `logits`. The weights are
those of `moec.weights.joined`.
"""

from collections.abc import Sequence

from torch import fx

from moec.graph_builder.decoder import build_decoder
from moec.graph_builder.passes.buffers import keep_buffers
from moec.graph_builder.passes.fused.fuse import fuse
from moec.graph_builder.passes.fused.greedy import choose_best
from moec.graph_builder.passes.fused.neighbours import join_neighbours
from moec.graph_builder.passes.fused.quantisation import join_encodes
from moec.graph_builder.passes.fused.shard import shard
from moec.graph_builder.passes.inject import inject
from moec.graph_builder.passes.skip_norm import join_skip_norms
from moec.graph_builder.passes.tap import tap
from moec.spec.model import ModelSpec
from moec.spec.sharding import ALONE, Rank, local
from moec.weights.joined import unquantised


def build_fused(
    spec: ModelSpec,
    precision: str = "bf16",
    taps: Sequence[str] = (),
    given: Sequence[str] = (),
    rank: Rank = ALONE,
    greedy: bool = False,
) -> fx.GraphModule:
    """Build the decoder of `spec`, which computes in `precision`.

    Unquantised weights are in `precision` too. `taps` names inner values, by the decoder's names,
    that become outputs. A fused op hides its router's logits and choice; the graph computes these
    again beside the op, from the op's own input. Inputs "NAME.given" replace the values `given`.

    With `greedy` the output is `best`, the likeliest tokens int64 [batch, logits], and no logits.
    The graph is that of a `rank`, which has its part of the weights and of the caches.

    Raises:
        MoecError: the fused ops cannot express the model or its scheme; or ranks cannot share it.
    """
    own = local(spec, rank)
    decoder = build_decoder(unquantised(own, precision), precision)
    graph = join_skip_norms(keep_buffers(choose_best(decoder) if greedy else decoder))
    graph = join_encodes(fuse(tap(inject(graph, given), taps), own))
    return join_neighbours(shard(graph, spec, rank))
