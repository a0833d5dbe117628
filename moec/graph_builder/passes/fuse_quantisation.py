"""Let the op that makes values make their FP8 codes as well."""

from operator import getitem
from typing import Any

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import replace

#: who makes values -> the op that makes codes and scale of them instead, from the same operands
_JOINS = {
    ops.rms_norm.target: ops.norm_fp8,
    ops.skip_norm.target: ops.skip_norm_fp8,
    ops.attend.target: ops.attend_fp8,
}


def join_encodes(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph`, changed in place: `encode` goes where nobody else wants the values."""
    for encode in list(graph.graph.nodes):
        if encode.target != ops.encode.target:
            continue
        values: Any = encode.args[0]
        maker = values.args[0] if values.target in (getitem, ops.pack.target) else values
        if maker.target not in _JOINS or len(values.users) > 1:
            continue
        old = list(encode.users)  # codes, scale
        if maker.target == ops.skip_norm.target:
            old += [user for user in maker.users if user.args[1] == 1]  # the sum
        with graph.graph.inserting_before(maker):
            op = _JOINS[maker.target]
            replace(graph.graph, old, op, *maker.args, name=encode.meta["name"])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
