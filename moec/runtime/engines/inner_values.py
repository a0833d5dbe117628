"""Make inner values of an ONNX model outputs or inputs, so that a proof can see and set them."""

from collections.abc import Sequence

import onnx_ir as ir

from moec.artefact.artefact import Artefact
from moec.exporters.onnx.strangers import read_checked
from moec.spec import names


def shown(artefact: Artefact, part: str, wanted: Sequence[str]) -> list[str]:
    """Those of the names `wanted` that are values of a part of `artefact`."""
    model = read_checked(artefact, part)
    known = {name for node in model.graph.node for name in node.output}
    return [name for name in wanted if name in known]


def open_values(model: ir.Model, taps: Sequence[str], given: Sequence[str] = ()) -> None:
    """Change `model`: the values `taps` are outputs, inputs "NAME.given" replace values `given`.

    A given value is still computed, so that it can be a tap; no node uses it.
    """
    known = _values(model)
    for name in given:
        own = known[name]
        entry = ir.Value(name=names.given(name), type=own.type, shape=own.shape)
        for node, index in list(own.uses()):
            node.replace_input_with(index, entry)
        model.graph.inputs.append(entry)
    outputs = model.graph.outputs
    outputs.extend(known[name] for name in taps if known[name] not in outputs)


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(each.name): each for node in model.graph for each in node.outputs}
