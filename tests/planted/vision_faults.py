"""Faults in the graph of the vision tower."""

import numpy as np
from onnx import ModelProto

from tests.planted.edit import becomes, constant, constant_of, node_of, set_attribute


def _at(layer: int) -> str:
    return f"vision.layers.{layer}"


def gelu_approximated(model: ModelProto, _: None) -> None:
    set_attribute(node_of(model, "vision.adapter.fc1.act"), "approximate", "tanh")


def relu(model: ModelProto, layer: int) -> None:
    name = f"{_at(layer)}.mlp.act"
    becomes(model, name, "Relu", [node_of(model, name).input[0]])


def positions_dropped(model: ModelProto, _: None) -> None:
    becomes(model, "vision.tokens", "Identity", [node_of(model, "vision.tokens").input[0]])


def rope_axes_swapped(model: ModelProto, _: None) -> None:
    """Take the row of a patch for its column."""
    for part in ("cos", "sin"):
        node = node_of(model, f"vision.rope.{('cos', 'sin').index(part)}")
        table = constant_of(model, node.input[0])
        half = table.shape[1] // 2
        node.input[0] = constant(model, np.roll(table, half, axis=1), np.float32)


def shuffle_order(model: ModelProto, _: None) -> None:
    """Put the columns of the patches that become one token before their rows."""
    set_attribute(node_of(model, "vision.shuffle/turned"), "perm", [0, 1, 3, 4, 2, 5])
