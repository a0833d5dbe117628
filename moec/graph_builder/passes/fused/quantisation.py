"""Let the op that computes values also quantise them to FP8."""

from operator import getitem
from typing import Any

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import replace

#: an op -> the op that takes the same operands and returns quantised values and their scales
_JOINS = {
    ops.rms_norm.target: ops.norm_fp8,
    ops.skip_norm.target: ops.skip_norm_fp8,
    ops.attend.target: ops.attend_fp8,
}


def join_encodes(graph: fx.GraphModule) -> fx.GraphModule:
    """Rewrite `graph` in place: remove each `encode` whose input no other op uses."""
    for encode in list(graph.graph.nodes):
        if encode.target != ops.encode.target:
            continue
        values: Any = encode.args[0]
        maker = values.args[0] if values.target in (getitem, ops.pack.target) else values
        if maker.target not in _JOINS or len(values.users) > 1:
            continue
        old = list(encode.users)  # quantised values, scales
        if maker.target == ops.skip_norm.target:
            old += [user for user in maker.users if user.args[1] == 1]  # the sum
        with graph.graph.inserting_before(maker):
            op = _JOINS[maker.target]
            replace(graph.graph, old, op, *maker.args, name=encode.meta["name"])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
