"""The decoder of fused FP8 ops, which writes its caches in place.

Inputs are those of `moec.graph_builder.decoder`, but for `lengths`: a call has no padding. Caches
are buffers, see `moec.graph_builder.passes.buffers`: `past.{i}.key` and `past.{i}.value`, written
by the call; `ring.last`, `ring.total`, `global.last`, `global.total` say where. The output is
`logits`. Weights are those of `moec.weights.joined`.
"""

from collections.abc import Sequence

from torch import fx

from moec.graph_builder.decoder import build_decoder
from moec.graph_builder.passes.buffers import keep_buffers
from moec.graph_builder.passes.fuse import fuse
from moec.graph_builder.passes.fuse_neighbours import join_neighbours
from moec.graph_builder.passes.fuse_quantisation import join_encodes
from moec.graph_builder.passes.skip_norm import join_skip_norms
from moec.graph_builder.passes.tap import tap
from moec.spec.model import ModelSpec
from moec.weights.joined import unquantised


def build_fused(
    spec: ModelSpec, precision: str = "bf16", taps: Sequence[str] = ()
) -> fx.GraphModule:
    """The decoder of `spec`, computing in `precision`; wide weights are of it too.

    `taps` names inner values, by the decoder's names for them, that are outputs too. What a fused
    op keeps to itself is computed beside it, from the op's own input: a router's logits and choice.

    Raises:
        MoecError: a model or scheme that the fused ops cannot express.
    """
    graph = join_skip_norms(keep_buffers(build_decoder(unquantised(spec, precision), precision)))
    return join_neighbours(join_encodes(fuse(tap(graph, taps), spec)))
