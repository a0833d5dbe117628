"""Quantise a graph as the scheme of a spec says: the weights, and the inputs of products."""

from collections.abc import Callable
from typing import Any

from torch import fx

from moec.graph_builder import ops
from moec.graph_builder.builder import call, stand_in
from moec.graph_builder.ops.operands import Moe
from moec.graph_builder.roles import cached
from moec.graph_builder.types import TensorType
from moec.graph_builder.weights import add_list, add_weight, drop_unused
from moec.spec import names
from moec.spec.model import ModelSpec
from moec.spec.scheme import STATIC, Rule, Scheme
from moec.spec.tensors import quantized, tensors
from moec.weights.view import STORED, name_of


def quantize(graph: fx.GraphModule, spec: ModelSpec) -> fx.GraphModule:
    """Rewrite `graph`, a part of `spec` with unquantised weights, in place.

    Nothing changes if `spec` has no scheme. In FP8, a `linear` that the scheme names gets a
    `dequantize` for its weight. Its input gets a `quantize` and a `dequantize`; dynamic scales need
    a `token_scale` before them. `moe` becomes `fp8_moe`. With FP8 caches, keys and values are
    rounded to FP8 before they are appended, and the caches hold FP8 values.

    With 4-bit integers, `linear` becomes `int4_linear`, and experts `int4_moe`.

    Raises:
        MoecError: a cache is FP8, and the node that appends to it lacks the role of keys or values.
    """
    if spec.scheme is None:
        return graph
    kind = _Int4 if spec.scheme.int4 else _Fp8
    rewrite = kind(graph, spec.scheme, spec, quantized(spec))
    for node in list(graph.graph.nodes):
        if node.op == "call_function":
            with graph.graph.inserting_before(node):
                rewrite(node)
    graph.graph.eliminate_dead_code()
    drop_unused(graph)
    graph.recompile()
    return graph


class _Rewrite:
    """One run of the pass over `graph`: what both kinds of quantised values need."""

    def __init__(
        self, graph: fx.GraphModule, scheme: Scheme, spec: ModelSpec, rules: dict[str, Rule]
    ) -> None:
        self.root, self.graph = graph, graph.graph
        self.scheme, self.rules, self.kinds = scheme, rules, tensors(spec)
        self.count = spec.text.expert_count
        self.inputs: dict[tuple[fx.Node, str], fx.Node] = {}  # rounded once for q, k and v
        self.wide: dict[str, fx.Node] = {}  # dequantised weights of several products

    def __call__(self, node: fx.Node) -> None:
        """Rewrite `node` if the scheme says so."""
        raise NotImplementedError

    def parameter(self, name: str) -> fx.Node:
        """Add a node for the stored tensor `name`."""
        return add_weight(self.root, self.graph, name, self.kind(name))

    def experts(self, stacked: str, tensor: Callable[[str], str] = str) -> fx.Node:
        """Add a node for the stored tensors that hold the experts of a stacked weight.

        `tensor` names what is wanted of each, such as the scales of its values.
        """
        parts = (part for e in range(self.count) for part in names.separate(stacked, e))
        kinds = {name: self.kind(name) for name in map(tensor, parts)}
        return add_list(self.root, self.graph, tensor(names.list_of(stacked)), kinds)

    def kind(self, name: str) -> TensorType:
        """The type of the stored tensor `name`."""
        shape, dtype = self.kinds[name]
        return TensorType(shape, STORED[dtype])

    def forget(self, *wide: fx.Node) -> None:
        for node in wide:
            if not node.users:  # else another node still uses it unquantised
                self.graph.erase_node(node)


class _Fp8(_Rewrite):
    def __call__(self, node: fx.Node) -> None:
        args: Any = node.args
        if node.target == ops.linear.target and args[1].meta["name"] in self.rules:
            self.linear(node, args[1].meta["name"])
        elif node.target == ops.moe.target:
            self.moe(node, Moe(*args))
        elif node.target == ops.head_linear.target and args[1].meta["name"] in self.rules:
            self.head_linear(node, args[1])
        elif node.target == ops.cache_append.target and self.scheme.cache:
            self.append(node)

    def linear(self, node: fx.Node, weight: str) -> None:
        args: Any = node.args
        x, old, bias = args
        rule, dtype = self.rules[weight], _name(x)
        scale = self.parameter(names.scale_of(weight))
        wide = self.dequantize(self.parameter(weight), scale, 0, f"{weight}.wide", dtype)
        node.args = (self.rounded(x, weight, rule), wide, bias)
        self.forget(old)

    def head_linear(self, node: fx.Node, old: fx.Node) -> None:
        """Use the weights as they are stored; inputs stay wide.

        A rule speaks of the inputs of the whole product. Here one is another product's input, and
        the other one its output.
        """
        weight, x = str(old.meta["name"]), node.all_input_nodes[0]
        if weight not in self.wide:  # two nodes use it
            codes, scale = self.parameter(weight), self.parameter(names.scale_of(weight))
            self.wide[weight] = self.dequantize(codes, scale, 0, f"{weight}.wide", _name(x))
        node.replace_input_with(old, self.wide[weight])
        self.forget(old)

    def rounded(self, x: fx.Node, weight: str, rule: Rule) -> fx.Node:
        """The input `x`, rounded as the rule of `weight` says."""
        if rule.inputs == "none":
            return x
        static = rule.inputs in STATIC
        key = (x, weight if static else rule.inputs)
        if key not in self.inputs:
            own = names.computed(x.meta["name"])  # proofs know its rounding by this name
            name = weight.removesuffix(".weight") if static else f"{own}.{rule.inputs}"
            if static:
                scale = self.parameter(names.input_scale_of(weight))
            else:
                group = self.scheme.block if rule.inputs == "group" else 0
                scale = call(
                    self.graph, ops.token_scale, x, group, self.scheme.bound, name=f"{name}.scale"
                )
            self.inputs[key] = self.on_grid(x, scale, name)
        return self.inputs[key]

    def on_grid(self, x: fx.Node, scale: fx.Node, name: str) -> fx.Node:
        codes = self.quantize(x, scale, f"{name}.codes")
        return self.dequantize(codes, scale, 0, f"{name}.rounded", _name(x))

    def moe(self, node: fx.Node, old: Moe[fx.Node]) -> None:
        experts = [str(weight.meta["name"]) for weight in (old.gate_up, old.down)]
        rule = self.rules.get(experts[0])
        if rule is None:
            return

        def stored(fused: str, tensor: Callable[[str], str]) -> object:
            apart = self.scheme.separate_experts
            return self.experts(fused, tensor) if apart else [self.parameter(tensor(fused))]

        weights = [stored(fused, tensor) for fused in experts for tensor in (str, names.scale_of)]
        static = rule.inputs in STATIC
        inputs = [stored(fused, names.input_scale_of) if static else [] for fused in experts]
        how = rule.inputs, self.scheme.block, self.scheme.bound
        routed = (old.x, old.scores, old.experts, old.weighed)
        new = call(
            self.graph, ops.fp8_moe, *routed, *weights, *inputs, *how, name=node.meta["name"]
        )
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        self.forget(old.gate_up, old.down)

    def append(self, node: fx.Node) -> None:
        """Make a cache FP8: attention sees rounded keys or values, and the cache holds FP8."""
        args: Any = node.args
        past, new = args
        label = cached(node, "quantize")
        scale, dtype = self.parameter(names.scale_of(label)), _name(new)
        past.meta["type"] = TensorType(past.meta["type"].shape, ops.FP8)
        wide = self.dequantize(past, scale, 0, f"{label}.cache.past", dtype)
        node.args = (wide, self.on_grid(new, scale, f"{label}.cache"))
        for write in [user for user in node.users if user.target == ops.cache_write.target]:
            kept = write.meta["name"]
            write.meta["name"], users = f"{label}.cache.kept", list(write.users)
            with self.graph.inserting_after(write):
                codes = self.quantize(write, scale, kept)
            for user in users:
                user.replace_input_with(write, codes)

    def quantize(self, x: fx.Node, scale: fx.Node, name: str) -> fx.Node:
        return call(self.graph, ops.quantize, x, scale, 0, self.scheme.block, name=name)

    def dequantize(
        self, codes: fx.Node, scale: fx.Node, axis: int, name: str, dtype: str
    ) -> fx.Node:
        block = self.scheme.block
        return call(self.graph, ops.dequantize, codes, scale, axis, block, dtype, name=name)


class _Int4(_Rewrite):
    def __call__(self, node: fx.Node) -> None:
        args: Any = node.args
        if node.target == ops.linear.target and args[1].meta["name"] in self.rules:
            self.linear(node, *args)
        elif node.target == ops.moe.target:
            old = Moe(*args)
            self.moe(node, args[:4], dict.fromkeys(self.routed(node)))
            self.forget(old.gate_up, old.down)
        elif node.target == ops.separate_moe.target:
            self.moe(node, args[:4], dict(zip(self.routed(node), args[4:], strict=True)))
            self.forget(*args[4:])

    def linear(self, node: fx.Node, x: fx.Node, old: fx.Node, bias: fx.Node | None) -> None:
        name = str(old.meta["name"])
        tensors = [self.parameter(name), self.parameter(names.scale_of(name)), None]
        if self.scheme.zero_points:
            tensors[2] = self.parameter(names.zero_point_of(name))
        new = call(
            self.graph, ops.int4_linear, x, *tensors, bias, self.scheme.scales, name=_label(node)
        )
        stand_in(new, node)
        self.graph.erase_node(node)
        self.forget(old)

    def moe(self, node: fx.Node, routed: list[Any], weights: dict[str, fx.Node | None]) -> None:
        """`weights` are the wide ones of each parameter of `node`, where experts are separate."""
        if not self.rules.keys() & weights.keys():
            return
        tensors: list[fx.Node | list[fx.Node]] = []
        for name, wide in weights.items():
            tensors += self.stored(name) if name in self.rules else (wide or [], [], [])
        new = call(
            self.graph, ops.int4_moe, *routed, *tensors, self.scheme.scales, name=_label(node)
        )
        stand_in(new, node)
        self.graph.erase_node(node)

    def stored(self, stacked: str) -> list[fx.Node | list[fx.Node]]:
        """The codes, scales and zero points of the experts of a stacked weight."""
        codes, scales = self.experts(stacked), self.experts(stacked, names.scale_of)
        if not self.scheme.zero_points:
            return [codes, scales, []]
        return [codes, scales, self.experts(stacked, names.zero_point_of)]

    def routed(self, node: fx.Node) -> tuple[str, str]:
        layer = names.layer_of(_label(node))
        assert layer is not None
        return names.routed(layer)


def _label(node: fx.Node) -> str:
    return str(node.meta["name"])


def _name(x: fx.Node) -> str:
    return name_of(x.meta["type"].dtype)
