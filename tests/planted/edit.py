"""Edits of an ONNX model that a fault is made of. Nothing here knows moec: onnx and numpy only."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper


class Add(Protocol):
    """Adds a node of an ONNX operator with one output; returns the name of that output."""

    def __call__(
        self, kind: str, inputs: list[str], name: str = "", domain: str = "", **attributes: Any
    ) -> str: ...


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """`graph` and all graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def home_of(model: ModelProto, value: str) -> tuple[GraphProto, int]:
    """The graph with the node that computes `value`, and the node's place in it."""
    for graph in graphs(model.graph):
        for index, node in enumerate(graph.node):
            if value in node.output:
                return graph, index
    raise KeyError(f"no node computes {value}")


def node_of(model: ModelProto, value: str) -> NodeProto:
    """The node that computes `value`."""
    graph, index = home_of(model, value)
    return graph.node[index]


def computes(model: ModelProto, value: str) -> bool:
    """Whether a node of `model` computes `value`."""
    return any(value in node.output for graph in graphs(model.graph) for node in graph.node)


def before(model: ModelProto, value: str) -> Add:
    """What adds nodes ahead of the one that computes `value`."""
    return _adder(*home_of(model, value), value)


def after(model: ModelProto, value: str) -> tuple[str, Add]:
    """The new name of what is `value` now, and what adds the nodes that compute `value` from it."""
    graph, index = home_of(model, value)
    node, inner = graph.node[index], f"{value}/before"
    node.output[list(node.output).index(value)] = inner
    for user in graph.node[index + 1 :]:  # a subgraph keeps the name, and so gets the new value
        assert value not in user.output
    return inner, _adder(graph, index + 1, value)


def _adder(graph: GraphProto, index: int, stem: str) -> Add:
    place = iter(range(index, index + 1000))
    taken = sum(node.name.startswith(f"{stem}/added.") for node in graph.node)
    numbers = iter(range(taken, taken + 1000))

    def add(
        kind: str, inputs: list[str], name: str = "", domain: str = "", **attributes: Any
    ) -> str:
        own = f"{stem}/added.{next(numbers)}"
        output = name or own
        made = helper.make_node(kind, inputs, [output], name=own, domain=domain, **attributes)
        graph.node.insert(next(place), made)
        return output

    return add


def constant(model: ModelProto, value: Any, dtype: type) -> str:
    """Add an initializer; returns its name."""
    name = f"added.{len(model.graph.initializer)}"
    tensor = numpy_helper.from_array(np.asarray(value, dtype), name)
    model.graph.initializer.append(tensor)
    return name


def constant_of(model: ModelProto, name: str) -> np.ndarray[Any, Any]:
    """The value of an initializer that is inside the model file."""
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    return numpy_helper.to_array(tensor)


def dims_of(model: ModelProto, name: str) -> list[int]:
    """The shape of an initializer, wherever its bytes are."""
    (tensor,) = (each for each in model.graph.initializer if each.name == name)
    return list(tensor.dims)


def attribute_of(node: NodeProto, name: str) -> Any:
    """The value of an attribute of `node`."""
    return next(helper.get_attribute_value(each) for each in node.attribute if each.name == name)


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Give `node` an attribute, in place of the one of that name."""
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def rewire(model: ModelProto, value: str, old: str, new: str) -> None:
    """Let the node that computes `value` read `new` where it reads `old`."""
    node = node_of(model, value)
    assert old in node.input, f"{value} does not read {old}: {list(node.input)}"
    for index, name in enumerate(node.input):
        if name == old:
            node.input[index] = new


def becomes(model: ModelProto, value: str, kind: str, inputs: list[str], **attributes: Any) -> None:
    """Let another operator compute `value`."""
    node = node_of(model, value)
    assert list(node.output) == [value]
    node.op_type, node.domain = kind, ""
    del node.input[:], node.attribute[:]
    node.input.extend(inputs)
    node.attribute.extend(helper.make_attribute(key, each) for key, each in attributes.items())
