"""Replace a layer's products, experts and attention by fused FP8 ops, which use joined weights.

`moec.weights.joined` says which tensors are joined.
"""

from typing import Any

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import call, call_each, stand_in
from moec.graph_builder.ops.operands import Attend, BufferedAttention, arguments
from moec.graph_builder.passes.buffers import without_unused
from moec.graph_builder.passes.torch_support import check_fusible
from moec.graph_builder.roles import Role, find_input, finder
from moec.graph_builder.types import TensorType
from moec.graph_builder.weights import add_weight, drop_unused
from moec.spec import names
from moec.spec.model import LayerSpec, ModelSpec
from moec.weights.joined import joined_tensors
from moec.weights.view import STORED, name_of


def fuse(graph: fx.GraphModule, spec: ModelSpec) -> fx.GraphModule:
    """Rewrite an unquantised decoder in place, after `keep_buffers` and `join_skip_norms`.

    The fused ops write the buffers in place, so the buffers are outputs no longer. An `encode`
    before each product quantises its input; `join_encodes` moves that work into the op before. All
    other outputs stay, such as the logits of a router that is tapped.

    Raises:
        MoecError: the fused ops cannot express the model or its scheme, as `check_fusible` says;
            or the graph lacks a node with a role that the pass looks for.
    """
    check_fusible(spec)
    rewrite = _Rewrite(graph, spec)
    for layer in spec.text.all_layers:
        rewrite.attention(layer)
        if layer.moe:
            rewrite.moe(layer.index)
        else:
            rewrite.dense(layer.index)
    output = list(graph.graph.nodes)[-1]
    kept = {
        name: node
        for name, node in zip(output.meta["outputs"], output.args[0], strict=True)
        if not names.is_present(name)
    }
    output.args, output.meta["outputs"] = (tuple(kept.values()),), tuple(kept)
    without_unused(graph)
    drop_unused(graph)
    return graph


def fuse_experts(graph: fx.GraphModule, spec: ModelSpec) -> fx.GraphModule:
    """Rewrite an unquantised decoder in place: each MoE layer becomes a `moe_layer`.

    `moe_layer` uses joined weights. All else stays as it is; `quantize` can follow.

    Raises:
        MoecError: the graph lacks a node with a role that the pass looks for.
    """
    rewrite = _Rewrite(graph, spec)
    for layer in spec.text.all_layers:
        if layer.moe:
            rewrite.moe(layer.index)
    without_unused(graph)
    drop_unused(graph)
    return graph


class _Rewrite:
    """One run of the pass over `graph`."""

    def __init__(self, graph: fx.GraphModule, spec: ModelSpec) -> None:
        self.root, self.graph, self.text = graph, graph.graph, spec.text
        self.kinds = joined_tensors(spec)
        self.find = finder(self.graph, "fuse")
        wide = self.find(Role.EMBEDDING).meta["type"].dtype
        self.dtype = name_of(wide)

    def attention(self, layer: LayerSpec) -> None:
        i, at, find = layer.index, names.attention(layer.index), self.find
        mixed, out = find(Role.ATTENTION, i), find(Role.ATTENTION_OUT, i)
        buffered: Any = mixed.args[0]  # its first output is the mix
        old: BufferedAttention[fx.Node] = BufferedAttention(*buffered.args)
        rope = (find(Role.ROPE_COS), find(Role.ROPE_SIN)) if layer.rope else (None, None)
        temperature = find(Role.TEMPERATURE) if layer.temperature else None
        eps = self.text.norm_eps if layer.qk_norm else None
        x: Any = find(Role.QUERY, i).args[0]
        ids = find_input(self.graph, names.INPUT_IDS, "fuse")
        with self.graph.inserting_before(buffered):
            qkv = self.product(self.encode(x), f"{at}.qkv")
            rows = self.call(ops.unpack, qkv, ids, name=f"{at}.qkv.rows")
            q = self.call(
                ops.rope_append,
                rows,
                *rope,
                temperature,
                *(old.key, old.value, old.last),
                *(old.heads, old.kv_heads),
                eps,
                name=f"{at}.q.placed",
            )
            seen = Attend(q, old.key, old.value, old.last, old.total, old.heads, old.kv_heads)
            mix = self.call(ops.attend, *arguments(seen), name=f"{at}.mix")
            mix = self.call(ops.pack, mix, name=f"{at}.mix.packed")
            stand_in(self.product(self.encode(mix), f"{at}.o"), out)

    def moe(self, layer: int) -> None:
        router, old = self.find(Role.ROUTER, layer), self.find(Role.EXPERTS, layer)
        with self.graph.inserting_before(old):
            weights = [
                self.parameter(name)
                for routed in names.routed(layer)
                for name in (routed, names.scale_of(routed))
            ]
            out = names.moe(layer, "out")
            stand_in(self.call(ops.moe_layer, *router.args[:2], *weights, name=out), old)

    def dense(self, layer: int) -> None:
        at, old = names.dense(layer), self.find(Role.DOWN, layer)
        x: Any = self.find(Role.GATE, layer).args[0]
        with self.graph.inserting_before(old):
            gate_up = self.product(self.encode(x), f"{at}.gate_up")
            each = f"{at}.act.codes", f"{at}.act.scale"
            act = call_each(self.graph, ops.swiglu_fp8, gate_up, name=f"{at}.act", each=each)
            stand_in(self.product(act, f"{at}.down"), old)

    def encode(self, x: fx.Node) -> tuple[fx.Node, ...]:
        name = x.meta["name"]
        each = f"{name}.codes", f"{name}.scale"
        return call_each(self.graph, ops.encode, x, name=f"{name}.encoded", each=each)

    def product(self, codes: tuple[fx.Node, ...], name: str) -> fx.Node:
        weight = f"{name}.weight"
        weights = self.parameter(weight), self.parameter(names.scale_of(weight))
        return self.call(ops.fp8_linear, *codes, *weights, self.dtype, name=name)

    def call(self, op: ops.Op, *args: Any, name: str) -> fx.Node:
        return call(self.graph, op, *args, name=name)

    def parameter(self, name: str) -> fx.Node:
        """A node for the joined tensor `name`."""
        shape, dtype = self.kinds[name].shape, STORED[self.kinds[name].dtype]
        return add_weight(self.root, self.graph, name, TensorType(shape, dtype))
