"""Make inner values of an ONNX model outputs or inputs, so that a proof can see and set them."""

from collections.abc import Mapping, Sequence

import onnx

from moec.artefact.artefact import Artefact
from moec.exporters.onnx.strangers import read_checked
from moec.spec import names


def shown(artefact: Artefact, part: str, wanted: Sequence[str]) -> list[str]:
    """Those of the names `wanted` that are values of a part of `artefact`."""
    model = read_checked(artefact, part)
    known = {name for node in model.graph.node for name in node.output}
    return [name for name in wanted if name in known]


def open_values(model: onnx.ModelProto, taps: Sequence[str], given: Sequence[str] = ()) -> None:
    """Change `model`: the values `taps` are outputs, inputs "NAME.given" replace values `given`.

    A given value is still computed, so that it can be a tap; no node uses it.
    """
    graph = model.graph
    known = {each.name: each for each in graph.value_info}
    for name in given:
        entry = graph.input.add()
        entry.CopyFrom(known[name])
        entry.name = names.given(name)
    rename(graph, {name: names.given(name) for name in given}, produced=False)
    own = {each.name for each in graph.output}
    graph.output.extend(known[name] for name in taps if name not in own)


def rename(graph: onnx.GraphProto, new: Mapping[str, str], produced: bool = True) -> None:
    """Give values of a graph and of the graphs in it other names, `new` by the old name.

    With `produced` false only nodes that read a value take the new name. Outputs of the graph keep
    theirs.
    """
    if not new:
        return
    for node in graph.node:
        for held in (node.input, node.output) if produced else (node.input,):
            for index, name in enumerate(held):
                if name in new:
                    held[index] = new[name]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                rename(inner, new, produced)
    if produced:
        for each in graph.value_info:
            each.name = new.get(each.name, each.name)
