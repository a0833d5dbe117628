"""Make a graph use the FP8 values that another engine rounded to, where a rounding decides."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from moec.graph_builder import ops
from moec.graph_builder.builder import tag
from moec.graph_builder.ops.fp8 import FP8, spread
from moec.spec.names import given
from moec.spec.scheme import LARGEST


def quantised_tokens(graph: fx.GraphModule) -> list[str]:
    """The names of the values [tokens, D] of `graph` that are roundings to FP8."""
    return [
        node.meta["name"]
        for node in graph.graph.nodes
        if node.op == "call_function"
        and node.target == ops.quantize.target
        and node.meta["type"].shape[0] == "batch*sequence"
    ]


def follow_codes(graph: fx.GraphModule, names: Sequence[str], noise: float) -> fx.GraphModule:
    """Change `graph` in place: each rounding NAME to FP8 uses an input "NAME.given" [tokens, D].

    It uses a given value that its own unrounded value may become if it moves by `noise`, as a share
    of the largest of its token: where that lies between two values of FP8, another order of the
    same sum goes to the other one. Everywhere else it uses its own.
    """
    wanted = set(names)
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    for own in list(graph.graph.nodes):
        if own.op != "call_function" or own.meta["name"] not in wanted:
            continue
        with graph.graph.inserting_before(first):
            theirs = graph.graph.placeholder(given(own.meta["name"]).replace(".", "_"))
        theirs.meta["default"] = None
        tag(theirs, given(own.meta["name"]), own.meta["type"])
        with graph.graph.inserting_after(own):
            used = graph.graph.call_function(taken_codes, (*own.args, own, theirs, noise))
        tag(used, f"{own.meta['name']}.taken", own.meta["type"])
        own.replace_all_uses_with(used, lambda user, used=used: user is not used)
    graph.recompile()
    return graph


def taken_codes(
    x: Tensor, scale: Tensor, axis: int, block: int, own: Tensor, theirs: Tensor, noise: float
) -> Tensor:
    """The FP8 values to use: those of `theirs` that are roundings of x within `noise`, else `own`.

    A value is the rounding of one that is within w of x if it is no further from x than the nearest
    FP8 value is, and 2 w.
    """
    exact = (x.float() / spread(scale, x.shape, axis, block)).clamp(-LARGEST, LARGEST)
    width = noise * exact.abs().amax(-1, keepdim=True)
    off = (theirs.float() - exact).abs()
    near = off <= (own.float() - exact).abs() + 2 * width  # not if it is NaN
    return torch.where(near, theirs.view(torch.uint8), own.view(torch.uint8)).view(FP8)
