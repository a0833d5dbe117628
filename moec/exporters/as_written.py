"""Compare the graphs of an artefact with those that the exporter writes now, node for node."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moec.artefact.artefact import Artefact
from moec.artefact.engine_options import EngineOptions
from moec.artefact.placement import Bound
from moec.exporters.builder import Wanted, builder_for
from moec.exporters.stages import no_collection
from moec.exporters.torch.archive import difference


@no_collection()
def other_graphs(artefact: Artefact) -> dict[str, str]:
    """The parts whose files are not what the exporter writes now, and the first difference of each.

    The graphs are built again from the manifest, at full size; no weights are read. The result is
    empty if every file has the same bytes, or the same nodes.
    """
    with tempfile.TemporaryDirectory(prefix="moec-graphs-") as folder:
        written = _write(artefact, Path(folder))
        found: dict[str, str | None] = {}
        for part, file in written.items():
            stored = artefact.graph(part)
            if part not in artefact.parts:
                found[part] = "the manifest lists no such file"
            elif stored.read_bytes() != file.read_bytes():
                found[part] = _difference(stored, file)
        more = set(artefact.parts) - set(written)
        found |= dict.fromkeys(more, "moec writes no such file")
        return {part: what for part, what in found.items() if what}


def _write(artefact: Artefact, folder: Path) -> dict[str, Path]:
    """Write every graph into `folder` as a build or `bind` would write it."""
    manifest, builder = artefact.manifest, builder_for(artefact)
    options = manifest.options or EngineOptions()
    wanted = Wanted(manifest.spec, manifest.precision, manifest.compute, manifest.dialect, options)
    bound = None
    if manifest.weights.mode != "unbound":
        root, places = artefact.weights_folder, manifest.weights.tensors
        # the graph names shards as the manifest does, whatever links lead to them
        entries = {
            name: replace(entry, file=root / places[name].file)
            for name, entry in artefact.stored().items()
        }
        bound = Bound(entries, root, manifest.weights)
    files = {}
    for part, graph in builder.graphs(wanted).items():
        model, _ = builder.lower(wanted, graph, part)
        files[part] = folder / artefact.graph(part).relative_to(artefact.path)
        files[part].parent.mkdir(parents=True, exist_ok=True)
        builder.save_unbound(model, files[part])
        if bound:
            builder.save_bound(model, files[part], bound, options)
    return files


def _difference(stored: Path, written: Path) -> str | None:
    """How the graph in `stored` differs from that in `written`; None if only their bytes do."""
    if stored.suffix == ".pt2":
        return difference(stored, written.read_bytes())
    if stored.suffix != ".onnx":
        return "another program"
    import onnx

    left, right = (onnx.load(file, load_external_data=False) for file in (stored, written))
    mine, theirs = (dict(_facts(model.graph)) for model in (left, right))
    for place in theirs:  # in the order of the graph
        if place not in mine:
            return f"{place}: missing"
        if mine[place] != theirs[place]:
            return f"{place}: {_short(mine[place])}, expected {_short(theirs[place])}"
    if more := [place for place in mine if place not in theirs]:
        return f"{more[0]}: not expected"
    left.graph.Clear()
    right.graph.Clear()
    left.producer_version = right.producer_version = ""
    return None if left == right else "other operator sets, functions or metadata"


def _facts(graph: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that a graph says, piece by piece: (where, what); nodes first, in their order."""
    for index, node in enumerate(graph.node):
        where = f"{at}{node.name or node.output[0]}"
        wires = tuple(node.input), tuple(node.output)
        yield where, (index, node.domain, node.op_type, *wires)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _facts(attribute.g, f"{where}/{attribute.name}/")
            else:
                what = attribute.SerializeToString(deterministic=True)
                yield f"{where}, attribute {attribute.name}", what
    for kind in ("input", "output", "initializer"):
        values = getattr(graph, kind)
        yield f"{at}{kind}s", tuple(each.name for each in values)
        for each in values:
            yield f"{at}{kind} {each.name}", each.SerializeToString(deterministic=True)


def _short(what: Any) -> str:
    """A piece of a graph in a few words: the bytes of an attribute or a value say nothing."""
    if isinstance(what, bytes):
        return f"{len(what)} bytes"
    if isinstance(what, tuple) and what and isinstance(what[0], int):
        _, domain, kind, inputs, outputs = what
        return f"{domain or 'ai.onnx'}::{kind}({', '.join(inputs)}) -> {', '.join(outputs)}"[:200]
    return f"{len(what)} names"
