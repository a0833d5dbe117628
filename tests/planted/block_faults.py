"""Faults in the other half of a layer: norms, router, experts and the sums around them."""

from collections.abc import Callable

import numpy as np
from onnx import ModelProto, NodeProto

from tests.planted.edit import (
    after,
    becomes,
    before,
    computes,
    constant,
    graphs,
    node_of,
    rewire,
    set_attribute,
)

Plant = Callable[[ModelProto, int], None]


def epsilon(value: str, eps: float) -> Plant:
    """Give the norm that computes `value` another epsilon; "{}" in it is the layer."""

    def plant(model: ModelProto, layer: int | None) -> None:
        name = value.format(layer)
        inside = f"{name}/normed"
        set_attribute(
            node_of(model, inside if computes(model, inside) else name), "epsilon", float(eps)
        )

    return plant


def _of(layer: int, name: str) -> str:
    return f"layers.{layer}.moe.{name}"


def _experts(model: ModelProto, layer: int, op: str, label: str) -> list[tuple[NodeProto, str]]:
    """The nodes inside the experts of a layer that are `op` and have the label; their outputs."""
    stem = _of(layer, "routed/expert")
    found = [
        (node, node.output[0])
        for graph in graphs(model.graph)
        for node in graph.node
        if node.op_type == op and node.name.startswith(stem) and node.name.endswith(f"/{label}")
    ]
    assert found, f"layer {layer} has no {op} called {label}"
    return found


def routed_gate_and_up_swapped(model: ModelProto, layer: int, only: str = "") -> None:
    splits = _experts(model, layer, "Split", "split")
    for node, _ in [each for each in splits if only in each[0].name] if only else splits:
        gate, up = node.output
        node.output[0], node.output[1] = up, gate


def one_gate_and_up_swapped(model: ModelProto, layer: int) -> None:
    routed_gate_and_up_swapped(model, layer, "/expert.7/")


def shared_gate_and_up_swapped(model: ModelProto, layer: int) -> None:
    """Multiply with the weight of the one where the other belongs."""
    names = [_of(layer, f"shared.{part}.weight") for part in ("gate", "up")]
    readers = [next(n for n in model.graph.node if name in n.input) for name in names]
    for node, name, other in zip(readers, names, reversed(names), strict=True):
        node.input[list(node.input).index(name)] = other


def shared_gelu(model: ModelProto, layer: int) -> None:
    name = _of(layer, "shared.act/silu")
    becomes(model, name, "Gelu", [node_of(model, name).input[0]], approximate="none")


def routed_relu(model: ModelProto, layer: int) -> None:
    for node, output in _experts(model, layer, "Mul", "silu"):
        becomes(model, output, "Relu", [node.input[0]])


def score_on_output(model: ModelProto, layer: int) -> None:
    """Multiply what an expert returns by its score, not what it gets."""
    scaled, routed = _of(layer, "routed/scaled"), _of(layer, "routed")
    x, scores = node_of(model, scaled).input
    becomes(model, scaled, "Identity", [x])
    inner, add = after(model, routed)
    add("Mul", [inner, scores], routed)


def score_dropped(model: ModelProto, layer: int) -> None:
    scaled = _of(layer, "routed/scaled")
    becomes(model, scaled, "Identity", [node_of(model, scaled).input[0]])


def softmax_router(model: ModelProto, layer: int) -> None:
    top, scores = _of(layer, "route/top.0"), _of(layer, "route.0")
    logits = node_of(model, top).input[0]
    rewire(model, top, logits, before(model, top)("Softmax", [logits], axis=-1))
    becomes(model, scores, "Identity", [top])


def second_expert(model: ModelProto, layer: int) -> None:
    """Choose the second best expert, and its score."""
    top, chosen = _of(layer, "route/top.0"), _of(layer, "route.1")
    node = node_of(model, top)
    node.input[1] = constant(model, [2], np.int64)
    one, two = (constant(model, [n], np.int64) for n in (1, 2))
    for name in (chosen, top):
        inner, add = after(model, name)
        add("Slice", [inner, one, two, one], name)


def experts_swapped(model: ModelProto, layer: int) -> None:
    """Let tokens that choose expert 3 get expert 5, and the other way round."""
    stacked = [_of(layer, each) for each in ("gate_up", "down")]
    nodes = [node for graph in graphs(model.graph) for node in graph.node]
    sliced = [node for node in nodes if node.input and node.input[0] in stacked]
    if sliced:  # an expert's weights are gathered by its number
        (number,) = {node.input[1] for node in sliced}
        swap = constant(model, [0, 1, 2, 5, 4, 3, *range(6, 1024)], np.int64)
        add = before(model, sliced[0].output[0])
        other = add("Gather", [swap, number], axis=0)
        for node in sliced:
            node.input[1] = other
        return
    swapped = {f"{name}[{a}]": f"{name}[{b}]" for name in stacked for a, b in ((3, 5), (5, 3))}
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = swapped.get(name, name)


def an_expert_never_runs(model: ModelProto, layer: int) -> None:
    """Decide that no token has chosen expert 4."""
    asked = node_of(model, _of(layer, "routed/asked.4"))
    becomes(model, asked.output[0], "Less", [asked.input[1], constant(model, 0, np.int64)])


def first_experts_lost(model: ModelProto, layer: int) -> None:
    """Let expert 6 start from zeros, so that what the experts before it computed is lost."""
    start, stem = _of(layer, "routed/start"), _of(layer, "routed/expert.6/sum")
    node = node_of(model, stem)
    node.input[0] = start


def shared_dropped(model: ModelProto, layer: int) -> None:
    becomes(model, _of(layer, "out"), "Identity", [_of(layer, "routed")])


def routed_dropped(model: ModelProto, layer: int) -> None:
    becomes(model, _of(layer, "out"), "Identity", [_of(layer, "shared.down")])


def residual_dropped(model: ModelProto, layer: int) -> None:
    """Leave the input of the second half out of its residual sum."""
    name, residual = f"layers.{layer}.out", f"layers.{layer}.attn.residual"
    node = node_of(model, name)
    if node.op_type == "Add":
        becomes(model, name, "Identity", [each for each in node.input if each != residual])
    else:
        zero = constant(model, 0, np.float32)
        rewire(model, name, residual, before(model, name)("Mul", [residual, zero]))
