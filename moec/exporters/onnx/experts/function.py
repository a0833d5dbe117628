"""Experts with tensors of their own, as an ONNX function that all layers of one shape call.

A layer of 256 experts takes thousands of nodes. The function has them once, however many layers
the model has; its inputs are the layer's tokens and weights.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import onnx_ir as ir
from torch import fx

from moec.exporters.onnx.lowering import FUNCTIONS, Emitter, type_of, value

Write = Callable[[Emitter, fx.Node, Any], ir.Value]


def in_function(write: Write) -> Write:
    """The lowering rule `write`, whose nodes are in a function; `write` sees no layer's names."""

    def lower(e: Emitter, node: fx.Node, operands: Any) -> ir.Value:
        given = {field.name: getattr(operands, field.name) for field in fields(operands)}
        inputs = dict(_tensors(given))
        key = (str(node.target), *fx.map_arg(node.args, lambda arg: arg.meta["type"]))
        if key not in e.functions:
            name = f"{node.target.__name__.partition('.')[0]}_{len(e.functions)}"  # type: ignore[union-attr]
            inner = Emitter(name, [], {}, e.weights, e.opset)
            formal = {label: value(label, type_of(each)) for label, each in inputs.items()}
            result = write(inner, node, type(operands)(**_placed(given, formal)))
            e.functions[key] = inner.function(name, list(formal.values()), [result])
        name = str(e.functions[key].name)
        return e.op(f"{FUNCTIONS}::{name}", list(inputs.values()), node.meta["type"])

    return lower


def _tensors(given: dict[str, Any]) -> list[tuple[str, ir.Value]]:
    """The tensors among a record's fields, each with the name of its function input."""
    found = []
    for name, each in given.items():
        if isinstance(each, ir.Value):
            found.append((name, each))
        elif isinstance(each, list):
            found += [(f"{name}.{index}", one) for index, one in enumerate(each)]
    return found


def _placed(given: dict[str, Any], formal: dict[str, ir.Value]) -> dict[str, Any]:
    """The fields of a record, with the function's inputs in place of tensors."""
    return {
        name: [formal[f"{name}.{index}"] for index in range(len(each))]
        if isinstance(each, list)
        else formal.get(name, each)
        for name, each in given.items()
    }
